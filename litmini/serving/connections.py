"""Limits on open and idle connections, and on those whose client does not read.

uvicorn has a setting for none of them: `limit_concurrency` answers requests, while connections that send none stay and
count; its `timeout_keep_alive` starts after the first response, and any byte stops it. So its `http` setting takes this class.
"""

import asyncio
import json
import socket
from typing import Any

FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
SEND_BUFFER = 256 * 1024
"""Bytes that the operating system keeps for a client; by default it may be several MiB."""
PROGRESS = 16 * 1024
"""Bytes that a client must read in `write_seconds` while there are more."""


class LimitedConnection:
    """The limits of one connection, to be put before uvicorn's protocol in the order of bases."""

    max_connections: int
    """One more gets status 503 at once."""
    idle_seconds: float
    """A connection is closed on which no request has begun for so long, counted from its start or from the last response; the
    head of a request that comes byte by byte has not begun."""
    write_seconds: float
    """A connection is closed whose client has read less than `PROGRESS` bytes of a response in so long, with bytes left."""
    full: bytes
    """The response to one connection too many."""
    deadline: asyncio.TimerHandle | None = None
    write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # pause_writing comes as soon as bytes are left, resume_writing when none are
        transport.set_write_buffer_limits(0)
        if len(self.connections) > self.max_connections:
            transport.write(self.full)
            transport.close()
        else:
            self.wait()

    def wait(self: Any) -> None:
        self.stop_waiting()
        self.deadline = self.loop.call_later(self.idle_seconds, self.transport.close)

    def stop_waiting(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self.check_reader(None)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self.stop_checking()

    def check_reader(self: Any, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and before - left < PROGRESS:
            self.transport.abort()
        else:
            self.write_deadline = self.loop.call_later(self.write_seconds, self.check_reader, left)

    def stop_checking(self) -> None:
        if self.write_deadline is not None:
            self.write_deadline.cancel()
            self.write_deadline = None

    def data_received(self: Any, data: bytes) -> None:
        import h11

        try:
            super().data_received(data)  # type: ignore[misc]
        except h11.LocalProtocolError:  # an invalid request during the response to another
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:
            self.stop_waiting()

    def on_response_complete(self: Any) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if self.cycle.response_complete:  # else the next request was there already
            self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        self.stop_checking()
        super().connection_lost(exc)  # type: ignore[misc]


def connection_type(max_connections: int, idle_seconds: float, write_seconds: float = 20.0) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with the limits of `LimitedConnection`, for `uvicorn.Config(http=...)`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    error = {"message": f"{max_connections} connections are open.", "type": "rate_limit_error"}
    content = json.dumps({"error": error}).encode()
    limits = {
        "max_connections": max_connections,
        "idle_seconds": idle_seconds,
        "write_seconds": write_seconds,
        "full": FULL + b"Content-Length: %d\r\n\r\n" % len(content) + content,
    }
    return type("Connection", (LimitedConnection, H11Protocol), limits)
