"""The client against a server that answers, garbles, refuses, is busy and hangs."""

import json
import threading
import time
from email.utils import formatdate

import pytest

from chat_server import chat, serving
from llamero.core.errors import LlameroError
from llamero.infer.backends import openai
from llamero.infer.backends.openai import Client, Endpoint, Said, Unanswered, at_once

ASKED = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Größe?"}]


@pytest.fixture
def server():
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def client(server, pauses):
    return Client(Endpoint(server.url, "judge", tries=4, pause=pauses.append))


def say(client, **how):
    return client.chat(ASKED, temperature=0, max_tokens=7, **how)


def answers(*replies):
    """Give one reply after the other; the last one stays."""
    left = list(replies)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def error(status, message="no", headers=None, **more):
    return status, headers or {}, json.dumps({"error": {"message": message, **more}}).encode()


def test_a_conversation_is_sent_and_answered(server, client):
    server.answer = lambda body: chat("Süß [[5]]", "length")
    assert say(client, seed=3) == Said("Süß [[5]]", "length")
    assert server.requests == [{"model": "judge", "messages": ASKED, "temperature": 0, "max_tokens": 7, "seed": 3}]
    assert server.paths == ["/v1/chat/completions"]
    assert "Authorization" not in server.headers[0]


def test_an_answer_of_nothing_is_empty(server, client):
    server.answer = lambda body: chat(None)
    assert say(client).text == ""


@pytest.mark.parametrize("given", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions"])
def test_an_address_is_understood_in_all_its_forms(given):
    assert Endpoint("http://localhost:8000" + given, "m").url == "http://localhost:8000/v1"


@pytest.mark.parametrize("bad", ["localhost:8000", "ftp://h/v1", "http://", "http://me:secret@h/v1", "http://h/v1?a=b"])
def test_other_addresses_are_refused_without_their_secrets(bad):
    with pytest.raises(LlameroError, match=r"not an address|cannot be used") as raised:
        Endpoint(bad, "m")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("busy", [429, 500, 502, 503, 408])
def test_a_busy_server_is_asked_again(server, client, pauses, busy):
    server.answer = answers(error(busy), error(busy), chat("at last"))
    assert say(client).text == "at last"
    assert len(server.requests) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


@pytest.mark.parametrize(
    "garbled", [b"", b"<html>", b"{", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}']
)
def test_a_garbled_answer_is_asked_for_again(server, client, garbled):
    server.answer = answers((200, {}, garbled), chat("whole"))
    assert say(client).text == "whole"


def test_an_answer_that_breaks_off_is_asked_for_again(server, client):
    server.answer = answers((200, {"Content-Length": "999"}, b'{"choices"'), chat("whole"))
    assert say(client).text == "whole"


@pytest.mark.parametrize("chunks", [b'5\r\n{"cho', b"no size\r\n{}", b""])
def test_chunks_that_break_off_are_asked_for_again(server, client, chunks):
    server.answer = answers((200, {"Transfer-Encoding": "chunked"}, chunks), chat("whole"))
    assert say(client).text == "whole"


def test_the_server_says_how_long_to_wait(server, client, pauses):
    soon = formatdate(time.time() + 100, usegmt=True)
    server.answer = answers(
        error(429, headers={"Retry-After": "7"}), error(503, headers={"Retry-After": soon}), chat("x")
    )
    say(client)
    assert pauses[0] == 7
    assert 90 < pauses[1] <= 100


def test_who_never_answers_is_given_up(server, client, pauses):
    server.answer = lambda body: error(503, "overloaded")
    with pytest.raises(Unanswered, match="after 4 tries: HTTP 503: overloaded") as raised:
        say(client)
    assert raised.value.where == server.url + "/chat/completions"
    assert len(server.requests) == 4
    assert len(pauses) == 3


def test_pauses_grow_up_to_a_minute():
    assert [round(openai._pause(attempt, None)) <= most for attempt, most in [(0, 1), (3, 8), (40, 60)]] == [True] * 3
    assert openai._pause(40, None) >= 30


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_never_be_answered_is_an_error_at_once(server, client, status):
    server.answer = lambda body: error(status, "no such thing", code="gone")
    with pytest.raises(LlameroError, match=rf"HTTP {status}: no such thing \(gone\)") as raised:
        say(client)
    assert not isinstance(raised.value, Unanswered)
    assert len(server.requests) == 1


def test_an_empty_account_is_not_asked_again(server, client):
    server.answer = lambda body: error(429, "You exceeded your quota", code="insufficient_quota")
    with pytest.raises(LlameroError, match="insufficient_quota"):
        say(client)
    assert len(server.requests) == 1


def test_one_refused_request_is_not_the_end(server, client):
    server.answer = lambda body: error(400, "context length exceeded")
    with pytest.raises(Unanswered, match="HTTP 400: context length exceeded"):
        say(client)
    assert len(server.requests) == 1


def test_newer_models_get_the_length_under_its_newer_name(server, client):
    def answer(body):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return chat(str(body["max_completion_tokens"]))

    server.answer = answer
    assert [say(client).text, say(client).text] == ["7", "7"]
    assert len(server.requests) == 3


def test_a_redirection_is_not_followed(server, client, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.answer = lambda body: (307, {"Location": "http://elsewhere.example/v1"}, b"")
    with pytest.raises(LlameroError, match=r"HTTP 307: it points to http://elsewhere\.example/v1"):
        say(client)


def test_a_server_that_hangs_is_given_up(server, pauses):
    hanging = threading.Event()
    server.answer = lambda body: (hanging.wait(10), chat("late"))[1]
    client = Client(Endpoint(server.url, "judge", timeout_s=0.1, tries=2, pause=pauses.append))
    with pytest.raises(Unanswered, match=r"after 2 tries: no answer within 0\.1 s"):
        say(client)
    hanging.set()


def test_no_server_at_all(pauses):
    with serving() as gone:
        url = gone.url
    with pytest.raises(Unanswered, match="after 2 tries: no connection"):
        say(Client(Endpoint(url, "judge", tries=2, pause=pauses.append)))


def test_the_key_is_sent_and_never_shown(server, client, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    say(client)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    server.answer = lambda body: error(401, "wrong key: sk-secret")
    with pytest.raises(LlameroError, match="wrong key: …") as raised:
        say(client)
    assert "sk-secret" not in str(raised.value) + repr(client.endpoint)


def test_a_named_key_is_taken_instead(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("MY_KEY", "mine")
    say(Client(Endpoint(server.url, "judge", key_variable="MY_KEY")))
    assert server.headers[0]["Authorization"] == "Bearer mine"


def test_a_key_that_is_missing_is_said_before_anything_is_asked():
    with pytest.raises(LlameroError, match="variable MY_KEY is empty"):
        Endpoint("http://localhost/v1", "m", key_variable="MY_KEY")
    with pytest.raises(LlameroError, match="variable OPENAI_API_KEY is empty"):
        Endpoint(openai.OPENAI, "gpt-4")


def test_the_usual_key_goes_nowhere_in_the_clear(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("MY_KEY", "mine")
    assert Endpoint("http://gpu-box:8000/v1", "m").key is None
    assert Endpoint("http://gpu-box:8000/v1", "m", key_variable="MY_KEY").key == "mine"
    assert Endpoint("https://api.example/v1", "m").key == "sk-secret"
    assert Endpoint("http://localhost:8000/v1", "m").key == "sk-secret"


def test_several_are_asked_at_once(server, client):
    together = threading.Barrier(4, timeout=20)  # broken unless four are under way
    server.answer = lambda body: (together.wait(), chat(body["messages"][0]["content"]))[1]

    def ask(number):
        said = client.chat([{"role": "user", "content": str(number)}], temperature=0, max_tokens=1)
        return int(said.text)

    found = dict(at_once(ask, range(10, 22), threads=4))
    assert found == {number: number + 10 for number in range(12)}


def test_what_a_thread_raises_is_raised_where_it_is_waited_for():
    def work(number):
        if number == 3:
            raise LlameroError("three")
        return number

    results = at_once(work, range(100), threads=1)
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(LlameroError, match="three"):
        next(results)


def test_nothing_to_do():
    assert list(at_once(lambda x: x, [], threads=3)) == []
