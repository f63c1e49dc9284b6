"""The server's log: short lines, and few for one error, whatever a client sends."""

import asyncio
import logging
import os
import queue
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from litmini.errors import UserError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_LINE, MAX_LINES, MAX_WAITING = 300, 40, 1000
"""Letters in a line of the log, lines of one error, and lines that wait to be written."""


def log_error(error: BaseException) -> None:
    """Print an error: its message if a user can do something about it, else its traceback."""
    lines = [f"error: {error}"] if isinstance(error, UserError) else traceback.format_exception(error)
    shown = [line[:MAX_LINE].encode("unicode_escape").decode() for line in "".join(lines).splitlines()]
    print("\n".join(shown[:1] + shown[1:][-MAX_LINES:]), file=sys.stderr, flush=True)


class RequestLog:
    """Writes one line for each request to standard error.

    A thread writes: whoever reads standard error and stops holds up no request. Lines that wait are bounded, others are lost.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write, daemon=True, name="litmini-log")
        self._thread.start()

    def add(self, request: "Request", status: int, what: str) -> None:
        """Log the time, client, path and status of a request, and `what` came of it."""
        client = request.client.host if request.client else "-"
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {request.method} {request.url.path} {status} {what}"
        with suppress(queue.Full):
            self._lines.put_nowait(line[:MAX_LINE].encode("unicode_escape") + b"\n")

    def close(self) -> None:
        """Write what waits, for a second at most."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=1)
            self._thread.join(1)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # closed
                os.write(
                    sys.stderr.fileno(), line
                )  # a print that is stuck would hold a lock that the interpreter needs


class BoundedLog(logging.Filter):
    """Bounds what other libraries log; that a request was cancelled, as at the end of the server, is no error."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        record.exc_info = None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log_error(error)
        record.msg, record.args = record.getMessage()[:MAX_LINE], ()
        return not isinstance(error, asyncio.CancelledError)
