"""A client of servers that speak OpenAI's protocol: OpenAI's own, vLLM, or `scripts/serve.py`."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from litmini.errors import UserError, counted

T = TypeVar("T")
R = TypeVar("R")
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may succeed later."""
LONGEST_WAIT = 60.0  # seconds between two tries
LONGEST_REPLY = 64 << 20  # bytes
NEAR = ("localhost", "127.0.0.1", "::1")


class ServerError(UserError):
    """A request failed for good: the server refused it, or did not answer properly however often it was asked."""


@dataclass(frozen=True)
class Reply:
    """The first choice of a reply, and the tokens that it took."""

    text: str
    finish: str
    """stop, length or another reason."""
    prompt_tokens: int
    completion_tokens: int
    choice: dict[str, Any]
    """All that the server said of it, `logprobs` for example."""


class Client:
    """Sends requests to one server. Several threads may use it at once; it holds no connection.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: name of the model there.
        key_variable: environment variable with the key. It is read here; without it, or where it is empty, no key is sent.
            The key stands in no message and in no file.
        timeout: seconds that one try may take in all.
        tries: how often a request is sent where the connection fails, the server is late, or says that it is busy.

    Raises:
        UserError: base_url is none, or the key has characters that no key has.
    """

    def __init__(
        self, base_url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0, tries: int = 6
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"base_url is {base_url!r}; expected such as http://127.0.0.1:8000/v1.")
        if parts.username or parts.password:
            raise UserError("base_url holds a user or a password; put the key into an environment variable.")
        self.base_url, self.model, self.timeout, self.tries = base_url.rstrip("/"), model, timeout, tries
        self._variable = key_variable
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"the environment variable {key_variable} holds characters that no key has.")
        if self._key and parts.scheme == "http" and parts.hostname not in NEAR:
            raise UserError(
                f"{base_url} is not encrypted, and the key in {key_variable} would be readable on its way: use https, or "
                f"empty the variable."
            )
        handlers: list[Any] = [_NoRedirects]
        if parts.hostname in NEAR:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to `body`, sent to `base_url` + path, such as /completions. Waits longer after each failed try.

        Raises:
            ServerError: the server refuses the request, or all tries failed.
        """
        return self._parsed(path, self._request(path, json.dumps(body).encode()))

    def tell(self, path: str, body: dict[str, Any]) -> None:
        """`post`, where nothing but success is expected in the reply."""
        self._request(path, json.dumps(body).encode())

    def chat(self, messages: list[dict[str, Any]], /, **settings: Any) -> Reply:
        """Return the reply to messages. `settings` go into the body: max_tokens, temperature and others; None: left out.

        Raises:
            ServerError: the request failed, or the reply has no text.
        """
        body = {"model": self.model, "messages": messages, **settings}
        found = self.post("/chat/completions", {key: value for key, value in body.items() if value is not None})
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"].get("content") or ""
            tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError(text)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            raise ServerError(f"{self.base_url}: no chat completion in the reply: {_short(found)}") from None
        return Reply(text, str(choice.get("finish_reason") or ""), tokens[0], tokens[1], choice)

    def models(self) -> list[str]:
        """Return the names of the models that the server has.

        Raises:
            ServerError: the request failed.
        """
        found = self._parsed("/models", self._request("/models", None)).get("data")
        return [str(one.get("id")) for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def only_model(self, setting: str) -> str:
        """Return the name of the server's model.

        Args:
            setting: that names one, for the error.

        Raises:
            UserError: it has none, or several.
        """
        names = self.models()
        if len(names) != 1:
            raise UserError(f"{self.base_url} has the models {', '.join(names) or '(none)'}: name one, {setting} NAME.")
        return names[0]

    def _request(self, path: str, data: bytes | None) -> bytes:
        problem = ""
        for number in range(self.tries):
            wait, hint = None, ""
            try:
                return self._once(path, data)
            except urllib.error.HTTPError as error:
                problem = self._describe(error)
                if error.code not in AGAIN:
                    raise ServerError(problem) from None
                wait = _retry_after(error.headers.get("Retry-After"))
            except TimeoutError:
                problem = f"no reply within {self.timeout:g} seconds"
            except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem = f"no reply within {self.timeout:g} seconds" if late else f"{reason or type(error).__name__}"
                hint = ". Does the server run, and is this its address?"
            if wait is not None and wait > LONGEST_WAIT:
                problem += f"; it asks to come back in {wait:,.0f} seconds"
                break
            if number + 1 < self.tries:
                time.sleep(wait if wait is not None else min(LONGEST_WAIT, 2.0**number))
        raise ServerError(
            f"{self.base_url}{path} failed, tried {counted(number + 1, 'time')}: {self._hidden(problem)}{hint}"
        )

    def _once(self, path: str, data: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "litmini"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(self.base_url + path, data, headers)
        content = b""
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                content += part
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(content) > LONGEST_REPLY:
                    raise ServerError(f"{self.base_url}{path}: the reply is longer than {LONGEST_REPLY >> 20} MiB.")
            wanted = response.headers.get("Content-Length")
        if wanted is not None and wanted.isdigit() and len(content) < int(wanted):
            raise http.client.IncompleteRead(content, int(wanted) - len(content))
        return content

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ServerError(
                f"{self.base_url}{path}: the reply is no JSON object but {_short(content.decode(errors='replace'))}; "
                f"is this the address of an OpenAI-compatible server? It usually ends with /v1."
            )
        return found

    def _describe(self, error: urllib.error.HTTPError) -> str:
        """Return what an HTTP error says, without the key."""
        try:
            said: Any = error.read(1 << 16).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        try:
            inside = json.loads(said)
            inside = inside.get("error", inside.get("detail", inside))
            said = inside.get("message", inside) if isinstance(inside, dict) else inside
        except (ValueError, AttributeError):
            pass
        hint = ""
        if error.code in (401, 403):
            hint = f" The key is that of the environment variable {self._variable}" + ", which is empty" * (
                not self._key
            )
            hint += "."
        elif error.code == 404:
            hint = " Does base_url end as the server wants it, with /v1 for example, and has it this model?"
        elif 300 <= error.code < 400:
            hint = f" It redirects to {error.headers.get('Location')}, which is not followed: give that address."
        return self._hidden(f"{self.base_url} answers {error.code}: {_short(said)}{'.' if hint else ''}{hint}")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def ask_all(ask: Callable[[T], R], items: Sequence[T], concurrency: int) -> Iterator[tuple[int, R]]:
    """Yield the number of each item and what `ask` returns for it, as they come, some at once.

    An error of `ask` is raised. Who leaves the loop, also by Ctrl-C, waits for no reply.
    """
    waiting, results = SimpleQueue[int](), SimpleQueue[tuple[int, R] | BaseException]()
    for i in range(len(items)):
        waiting.put(i)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                i = waiting.get_nowait()
                results.put((i, ask(items[i])))
            except Empty:
                return
            except BaseException as error:
                results.put(error)
                return

    for _ in range(min(concurrency, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key to wherever the server points, and turn POST into GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None: it has none, or a date."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
