"""A run's directory: configuration, metrics, checkpoints, loss curve and manifest; and what is restored on resuming."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from litmini.config.training import RunConfig
from litmini.data.hub_datasets import PREFIX as HUB
from litmini.distributed.fsdp import is_sharded
from litmini.errors import UserError
from litmini.files import (
    Background,
    check_checksums,
    content_hash,
    discard,
    existing_file,
    read_json,
    restore,
    write_atomically,
    write_json,
    write_text,
)
from litmini.runs.loggers import check_loggers, make_loggers
from litmini.runs.manifest import check_same, describe_run
from litmini.runs.training_state import SHARES, load_state, save_shares, save_state
from litmini.system import lock
from litmini.tokenizer import Tokenizer
from litmini.training.loop import Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PROCESSES = ("devices", "num_nodes", "strategy")
COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_mib", "val_loss")
SAMPLES = "samples.jsonl"
REPORT = "report.html"  # the last thing that a run writes: without it, its result is yet to be measured
MAY_CHANGE = re.compile(  # on resuming; everything else changes what the run means
    r"(resume|dry_run|show_masks|download_from|out_dir|devices|num_nodes|strategy|loggers|eval\.\w+|"
    r"train\.(log_every|eval_every|save_every|keep_last|keep_best|on_nonfinite|micro_batch_size|sample_every|patience))"
)


class Run:
    """The directory of one run, `out/<name>/`.

    Raises:
        UserError: it holds a run already and `config.resume` does not say to go on with it, or says so where nothing is
            to go on with, or the settings differ in what the run means.
    """

    def __init__(self, config: RunConfig) -> None:
        check_loggers(config.loggers)
        self.directory = Path(config.out_dir)
        self.config = config
        self.results: dict[str, Any] = {}
        self.before: dict[str, Any] = {}  # the manifest of the run to go on with
        self.loggers: list[Any] = []
        self.restart_from: Path | None = None
        self.saving = Background()
        """Checkpoints go to disk while training goes on; `saving.wait()` before relying on them."""
        steps = self._steps()
        holds_run = (self.directory / "config.yaml").exists() or bool(steps)
        if config.resume is False:
            if holds_run and not (config.dry_run or config.show_masks):
                raise UserError(
                    f"{self.directory} holds a run already. Go on with it: --resume auto. Or start another: "
                    f"--out_dir {self._free_name()}"
                )
        elif (self.directory / "final").exists() and ((self.directory / REPORT).exists() or not steps):
            raise UserError(
                f"the run in {self.directory} is finished: {self.directory / 'final'} is there. "
                f"Start another: --out_dir {self._free_name()}"
            )
        elif config.resume in (True, "auto"):
            self.restart_from = steps[-1] if steps else None
        else:
            self.restart_from = Path(str(config.resume))
            if not (self.restart_from / "training_state.json").is_file():
                there = ", ".join(str(p) for p in steps) or "none"
                raise UserError(f"{self.restart_from} is no training checkpoint; those of {self.directory}: {there}")
            if holds_run and self.restart_from.resolve().parent != self.directory.resolve():
                raise UserError(f"{self.directory} holds another run. Start a new one: --out_dir {self._free_name()}")
        if self.restart_from:
            self._check_same_meaning(self.restart_from.parent)

    def _steps(self) -> list[Path]:
        """The checkpoints of this run, the oldest first."""
        for old in self.directory.glob(".step-*.old"):  # a process died while it replaced one
            restore(self.directory / old.name[1:].removesuffix(".old"))
        return sorted((p for p in self.directory.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))

    def _free_name(self) -> Path:
        return next(
            p for n in range(2, 10**6) if not (p := self.directory.with_name(f"{self.directory.name}-{n}")).exists()
        )

    def _check_same_meaning(self, run: Path) -> None:
        """Refuse to go on with other settings or data than those that the run in `run` began with."""
        try:
            before, now = _flat(yaml.safe_load((run / "config.yaml").read_text())), _flat(plain(self.config))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"{run / 'config.yaml'}, which {self.restart_from} needs, is damaged: {error}") from None
        self.before = read_json(run / "manifest.json")
        self.results = self.before.get("results", {})
        files = [name for name in self.before.get("data", {}) if not name.startswith(HUB) and "://" not in name]
        hashes = {name: {"sha256": content_hash(existing_file(name, "data file"))} for name in files}
        check_same(self.before, {"data": hashes}, self.restart_from)
        self.other_processes = [f"{k}: {before.get(k)} -> {now[k]}" for k in PROCESSES if before.get(k) != now[k]]
        changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
        if refused := [line for line in changed if not MAY_CHANGE.fullmatch(line.split(":")[0])]:
            raise UserError(f"cannot resume {self.restart_from} with other settings:\n  " + "\n  ".join(refused))

    def begin(
        self, fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer
    ) -> Progress:
        """Make the directory, or restore the state of the checkpoint to go on from.

        Raises:
            UserError: the checkpoint does not fit, or chat template or base weights are others than when the run began.
        """
        self.fabric, self.model, self.optimizer, self.tokenizer = fabric, model, optimizer, tokenizer
        progress = Progress()
        self.facts = describe_run(self.config, fabric, tokenizer)
        if self.restart_from:
            check_same(self.before, self.facts, self.restart_from)
            check_checksums(self.restart_from)
            progress = load_state(self.restart_from, model, optimizer)
            fabric.print(f"going on from {self.restart_from}, after step {progress.step}")
            if self.other_processes:
                fabric.print(
                    f"note: {', '.join(self.other_processes)}. Each step has the same rows, but sums are rounded in another "
                    f"order, and dropout draws other masks: the results are no longer the same to the bit."
                )
        elif self.config.resume:
            fabric.print(f"{self.directory} holds no checkpoint yet: beginning with step 1")
        if fabric.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock(self.directory)
            settings = {**plain(self.config), "resume": False}
            for leftover in self.directory.glob(".*.partial"):  # of a process that died while it saved
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            write_text(self.directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            self._keep_metrics(progress.step)
            self.loggers = make_loggers(self.config.loggers, self.directory, progress.step)
            for logger in self.loggers:
                logger.log_hyperparams(_flat(settings))
        return progress

    def _keep_metrics(self, step: int) -> None:
        """Drop the rows and samples of steps that a killed run did after its last checkpoint; they are done again."""
        file = self.directory / "metrics.csv"
        rows = [row for row in read_metrics(file) if int(row["step"]) <= step] if file.exists() and step else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(file, text.getvalue())
        if samples := [row for row in read_samples(self.directory) if row["step"] <= step]:
            write_text(self.directory / SAMPLES, "".join(json.dumps(row) + "\n" for row in samples))
        else:
            (self.directory / SAMPLES).unlink(missing_ok=True)

    def log(self, metrics: dict[str, float]) -> None:
        """Append a row to metrics.csv, and give it to the loggers."""
        if self.fabric.is_global_zero:
            with (self.directory / "metrics.csv").open("a", newline="") as opened:
                csv.DictWriter(opened, COLUMNS, lineterminator="\n").writerow(metrics)
            for logger in self.loggers:
                logger.log_metrics({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def log_samples(self, step: int, answers: list[dict[str, str]]) -> None:
        """Append what the model said after `step` to samples.jsonl."""
        if self.fabric.is_global_zero:
            with (self.directory / SAMPLES).open("a", encoding="utf-8") as opened:
                opened.writelines(json.dumps({"step": step, **answer}) + "\n" for answer in answers)

    def checkpoint(self, progress: Progress, save_weights: Callable[[Path | None], None]) -> Path:
        """Write `step-NNNNNN/`: the weights for use and the state for going on. Older ones than `keep_last` go.

        It is there once `saving.wait()` returns; what fails on its way to the disk is raised there, or here next time.
        """
        directory = self.directory / f"step-{progress.step:06d}"
        self.saving.wait()
        wait = None
        with self._aside(
            directory, save_weights, later=lambda finish: self.saving(finish, wait), checksums=True
        ) as aside:
            if is_sharded(self.model):
                place = Path(self.fabric.broadcast(str(aside))) / SHARES
                wait = save_shares(place, self.model, self.optimizer)
            if aside:
                save_state(aside, progress, self.model, self.optimizer)
                write_json(aside / "manifest.json", {**self.facts, "progress": dataclasses.asdict(progress)})
            elif wait:
                self.saving(wait)
        if self.fabric.is_global_zero:
            for logger in self.loggers:
                logger.save()
            best = self.directory / f"step-{progress.best_step:06d}" if self.config.train.keep_best else directory
            self.saving(self._drop_old, {directory, best})
        self.fabric.barrier()
        return directory

    def _drop_old(self, kept: set[Path]) -> None:
        for old in self._steps()[: -self.config.train.keep_last]:
            if old not in kept:  # the one just written may be older, where a run went back
                discard(old)

    def save_final(self, save_weights: Callable[[Path | None], None]) -> Path:
        """Write `final/`, the product of the run.

        Args:
            save_weights: every rank calls it, as gathering a sharded model takes them all. It writes the product into the
                directory that it is given: on rank 0; the others are given none.
        """
        directory = self.directory / "final"
        with self._aside(directory, save_weights) as aside:
            if aside:
                write_json(aside / "manifest.json", {**self.facts, "results": self.results})
        self.fabric.barrier()
        return directory

    @contextmanager
    def _aside(self, directory: Path, save_weights: Callable[[Path | None], None], **how: Any) -> Iterator[Path | None]:
        """On rank 0 the directory that will be `directory`, with the product in it; the other ranks help to gather."""
        with write_atomically(directory, **how) if self.fabric.is_global_zero else nullcontext() as aside:
            save_weights(aside)
            if aside:
                self.tokenizer.save(aside)
            yield aside

    def know_data(self, hashes: dict[str, str], **statistics: Any) -> None:
        """Put the data into the manifest: sha256 of each file by name, and statistics.

        Raises:
            UserError: it is other data than when the run to go on with began.
        """
        self.facts |= {"data": {name: {"sha256": sha256} for name, sha256 in hashes.items()}, **statistics}
        check_same(self.before, self.facts, self.restart_from)

    def write_manifest(self, **results: Any) -> None:
        """Write `manifest.json`: what was run, on what, and what was measured."""
        self.results.update(results)
        if self.fabric.is_global_zero:
            write_json(self.directory / "manifest.json", {**self.facts, "results": self.results})
            for logger in self.loggers:
                logger.save()


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of what YAML can hold."""
    return {
        k: list(v) if isinstance(v, tuple) else plain(v) if dataclasses.is_dataclass(v) else v
        for k, v in vars(config).items()
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """What the model said during a run: step, prompt, reference and prediction."""
    file = directory / SAMPLES
    return today_keys([json.loads(line) for line in _whole_lines(file)]) if file.is_file() else []


def today_keys(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rename the keys of samples that a version before wrote."""
    old = {"question": "prompt", "expected": "reference", "given": "prediction"}
    return [{old.get(key, key): value for key, value in sample.items()} for sample in samples]


def read_metrics(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_whole_lines(file)))


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file that grows by lines, but for one that a process left unfinished as it died."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [line for line in opened if line.endswith("\n")]
