"""A client of servers that speak OpenAI's HTTP interface: OpenAI itself, vLLM, llama.cpp, `transformers serve`.

What a busy server answers with (429, 5xx, no answer in time, an answer that is no JSON) is asked again after a pause
that doubles; what it will never accept (a wrong key, an unknown model) is an error at once. An error names the address
and the status, never the key.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from email.message import Message
    from http.client import HTTPResponse

T = TypeVar("T")
R = TypeVar("R")

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 12
"""Times that a request is made before it is given up; with the pauses between them about five minutes."""
LONGEST_PAUSE_S = 60.0
LONGEST_ASKED_PAUSE_S = 600.0
"""Longest pause that a server can ask for (`Retry-After`) and get."""

_MOST_BYTES = 64 << 20
_AGAIN = {408, 409, 425, 429}
_NEVER = {401, 403, 404, 405}
"""Nothing else would be answered either."""
_OWN_PATHS = ("/chat/completions", "/completions", "/models")


class Unanswered(LlameroError):  # noqa: N818  (it is no error of the program)
    """One request got no answer, or one that says no; another one may."""


class Said(NamedTuple):
    """What a model answered."""

    text: str
    finish: str
    """`stop`, or `length` where the answer was cut off; whatever else the server says."""
    model: str = ""
    """Which model the server says that it was: a name such as `gpt-4` stands for one that changes."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    Args:
        url: Of the interface, for example `http://localhost:8000/v1`; without a path `/v1` is added.
        model: Its name there.
        key_variable: Environment variable that holds the API key. By default OPENAI_API_KEY, which goes to no other
            machine without encryption.
        timeout_s: Longest time for one answer.
        tries: How often a request is made.

    Raises:
        LlameroError: The address cannot be used, or the key that was named is not there.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout_s: float = 600.0
    tries: int = TRIES
    pause: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    """Waits for so many seconds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _base(self.url))
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise LlameroError(
                f"the environment variable {self.key_variable} is empty",
                where=self.url,
                fix=f"export {self.key_variable}=…",
            )
        if self.key is None and self.url == OPENAI:
            raise LlameroError(
                f"no API key: the environment variable {KEY_VARIABLE} is empty",
                where=self.url,
                fix=f"export {KEY_VARIABLE}=…, or name another server",
            )

    @property
    def key(self) -> str | None:
        """Return the API key; it is never kept in this object."""
        if self.key_variable is not None:
            return os.environ.get(self.key_variable, "").strip() or None
        parts = urlsplit(self.url)
        safe = parts.scheme == "https" or _is_local(parts.hostname or "")
        return os.environ.get(KEY_VARIABLE, "").strip() or None if safe else None

    def describe(self) -> str:
        """Return which model this is, for reports."""
        return f"{self.model} at {self.url}"


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LlameroError("not an address", where=url, fix="give http://HOST:PORT/v1 or https://…")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise LlameroError(
            "an address with a password or a query in it cannot be used",
            where=f"{parts.scheme}://{parts.hostname}",
            fix="give scheme, host and path; a key goes into an environment variable",
        )
    path = parts.path.rstrip("/")
    for own in _OWN_PATHS:
        path = path.removesuffix(own)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Client:
    """Asks one model; threads may ask at the same time.

    Args:
        endpoint: Where the model is.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._length = "max_tokens"  # what the length of an answer is called there
        local = _is_local(urlsplit(endpoint.url).hostname or "")
        proxies = urllib.request.ProxyHandler({} if local else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirect())

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int, seed: int | None = None
    ) -> Said:
        """Return the answer to a conversation.

        Args:
            messages: `{"role": …, "content": …}`, the last one the user's.
            temperature: 0 takes the likeliest token each time, as far as the server can.
            max_tokens: Longest answer.
            seed: Of the draws, for servers that take one.

        Raises:
            Unanswered: No answer after all tries, or this request is refused.
            LlameroError: The server refuses whatever it is asked.
        """
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": list(messages), "temperature": temperature}
        if seed is not None:
            body["seed"] = seed
        try:
            return self.post("/chat/completions", {**body, self._length: max_tokens}, _said)
        except Unanswered as error:
            newer = "max_completion_tokens"
            if self._length == newer or newer not in error.problem:
                raise
            self._length = newer  # OpenAI renamed it for its newer models, which refuse the old name
        return self.post("/chat/completions", {**body, self._length: max_tokens}, _said)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], R]) -> R:
        """Return what `read` makes of the server's answer.

        Args:
            path: After the address, for example `/completions`.
            body: Is sent as JSON.
            read: Takes the decoded JSON; a KeyError, IndexError, TypeError or ValueError says that it is nonsense,
                and the server is asked again.

        Raises:
            Unanswered: No answer after all tries, or this request is refused.
            LlameroError: The server refuses whatever it is asked.
        """
        data = json.dumps(body).encode()
        failure = _Failure("no tries were allowed", None)
        for attempt in range(self.endpoint.tries):
            try:
                return read(self._once(path, data))
            except _Failure as error:
                failure = error
            except (KeyError, IndexError, TypeError, ValueError) as error:
                failure = _Failure(f"an answer that makes no sense ({type(error).__name__}: {error})", None)
            if attempt + 1 < self.endpoint.tries:
                self.endpoint.pause(_pause(attempt, failure.asked_pause))
        times = f"after {self.endpoint.tries} tries: " if self.endpoint.tries > 1 else ""
        raise Unanswered(
            f"{times}{failure}", where=self.endpoint.url + path, fix="see whether the server runs, and run this again"
        )

    def _once(self, path: str, data: bytes) -> Any:
        """Return the decoded answer of one request; `_Failure` where asking again may help."""
        url, limit = self.endpoint.url + path, self.endpoint.timeout_s
        headers = {"Content-Type": "application/json", "User-Agent": "llamero"}
        if self.endpoint.key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=limit) as response:
                return json.loads(_body(response, time.monotonic() + limit))
        except urllib.error.HTTPError as error:
            with error:
                said = self._without_key(_message(error.read(1 << 16)))
            raise _status(error.code, error.headers, said, url) from None
        except (OSError, HTTPException) as error:
            raise _Failure(_broken(error, limit), None) from error
        except ValueError as error:
            raise _Failure("an answer that is no JSON", None) from error

    def _without_key(self, said: str) -> str:
        return said if self.endpoint.key is None else said.replace(self.endpoint.key, "…")


class _Failure(Exception):  # noqa: N818
    """A request that may be made again."""

    def __init__(self, said: str, asked_pause: float | None) -> None:
        super().__init__(said)
        self.asked_pause = asked_pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the key is for the server that was named."""

    def redirect_request(self, *_: object, **__: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def _status(code: int, headers: Message[str, str], said: str, url: str) -> Exception:
    """Return what a status other than success means."""
    problem = f"HTTP {code}: {said or 'no explanation'}"
    if 300 <= code < 400:
        to = headers.get("Location", "elsewhere")
        return LlameroError(f"HTTP {code}: it points to {to}", where=url, fix="name that address, if you trust it")
    if code in _NEVER or "insufficient_quota" in said:
        fix = {401: "check the API key", 403: "check the API key", 404: "check the address and the model's name"}
        return LlameroError(problem, where=url, fix=fix.get(code, "see what the server says"))
    if code in _AGAIN or code >= 500:
        return _Failure(problem, _asked_pause(headers.get("Retry-After")))
    return Unanswered(problem, where=url, fix="see what the server says")


def _broken(error: OSError | HTTPException, limit_s: float) -> str:
    """Return what became of a connection."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {limit_s:g} s"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({reason})"
    return f"the connection broke ({type(error).__name__})"


def _asked_pause(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After`, which may be a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _pause(attempt: int, asked: float | None) -> float:
    if asked is not None:
        return min(asked, LONGEST_ASKED_PAUSE_S)
    return min(LONGEST_PAUSE_S, 2.0**attempt) * random.uniform(0.5, 1)  # threads must not come back all at once


def _body(response: HTTPResponse, deadline: float) -> bytes:
    """Return the body of an answer; a server that drips is given up at the deadline."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if sum(map(len, parts)) > _MOST_BYTES:
            raise ValueError("endless")
    return b"".join(parts)


def _message(body: bytes) -> str:
    """Return what a server says of a failure: OpenAI's `error.message`, else the beginning of the text."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return " ".join(text.split())[:300]
    return f"{message} ({code})" if isinstance(code, str) else str(message)


def _said(answer: Any) -> Said:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}")
    return Said(text or "", str(choice.get("finish_reason")), str(answer.get("model") or ""))


def at_once(work: Callable[[T], R], items: Sequence[T], *, threads: int) -> Generator[tuple[int, R], None, None]:
    """Yield the number of an item and `work(item)`, in the order in which they are done.

    What was under way goes on in the background when the caller stops early; nothing more is begun.

    Args:
        work: What to do, for each item in one of the threads; what it raises is raised here.
        items: In the order in which they are begun.
        threads: Items under way at a time.
    """
    waiting: SimpleQueue[tuple[int, T]] = SimpleQueue()
    done: SimpleQueue[tuple[int, R | None, BaseException | None]] = SimpleQueue()
    stop = threading.Event()
    for pair in enumerate(items):
        waiting.put(pair)

    def serve() -> None:
        while not stop.is_set():
            try:
                number, item = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((number, work(item), None))
            except BaseException as error:  # it is raised again where the results are waited for
                done.put((number, None, error))
                return

    for _ in range(min(threads, len(items))):
        threading.Thread(target=serve, daemon=True).start()  # Ctrl-C need not wait for a server
    try:
        for _ in items:
            number, result, error = done.get()
            if error is not None:
                raise error
            yield number, result  # type: ignore[misc]  # a result, as there is no error
    finally:
        stop.set()
