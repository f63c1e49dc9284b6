"""The processes of one run: only the first one prints, one of them reports an error, and all end together; signals end
training after its current step.

torchrun and Fabric end all ranks as well, but with SIGKILL, before the first one can report which process failed; and
Fabric's processes outlive the process that started them. Nothing heavy is imported here: `litmini.cli` calls this on every
error.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen
from typing import TYPE_CHECKING, Any, NoReturn

from litmini.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

POLL_SECONDS = 0.5
_started: list[Popen[bytes]] = []  # the processes that Fabric started from this one, on this machine
_failures: Any = None  # a store that counts the failed processes of all ranks


def join(fabric: Fabric) -> None:
    """Watch the other processes, and print only in the first one. Call this after `fabric.launch`."""
    global _failures
    if fabric.world_size == 1:
        return
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _failures = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
    launcher: Any = fabric.strategy.launcher
    if launcher:
        _started.extend(launcher.procs)
        launcher.procs.clear()  # else Fabric kills this process before it can report the error
    if _started or fabric.local_rank > 0:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="watch").start()
    if fabric.global_rank > 0:
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open until this process ends)
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)  # errors, but no progress bars


class _NoTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def _watch(parent: int) -> None:
    """End this process when a process that it started fails or, if it started none, when its parent ends."""
    problem = ""
    while not problem:
        time.sleep(POLL_SECONDS)
        for number, process in enumerate(_started, 1):
            if code := process.poll():
                problem = f"process {number} " + (f"was killed by signal {-code}" if code < 0 else f"ended with {code}")
        if not _started and os.getppid() != parent:
            problem = "the first process was killed"
    if not _started or first_to_fail():
        print(f"error: {problem}. Continue with --resume auto.", file=sys.stderr)
    leave(1)


def is_first() -> bool:
    """Return whether this is the first process, from the environment."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")))
    return rank == "0"


def first_to_fail(error: BaseException | None = None) -> bool:
    """Return whether this process must report its error: it is the only process, or the first of several that fail."""
    first = is_first()
    if _failures is None:  # before `join`: all processes probably have the same error
        time.sleep(0 if first else 5)
        return True
    if not first:
        time.sleep(1)
    elif isinstance(error, RuntimeError):  # perhaps a lost connection to a process whose failure `_watch` reports
        time.sleep(3 * POLL_SECONDS)
    try:
        return _failures.add("litmini/failures", 1) == 1
    except RuntimeError:  # the first process, which has the store, has ended with its error
        return False


def alone() -> bool:
    return _failures is None


def leave(status: int) -> NoReturn:
    """End this process; after an error, end those that it started at once, as cleaning up would wait for them."""
    if status and not alone():
        for process in _started:
            process.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if not alone():
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        for process in _started:
            process.wait()
    sys.exit(status)


class Interrupted(UserError):
    """Training ended by SIGTERM or Ctrl-C, after the current step was finished and saved."""

    title = ""  # it is what the user asked for

    def __init__(self, received: list[str], message: str) -> None:
        name = (received or ["SIGTERM"])[0]  # none: another rank received it
        super().__init__(f"{'interrupted' if name == 'SIGINT' else name}: {message}")
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
