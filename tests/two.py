"""Processes on the CPU, for tests: two, one or four run a function, or a script's command line, as `torchrun` starts it.

They come from a server process that has torch already, so starting them costs next to nothing.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch",
    "lightning_fabric",
    "litmini.tasks.measure",
    "litmini.methods.adapters",
    "litmini.tasks.pretrain",
    "litmini.checkpoints.peft",
]
CONTEXT.set_forkserver_preload([*PRELOADED, "bitsandbytes", "jsonargparse", "matplotlib.backends.backend_agg"])


@dataclass
class Ended:
    """How one of the processes ended."""

    status: int | None
    value: Any
    out: str
    err: str


def run_two(
    work: Callable[..., Any], *arguments: Any, timeout: float = 300, devices: int = 2, nodes: int = 1
) -> list[Ended]:
    """`work(*arguments)` on rank 0 and rank 1, on those of several nodes, or in one process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(devices * nodes):
        ours, theirs = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(3)), strict=True)
        process = CONTEXT.Process(
            target=_start, args=(theirs, rank, devices, nodes, port, dict(os.environ), work, arguments)
        )
        process.start()
        for end in theirs:
            end.close()
        said = [_Listener(end) for end in ours[1:]]
        started.append((process, ours[0], said))
    ended = []
    for process, pipe, said in started:
        try:
            value = pipe.recv() if pipe.poll(timeout) else "no answer in time"
        except EOFError:  # it left without a word
            value = None
        process.join(10)
        process.kill()
        process.join()
        ended.append(Ended(process.exitcode, value, *(listener.text() for listener in said)))
    return ended


class _Listener(threading.Thread):
    """Reads what a process prints: no file that it could fill, and no pipe that could be full."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(daemon=True)
        self.pipe, self.read = pipe, b""
        self.start()

    def run(self) -> None:
        while part := os.read(self.pipe.fileno(), 1 << 16):
            self.read += part

    def text(self) -> str:
        self.join(10)  # longer only where what it started lives on
        return self.read.decode()


def values(ended: list[Ended]) -> list[Any]:
    """What the processes returned."""
    assert all(end.status == 0 for end in ended), "\n".join(end.out + end.err for end in ended)
    return [end.value for end in ended]


def _start(
    pipes: tuple[Connection, ...],
    rank: int,
    devices: int,
    nodes: int,
    port: int,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    os.environ.update(environment)  # the server's is that of the first test
    for number in (1, 2):
        os.dup2(pipes[number].fileno(), number)
        pipes[number].close()
    # These were made for files, which can be sought in
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    if devices * nodes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % devices), GROUP_RANK=str(rank // devices))
        os.environ.update(WORLD_SIZE=str(devices * nodes), LOCAL_WORLD_SIZE=str(devices))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    try:
        pipes[0].send(work(*arguments))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def command(script: str, *words: Any) -> None:
    """Run a script's command line in this process."""
    sys.argv = [str(ROOT / f"scripts/{script}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")
