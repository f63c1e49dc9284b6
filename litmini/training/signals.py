"""Graceful shutdown: after SIGTERM or Ctrl-C, training finishes the current step and saves before it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from litmini.errors import UserError


class Interrupted(UserError):
    """Training ended by SIGTERM or Ctrl-C, after the current step was finished and saved."""

    def __init__(self, received: list[str], message: str) -> None:
        name = (received or ["SIGTERM"])[0]  # none: another rank received it
        super().__init__(f"{name}: {message}")
        self.status = 128 + signal.Signals[name]


@contextmanager
def graceful_shutdown() -> Iterator[list[str]]:
    """Collect SIGTERM and the first Ctrl-C, so that training can finish its step; a second Ctrl-C ends it at once."""
    received: list[str] = []

    def remember(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
