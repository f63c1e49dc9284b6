"""Renders chat templates in a child process with limits of time, memory and size.

A template comes with a checkpoint, and is a program: jinja's sandbox bounds what it may touch, not how long it runs. Nothing
within an interpreter stops `'a' * 10**9` or `10 ** (10 ** 9)`, each a single operation; the operating system stops a process.
The child imports jinja2 alone, starts in 0.1 s with the first template, and ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from litmini.errors import UserError

SECONDS = 5
"""Most CPU time of a text; on Windows, of the clock."""
MEBIBYTES = 1024
"""Most memory of the child, on Linux."""
SPARE_CHARACTERS, GROWTH = 1 << 20, 10
"""A text has at most this many characters more than `GROWTH` times those of its messages."""

Parts = list[tuple[int, bool, int | None]]
"""Which texts of a conversation: (how many of its first messages, whether the generation prompt follows them, the number
of a message that is left out, `TOOLS` for the tools)."""
TOOLS = -1
Conversation = tuple[list[Any], list[Any] | None, Parts]
"""Messages, tools as JSON schemas, and the texts that are wanted."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names of a message's reasoning; templates of transformers find it by the first two, whichever the data has."""


class BadTemplate(UserError):
    """A template is not valid jinja or exceeds a limit: its fault and not that of the messages, so a run ends with it."""


def render(
    template: str, conversations: Sequence[Conversation], variables: dict[str, Any], now: datetime
) -> Iterator[str | UserError]:
    """Yield the texts of all parts of all conversations as transformers renders them; an error in place of one that fails.

    One request for many texts costs a tenth of many requests. They come while the next ones are rendered.

    Args:
        variables: such as `bos_token` and `enable_thinking`. They and the messages are values of
            JSON; others are passed as their text.
        now: the time for `strftime_now`.

    Raises:
        BadTemplate: it is not valid jinja, or a text exceeds a limit.
    """
    request: dict[str, Any] = {"template": template, "conversations": conversations, "variables": variables}
    request |= {"now": now.isoformat(), "seconds": SECONDS}
    count = sum(len(parts) for _, _, parts in conversations)
    try:
        line = json.dumps(request, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # of one conversation: the others are rendered
        if len(conversations) == 1:
            yield from [UserError(f"cannot render these messages, which are no JSON: {error}")] * count
        for one in conversations if len(conversations) > 1 else ():
            yield from render(template, [one], variables, now)
        return
    if count:
        yield from _child.ask(line.encode() + b"\n", count)


class _Child:
    """The process that renders. It is started when it is first asked, and again in a fork or after it was ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes, left: int) -> Iterator[str | UserError]:
        """Yield the answers to a request, `left` in number; if not all of them are taken, the process is ended."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _start()
            process = self.process
            assert process.stdin and process.stdout
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()
                while left:
                    answer = process.stdout.readline()
                    if not answer.endswith(b"\n"):
                        raise BadTemplate(_why_ended(process.wait()))
                    left -= 1
                    if left:
                        yield _text(answer)
            finally:
                if left:
                    process.kill()
                    process.wait()
        yield _text(answer)  # unlocked: the caller may never ask whether there is another one


def _start() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from litmini.templates.render import serve; serve()"
    pipe, words = subprocess.PIPE, [sys.executable, "-c", code]
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


def _text(answer: bytes) -> str | UserError:
    text, fault = json.loads(answer)
    if fault == "template":
        raise BadTemplate(text)
    return UserError(text) if fault else text


_child = _Child()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child.__init__)  # type: ignore[misc]


def _why_ended(status: int) -> str:
    if status == TOO_LARGE:
        return f"needs more than {MEBIBYTES:,} MiB of memory, the limit"
    if status == -getattr(signal, "SIGPROF", 0) or not hasattr(signal, "setitimer"):
        return f"takes more than {SECONDS} s on these messages, the limit"
    return f"ended the process that renders it, with status {status}"


TOO_LARGE = 75  # exit status


def serve() -> None:
    """Answer requests, a line each, until the process that asks has ended: a line for each text."""
    # Signals to all processes of a terminal or a job: the one that asks decides when it ends
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ImportError, ValueError, OSError):  # Windows; macOS knows no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES << 20, MEBIBYTES << 20))
    try:
        for line in sys.stdin.buffer:
            sys.setrecursionlimit(5000)  # what the other process could write can be read here
            request = json.loads(line)
            sys.setrecursionlimit(1000)
            for messages, tools, parts in request["conversations"]:
                messages = [_as_templates_expect(message) for message in messages]
                for count, is_prompt, left_out in parts:
                    kept = [message for i, message in enumerate(messages[:count]) if i != left_out]
                    _end_after(request["seconds"])
                    text = _render(request, kept, None if left_out == TOOLS else tools, is_prompt)
                    answer = json.dumps(text).encode()
                    _end_after(0)
                    sys.stdout.buffer.write(answer + b"\n")
                    sys.stdout.buffer.flush()
    except MemoryError:
        os._exit(TOO_LARGE)


def _as_templates_expect(message: Any) -> Any:
    """Return a message without keys that are null, which templates write as "None", with its reasoning by both names."""
    if not isinstance(message, dict):
        return message
    is_call = bool(message.get("tool_calls"))  # beside calls, some templates want a content that is null
    found = {key: value for key, value in message.items() if value is not None or (is_call and key == "content")}
    reasoning = next((found[key] for key in REASONING if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _end_after(seconds: int) -> None:
    """End this process after so many seconds, even within one operation; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return
    import faulthandler

    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _render(request: dict[str, Any], messages: list[Any], tools: list[Any] | None, is_prompt: bool) -> tuple[str, str]:
    """Return a text and "", or what is wrong with it and whose fault that is: "template" or "messages"."""
    from jinja2 import TemplateSyntaxError

    now = datetime.fromisoformat(request["now"])
    variables = {"messages": messages, "add_generation_prompt": is_prompt, "tools": tools, "documents": None}
    pieces, size = [], 0
    try:
        most = SPARE_CHARACTERS + GROWTH * (len(str(messages)) + len(str(tools)))
        stream = _compile(request["template"]).generate(strftime_now=now.strftime, **variables, **request["variables"])
        for piece in stream:
            pieces.append(piece)
            size += len(piece)
            if size > most:
                return f"writes more than {most:,} characters, the limit for these messages", "template"
        "".join(pieces).encode()
    except MemoryError:
        raise
    except UnicodeEncodeError:
        return "writes half a character: a lone \\ud800 to \\udfff escape of these messages or its own", "messages"
    except TemplateSyntaxError as error:
        return f"is not valid jinja: {str(error)[:1000]}", "template"
    except Exception as error:  # a template can fail in any way, and it is data, not our code
        reason = str(error)[:1000].encode("utf-8", "backslashreplace").decode()
        return f"fails on these messages: {reason}", "messages"
    return "".join(pieces), ""


@lru_cache(16)
def _compile(template: str) -> Any:
    """Compile a template with the settings, filters and functions of transformers, for which templates are written."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} ... {% endgeneration %}, with which some templates mark assistant turns; renders the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes HTML
    environment.globals.update(raise_exception=fail)
    return environment.from_string(template)
