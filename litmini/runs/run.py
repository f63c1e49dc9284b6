"""The record of a run: configuration, metrics, checkpoints and manifest; and the state that resuming restores."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from litmini.distributed.fsdp import is_sharded
from litmini.errors import UserError
from litmini.files import (
    Background,
    check_checksums,
    discard,
    write_atomically,
    write_json,
    write_text,
)
from litmini.runs.directory import RunDirectory, flat, plain
from litmini.runs.manifest import check_same, describe_run
from litmini.runs.training_state import SHARDS, load_state, save_shards, save_state
from litmini.staging import delete_leftovers
from litmini.system import lock
from litmini.tokenizer import Tokenizer
from litmini.training.objective import Batch
from litmini.training.setup import Progress, Recorder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_mib", "val_loss")
SAMPLES = "samples.jsonl"
MEASURES = {
    "val_loss": ("loss", "{:.3f}"),
    "exact_match": ("exact match", "{:.0%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
    "matches": ("completions that match", "{:.0%}"),
    "margin": ("reward margin", "{:.3f}"),
    "logp_chosen": ("log p of chosen", "{:.1f}"),
    "logp_rejected": ("log p of rejected", "{:.1f}"),
    "kl": ("KL to the start", "{:.4f}"),
}
"""Results `KEY_before` and `KEY_after` training on validation data -> their title and format."""
SAME_BITS = ("device", "machine", "instruction_set", "threads")
"""Of the hardware: if one of them differs, so does rounding."""


class Run(Recorder):
    """The record of one run in its directory. Making this object restores the state to resume from and begins to write.

    Attributes:
        progress: of the run; restored, or new.
        results: measurements, for the manifest.

    Raises:
        UserError: the checkpoint does not fit, or chat template, base weights or data changed since the run began.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        fabric: Fabric,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        save_weights: Callable[[Path | None], None],
        hashes: dict[str, str],
        statistics: dict[str, Any],
        names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            save_weights: writes the result of training into a directory on rank 0; the other ranks get None and gather.
            hashes: sha256 of each data file, by name.
            statistics: of the data, for the manifest.
            names: of metrics beyond `COLUMNS`.
        """
        self.columns = [*COLUMNS, *names, *(f"val_{name}" for name in names)]
        self.run_directory, self.config, self.directory = run_directory, run_directory.config, run_directory.directory
        self.fabric, self.model, self.optimizer, self.tokenizer = fabric, model, optimizer, tokenizer
        self.save_weights = save_weights
        self.results: dict[str, Any] = run_directory.before.get("results", {})
        self.loggers: list[Any] = []
        self.saving = Background()  # checkpoints go to disk while training continues
        data = {name: {"sha256": sha256} for name, sha256 in hashes.items()}
        self.facts = {**describe_run(self.config, fabric, tokenizer), "data": data, **statistics}
        self.progress = self._restore() if run_directory.restart_from else Progress()
        if self.config.resume and not run_directory.restart_from:
            fabric.print(f"{self.directory} holds no checkpoint yet: beginning with step 1")
        if fabric.is_global_zero:
            self._begin()

    def _restore(self) -> Progress:
        """Load the state of the checkpoint to resume from."""
        checkpoint = self.run_directory.restart_from
        assert checkpoint is not None
        check_same(self.run_directory.before, self.facts, checkpoint)
        names = self.run_directory.before.get("data", self.facts["data"]).keys()
        if changed := sorted(names ^ self.facts["data"].keys()):
            raise UserError(
                f"cannot resume {checkpoint}: data were added or removed since the run began: {', '.join(changed)}."
            )
        check_checksums(checkpoint)
        progress = load_state(checkpoint, self.model, self.optimizer)
        self.fabric.print(f"resuming from {checkpoint}, after step {progress.step}")
        earlier = self.run_directory.before.get("changed", [])
        if changed := self.run_directory.changed:
            earlier = [*earlier, {"after_step": progress.step, "settings": changed}]
            self.fabric.print(
                f"note: other settings from here on, so this is not what one run gives: {', '.join(changed)}"
            )
        if earlier:
            self.facts |= {"changed": earlier, "bit_identical": False}
        then, now = self.run_directory.before.get("hardware", {}), self.facts.get("hardware", {})
        others = [f"{k}: {then[k]} -> {now[k]}" for k in SAME_BITS if k in then and then[k] != now[k]]
        if others := self.run_directory.other_processes + others:
            self.fabric.print(
                f"note: {', '.join(others)}. Each step has the same sequences, but sums are rounded in another order and "
                f"dropout masks depend on the process: the results are not bit-identical to those of an uninterrupted run."
            )
        return progress

    def _begin(self) -> None:
        """Make the directory, and write the configuration and the metrics so far."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock(self.directory)
        self.run_directory.check_again()
        settings = {**plain(self.config), "resume": False, "resume_changed": False}
        delete_leftovers(self.directory)
        write_text(self.directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self._keep_metrics(self.progress.step)
        if self.config.loggers:
            from litmini.runs.loggers import make_loggers

            self.loggers = make_loggers(self.config.loggers, self.directory, self.progress.step)
        for logger in self.loggers:
            logger.log_hyperparams(flat(settings))

    def _keep_metrics(self, step: int) -> None:
        """Drop the metrics and samples of steps after the last checkpoint of a killed run; these steps run again."""
        file = self.directory / "metrics.csv"
        rows = [row for row in read_metrics(file) if int(row["step"]) <= step] if file.exists() and step else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(file, text.getvalue())
        if samples := [row for row in read_samples(self.directory) if row["step"] <= step]:
            write_text(self.directory / SAMPLES, "".join(json.dumps(row) + "\n" for row in samples))
        else:
            (self.directory / SAMPLES).unlink(missing_ok=True)

    def log(self, metrics: dict[str, float]) -> None:
        """Append a row to metrics.csv, and pass it to the loggers."""
        if self.fabric.is_global_zero:
            with (self.directory / "metrics.csv").open("a", newline="") as opened:
                csv.DictWriter(opened, self.columns, lineterminator="\n").writerow(metrics)
            for logger in self.loggers:
                logger.log_metrics({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def log_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Append the completions after `step` to samples.jsonl."""
        if self.fabric.is_global_zero:
            with (self.directory / SAMPLES).open("a", encoding="utf-8") as opened:
                opened.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def checkpoint(self, progress: Progress) -> Path:
        """Write `step-NNNNNN/`: the weights and the state to resume from. Delete all but the `keep_last` last checkpoints.

        It is complete after `wait` returns; `wait`, or the next call of this, raises the errors of writing.
        """
        directory = self.directory / f"step-{progress.step:06d}"
        self.saving.wait()
        wait = None
        with self._result_directory(directory, later=lambda finish: self.saving(finish, wait), checksums=True) as aside:
            if is_sharded(self.model):
                target = Path(self.fabric.broadcast(str(aside))) / SHARDS
                wait = save_shards(target, self.model, self.optimizer)
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
        for old in self.run_directory.checkpoints()[: -self.config.train.keep_last]:
            if old not in kept:  # the newest may have a lower number if the run resumed from an earlier step
                discard(old)

    def wait(self) -> None:
        """Wait until the checkpoints are on disk."""
        self.saving.wait()

    def save_nonfinite_step(
        self, step: int, micro_batches: list[Batch], losses: list[float], locations: Callable[[], list[list[str]]]
    ) -> str:
        """Write `bad-step-NNNNNN.json`; see `litmini.runs.nonfinite`."""
        from litmini.runs.nonfinite import save_nonfinite_step

        return save_nonfinite_step(self.fabric, self.directory, step, micro_batches, losses, self.tokenizer, locations)

    def save_final(self) -> Path:
        """Write `final/`, the result of the run. Every rank calls this."""
        directory = self.directory / "final"
        with self._result_directory(directory) as aside:
            if aside:
                write_json(aside / "manifest.json", {**self.facts, "results": self.results})
        self.fabric.barrier()
        return directory

    @contextmanager
    def _result_directory(self, directory: Path, **how: Any) -> Iterator[Path | None]:
        """Write the result into a temporary directory, yield it on rank 0, and rename it; the other ranks gather."""
        with write_atomically(directory, **how) if self.fabric.is_global_zero else nullcontext() as aside:
            self.save_weights(aside)
            if aside:
                self.tokenizer.save(aside)
            yield aside

    def write_manifest(self, **results: Any) -> None:
        """Write `manifest.json`: the description of the run, and its results so far."""
        self.results.update(results)
        if self.fabric.is_global_zero:
            write_json(self.directory / "manifest.json", {**self.facts, "results": self.results})
            for logger in self.loggers:
                logger.save()


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Return the completions during a run: step, prompt, reference and prediction."""
    file = directory / SAMPLES
    return today_keys([json.loads(line) for line in _whole_lines(file)]) if file.is_file() else []


def today_keys(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples with the keys of today, also if an earlier version wrote them."""
    old = {"question": "prompt", "expected": "reference", "given": "prediction"}
    return [{old.get(key, key): value for key, value in sample.items()} for sample in samples]


def read_metrics(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_whole_lines(file)))


def _whole_lines(file: Path) -> list[str]:
    """Return the lines of a file, without an incomplete last one that a killed process left."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [line for line in opened if line.endswith("\n")]
