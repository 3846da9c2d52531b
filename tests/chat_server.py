"""A server on this machine that speaks OpenAI's interface and says what a test wants."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """`answer` maps a request's body to (status, headers, bytes); what was asked is kept."""

    def __init__(self):
        self.requests = []
        self.headers = []
        self.paths = []
        self.answer = lambda body: chat("yes")
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                status, headers, said = server.answer(body)
                try:
                    self.send_response(status)
                    for key, value in headers.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(said)
                except BrokenPipeError:  # the client gave up
                    pass

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def chat(text, finish="stop"):
    reply = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


@contextmanager
def serving():
    """Yield a server that runs while the block does."""
    served = Server()
    try:
        yield served
    finally:
        served.close()
