"""The runs of a sweep: processes of their own, a few at once, each in a run directory."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from litmini.distributed.processes import Interrupted, graceful_shutdown
from litmini.errors import UserError
from litmini.files import read_json
from litmini.runs.directory import REPORT
from litmini.runs.run import read_metrics
from litmini.system import cpu_count

PAUSE = 0.2  # seconds between looks at the runs


class Process(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Return its exit status; None: it still runs."""
        ...

    def terminate(self) -> None: ...


@dataclass
class Outcome:
    """What came of a run."""

    name: str
    number: int
    """Of its choice."""
    choice: dict[str, Any]
    seed: int | None
    status: str = "waiting"
    """waiting, running, done, failed or pruned."""
    value: float | None = None
    """What is compared; of a pruned run its last validation loss."""
    step: int | None = None
    """At which a run was pruned."""
    why: str = ""
    """Why it failed."""
    results: dict[str, Any] = field(default_factory=dict)
    """Numbers of its manifest."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_outcome(outcome: Outcome, directory: Path, metric: str) -> Outcome:
    """Set what a finished run measured; it failed if `metric` is no finite number."""
    results = read_json(directory / "manifest.json").get("results", {})
    value = results.get(f"{metric}_after")
    outcome.results = {name: v for name, v in results.items() if isinstance(v, (int, float))}
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        measured = sorted(name.removesuffix("_after") for name in outcome.results if name.endswith("_after"))
        outcome.status, outcome.why = "failed", f"{metric} is {value}; measured: {', '.join(measured) or 'nothing'}"
    else:
        outcome.status, outcome.value, outcome.why = "done", float(value), ""
    return outcome


def is_finished(directory: Path) -> bool:
    """Whether a run has written its last file."""
    return (directory / REPORT).exists()


def starting_words(words: list[str], directory: Path) -> list[str]:
    """Return the words of a run; one that was interrupted is resumed."""
    return [*words, "--resume", "auto"] if (directory / "config.yaml").exists() else words


def start(script: Path, words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run whose output goes to `log`, out of reach of a terminal's Ctrl-C: `run_all` ends it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, str(script), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def environments(jobs: int, devices: int, gpus: list[str]) -> list[dict[str, str]]:
    """Return the environment of each of the runs at once: its GPUs, in turns; without any, its share of the cores.

    Args:
        devices: of one run.
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """
    if gpus:
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[(job * devices + i) % len(gpus)] for i in range(devices))}
            for job in range(jobs)
        ]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, cpu_count() // (jobs * devices)))}] * jobs


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that runs may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class Curves:
    """The validation losses of runs, for the median rule."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.seen: dict[str, dict[int, float]] = {}

    def read(self, name: str, directory: Path) -> list[tuple[int, float]]:
        """Return the (step, loss) of a run that are new."""
        known = self.seen.setdefault(name, {})
        try:
            rows = read_metrics(directory / "metrics.csv")
            found = {int(row["step"]): float(row["val_loss"]) for row in rows if row.get("val_loss")}
        except (OSError, UserError, ValueError, KeyError, TypeError):  # being written
            return []
        fresh = [(step, loss) for step, loss in sorted(found.items()) if step not in known]
        known.update(found)
        return fresh

    def is_behind(self, name: str, step: int, loss: float) -> bool:
        """Whether a loss is above the median of what the others had after as many steps, or no number."""
        others = [curve[step] for other, curve in self.seen.items() if other != name and step in curve]
        others = [one for one in others if math.isfinite(one)]
        return len(others) >= self.after and not loss <= statistics.median(others)


@dataclass
class Job:
    """A run in its process."""

    outcome: Outcome
    process: Process
    slot: int
    is_pruned: bool = False


def run_all(
    outcomes: Iterable[tuple[Outcome, list[str]]],
    out_dir: Path,
    metric: str,
    environment: list[dict[str, str]],
    begin: Callable[[Outcome, list[str], dict[str, str]], Process],
    curves: Curves | None = None,
) -> Iterator[Outcome]:
    """Run what has not run yet, as many at once as there are environments; yield each outcome as it comes.

    Args:
        outcomes: with the words of each; taken one by one, as there is room for a run.
        begin: starts a run.
        curves: stop the runs that are behind; None: none is stopped.

    Raises:
        Interrupted: by SIGTERM or Ctrl-C; the runs have saved their state.
    """
    waiting = iter(outcomes)
    free, jobs, more = list(range(len(environment))), list[Job](), True
    with graceful_shutdown() as received:
        while more or jobs:
            while more and free and not received:
                given = next(waiting, None)
                if given is None:
                    more = False
                    break
                outcome, words = given
                if curves is not None:
                    curves.read(outcome.name, out_dir / outcome.name)
                if outcome.status == "waiting":
                    slot = free.pop(0)
                    outcome.status = "running"
                    jobs.append(Job(outcome, begin(outcome, words, environment[slot]), slot))
                    yield outcome
                else:
                    yield outcome
            if received:
                _stop(jobs)
                raise Interrupted(received, "the runs have saved their state. Repeat the command to continue")
            ended = [job for job in jobs if job.process.poll() is not None]
            for job in ended:
                jobs.remove(job)
                free = sorted([*free, job.slot])
                yield _ended(job, out_dir, metric)
            if curves is not None:
                _prune(jobs, out_dir, curves)
            if jobs and not ended:
                time.sleep(PAUSE)


def _stop(jobs: list[Job]) -> None:
    """End the runs that still run, and wait until they have saved their state."""
    for job in jobs:
        job.process.terminate()
    for job in jobs:
        while job.process.poll() is None:
            time.sleep(PAUSE)


def _prune(jobs: list[Job], out_dir: Path, curves: Curves) -> None:
    for job in jobs:
        name = job.outcome.name
        for step, loss in curves.read(name, out_dir / name):
            if not job.is_pruned and curves.is_behind(name, step, loss):
                job.is_pruned, job.outcome.step, job.outcome.value = True, step, loss
                job.process.terminate()


def _ended(job: Job, out_dir: Path, metric: str) -> Outcome:
    outcome, directory = job.outcome, out_dir / job.outcome.name
    status = job.process.poll()
    if status == 0 and is_finished(directory):
        outcome.step = None
        return read_outcome(outcome, directory, metric)
    if job.is_pruned:
        outcome.status = "pruned"
        return outcome
    outcome.status, outcome.why = "failed", _last_line(out_dir / f"{outcome.name}.log", status)
    return outcome


def _last_line(log: Path, status: int | None) -> str:
    """Return what a run said last, or how it ended."""
    ended = f"ended by signal {-status}" if status is not None and status < 0 else f"status {status}"
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    return f"{ended}: {said.strip()[:300]}" if said and (status or 0) >= 0 else ended
