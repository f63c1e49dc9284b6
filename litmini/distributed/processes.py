"""Several processes that speak with one voice and end together: when one fails, it says why, and the others end.

Nothing heavy is imported here: `litmini.cli` asks on every error.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import warnings
from datetime import timedelta
from subprocess import Popen
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

POLL_SECONDS = 0.5
_started: list[Popen[bytes]] = []  # by this process, on this machine
_failures: Any = None  # counts, for all processes, those that failed


def join(fabric: Fabric) -> None:
    """Watch the other processes, and be quiet unless this is the first. To be called after `fabric.launch`."""
    global _failures
    if fabric.world_size == 1:
        return
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _failures = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
    launcher: Any = fabric.strategy.launcher
    if launcher:
        _started.extend(launcher.procs)
        launcher.procs.clear()  # Fabric's own watch would kill this process, too, before it could say why
    threading.Thread(target=_watch_started if _started else _watch_parent, daemon=True, name="watch").start()
    if fabric.global_rank > 0:
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end)
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)  # for errors, but no progress bars


class _NoTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def _watch_started() -> None:
    while True:
        time.sleep(POLL_SECONDS)
        for number, process in enumerate(_started, 1):
            if code := process.poll():
                if first_to_fail():
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                    print(f"error: process {number} {how}. Go on with --resume auto.", file=sys.stderr)
                leave(1)


def _watch_parent() -> None:
    """A process that is left alone would wait for the others for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    print("error: the first process was killed. Go on with --resume auto.", file=sys.stderr)
    leave(1)


def is_first() -> bool:
    """Whether this is the first process, as far as is known before they have met."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")))
    return rank == "0"


def first_to_fail(error: BaseException | None = None) -> bool:
    """Whether this process shall say why it ends: the only one, or the first of several that fail."""
    first = is_first()
    if _failures is None:  # not launched, or not yet: what is wrong is likely wrong for all
        time.sleep(0 if first else 5)
        return True
    if not first:
        time.sleep(1)
    elif isinstance(error, RuntimeError):  # that another process has gone, perhaps: the watch knows which
        time.sleep(3 * POLL_SECONDS)
    try:
        return _failures.add("litmini/failures", 1) == 1
    except RuntimeError:  # the process that counts has gone; it has spoken
        return False


def alone() -> bool:
    return _failures is None


def leave(status: int) -> NoReturn:
    """End this process; after an error at once, as cleaning up would wait for the others, and with those it started."""
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
