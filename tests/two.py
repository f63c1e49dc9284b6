"""Two processes on the CPU, or four, for tests: each runs a function, or a script's command line, as `torchrun` starts it.

They come from a server process that has torch already, so starting them costs next to nothing.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning.fabric", "litmini.finetune", "litmini.adapters", "bitsandbytes"])


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
    """`work(*arguments)` on rank 0 and rank 1, or on those of several nodes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as place:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        started = []
        for rank in range(devices * nodes):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_start, args=(theirs, rank, devices, nodes, port, place, work, arguments))
            process.start()
            theirs.close()
            started.append((process, ours))
        ended = []
        for rank, (process, pipe) in enumerate(started):
            try:
                value = pipe.recv() if pipe.poll(timeout) else "no answer in time"
            except EOFError:  # it left without a word
                value = None
            process.join(10)
            process.kill()
            process.join()
            out, err = (Path(place, f"{rank}.{name}").read_text() for name in ("out", "err"))
            ended.append(Ended(process.exitcode, value, out, err))
        return ended


def values(ended: list[Ended]) -> list[Any]:
    """What the processes returned."""
    assert all(end.status == 0 for end in ended), "\n".join(end.out + end.err for end in ended)
    return [end.value for end in ended]


def _start(
    pipe: Connection,
    rank: int,
    devices: int,
    nodes: int,
    port: int,
    place: str,
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % devices), GROUP_RANK=str(rank // devices))
    os.environ.update(WORLD_SIZE=str(devices * nodes), LOCAL_WORLD_SIZE=str(devices))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    try:
        pipe.send(work(*arguments))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def command(script: str, *words: Any) -> None:
    """Run a script's command line in this process."""
    sys.argv = [str(ROOT / f"scripts/{script}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")
