"""Limits on open and idle connections.

uvicorn has a setting for neither: `limit_concurrency` answers requests, while connections that send none stay and count; its
`timeout_keep_alive` starts after the first response, and any byte stops it. So its `http` setting takes this class.
"""

import asyncio
import json

FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"


def connection_type(max_connections: int, idle_seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with two limits, for `uvicorn.Config(http=...)`.

    Args:
        max_connections: one more gets status 503 at once.
        idle_seconds: a connection is closed on which no request has begun for so long, counted from its start or from the
            last response; the head of a request that comes byte by byte has not begun.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    content = json.dumps(
        {"error": {"message": f"{max_connections} connections are open.", "type": "rate_limit_error"}}
    ).encode()
    full = FULL + b"Content-Length: %d\r\n\r\n" % len(content) + content

    class Connection(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(full)
                transport.close()
            else:
                self.wait()

        def wait(self) -> None:
            self.stop_waiting()
            self.deadline = self.loop.call_later(idle_seconds, self.transport.close)

        def stop_waiting(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # else the next request was there already
                self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_waiting()
            super().connection_lost(exc)

    return Connection
