"""The server's log: short lines, and few for one error, whatever a client sends."""

import asyncio
import logging
import sys
import time
import traceback
from typing import TYPE_CHECKING

from litmini.errors import UserError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_LINE, MAX_LINES = 300, 40
"""Letters in a line of the log, and lines of one error."""


def log_error(error: BaseException) -> None:
    """Print an error: its message if a user can do something about it, else its traceback."""
    lines = [f"error: {error}"] if isinstance(error, UserError) else traceback.format_exception(error)
    shown = [line[:MAX_LINE].encode("unicode_escape").decode() for line in "".join(lines).splitlines()]
    print("\n".join(shown[:1] + shown[1:][-MAX_LINES:]), file=sys.stderr, flush=True)


def log_request(request: "Request", status: int, what: str) -> None:
    """Print one line for a request: time, client, path, status, and `what` came of it."""
    client = request.client.host if request.client else "-"
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {request.method} {request.url.path} {status} {what}"
    print(line[:MAX_LINE].encode("unicode_escape").decode(), file=sys.stderr, flush=True)


class BoundedLog(logging.Filter):
    """Bounds what other libraries log; that a request was cancelled, as at the end of the server, is no error."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        record.exc_info = None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log_error(error)
        record.msg, record.args = record.getMessage()[:MAX_LINE], ()
        return not isinstance(error, asyncio.CancelledError)
