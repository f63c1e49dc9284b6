"""A run's directory: configuration, metrics, checkpoints, loss curve and manifest; and what is restored on resuming."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

import litmini
from litmini.checkpoint import read_tensors, write_tensors
from litmini.config import FinetuneConfig, UserError
from litmini.data import Examples
from litmini.files import (
    Background,
    check_seal,
    discard,
    existing_file,
    file_hash,
    hold,
    read_json,
    restore,
    write_aside,
    write_json,
    write_text,
)
from litmini.tokenizer import Tokenizer
from litmini.train import Progress

if TYPE_CHECKING:
    from lightning.fabric import Fabric

COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "val_loss")
MAY_CHANGE = re.compile(  # on resuming; everything else changes what the run means
    r"(resume|dry_run|show_masks|download_from|out_dir|eval\.\w+|train\.(log_every|eval_every|save_every|keep_last|"
    r"keep_best|on_nonfinite))"
)


class Run:
    """The directory of one run, `out/<name>/`.

    Raises:
        UserError: it holds a run already and `config.resume` does not say to go on with it, or says so where nothing is
            to go on with, or the settings differ in what the run means.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.directory = Path(config.out_dir)
        self.config = config
        self.results: dict[str, Any] = {}
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
        elif (self.directory / "final").exists():
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
        self.results = read_json(run / "manifest.json").get("results", {})
        for name, entry in read_json(run / "manifest.json").get("data", {}).items():
            if file_hash(str(existing_file(name, "data file"))) != entry["sha256"]:
                raise UserError(f"cannot resume {self.restart_from}: {name} was changed since the run began.")
        changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
        if refused := [line for line in changed if not MAY_CHANGE.fullmatch(line.split(":")[0])]:
            raise UserError(f"cannot resume {self.restart_from} with other settings:\n  " + "\n  ".join(refused))

    def begin(
        self, fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer
    ) -> Progress:
        """Make the directory, or restore the state of the checkpoint to go on from.

        Raises:
            UserError: the checkpoint does not fit, or the chat template is another than when the run began.
        """
        self.fabric, self.model, self.optimizer = fabric, model, optimizer
        progress = Progress()
        if self.restart_from:
            if read_json(self.restart_from.parent / "manifest.json")["chat_template_sha256"] != _template_hash(
                tokenizer
            ):
                raise UserError(
                    f"cannot resume {self.restart_from}: the chat template was changed since the run began."
                )
            check_seal(self.restart_from)
            progress = load_state(self.restart_from, model, optimizer)
            fabric.print(f"going on from {self.restart_from}, after step {progress.step}")
        elif self.config.resume:
            fabric.print(f"{self.directory} holds no checkpoint yet: beginning with step 1")
        if fabric.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            hold(self.directory)
            settings = {**plain(self.config), "resume": False}
            for leftover in self.directory.glob(".*.partial"):  # of a process that died while it saved
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            write_text(self.directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            self._keep_metrics(progress.step)
        return progress

    def _keep_metrics(self, step: int) -> None:
        """Drop the rows of steps that a killed run did after its last checkpoint; they are done again."""
        file = self.directory / "metrics.csv"
        rows = [row for row in read_metrics(file) if int(row["step"]) <= step] if file.exists() and step else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(file, text.getvalue())

    def log(self, metrics: dict[str, float]) -> None:
        """Append a row to metrics.csv."""
        if self.fabric.is_global_zero:
            with (self.directory / "metrics.csv").open("a", newline="") as opened:
                csv.DictWriter(opened, COLUMNS, lineterminator="\n").writerow(metrics)

    def checkpoint(self, progress: Progress, save_weights: Callable[[Path], None]) -> Path:
        """Write `step-NNNNNN/`: the weights for use and the state for going on. Older ones than `keep_last` go.

        It is there once `saving.wait()` returns; what fails on its way to the disk is raised there, or here next time.
        """
        directory = self.directory / f"step-{progress.step:06d}"
        best = self.directory / f"step-{progress.best_step:06d}" if self.config.train.keep_best else directory

        if self.fabric.is_global_zero:
            self.saving.wait()
            with write_aside(directory, later=self.saving, sealed=True) as aside:
                save_weights(aside)
                save_state(aside, progress, self.model, self.optimizer)
            self.saving(self._drop_old, {directory, best})
        self.fabric.barrier()
        return directory

    def _drop_old(self, kept: set[Path]) -> None:
        for old in self._steps()[: -self.config.train.keep_last]:
            if old not in kept:  # the one just written may be older, where a run went back
                discard(old)

    def save_final(self, save_weights: Callable[[Path], None]) -> Path:
        """Write `final/`, the product of the run."""
        directory = self.directory / "final"
        if self.fabric.is_global_zero:
            with write_aside(directory) as aside:
                save_weights(aside)
        self.fabric.barrier()
        return directory

    def write_manifest(self, tokenizer: Tokenizer, train: Examples, **results: Any) -> None:
        """Write `manifest.json`: what was run, on what, and what was measured."""
        self.results.update(results)
        if not self.fabric.is_global_zero:
            return
        config, source = self.config, Path(self.config.checkpoint_dir) / "source.json"
        files = [config.data.path] + ([config.data.val_path] if config.data.val_path else [])
        packages = ("torch", "lightning", "safetensors", "tokenizers", "jinja2")
        manifest = {
            "litmini": litmini.__version__,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {
                "device": str(self.fabric.device),
                "processes": self.fabric.world_size,
                "machine": platform.machine(),
            },
            "base": {
                "checkpoint_dir": config.checkpoint_dir,
                "source": read_json(source) if source.is_file() else None,
            },
            "chat_template_sha256": _template_hash(tokenizer),
            "data": {file: {"sha256": file_hash(file)} for file in files},
            "statistics": train.statistics,
            "seed": config.seed,
            "results": self.results,
        }
        write_json(self.directory / "manifest.json", manifest)


def _template_hash(tokenizer: Tokenizer) -> str | None:
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


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


def save_state(directory: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trainable parameters and optimizer state, by parameter name; nothing else of a run has state."""
    tensors: dict[str, torch.Tensor] = {}
    scalars, pointers = {}, set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameter/{name}"] = parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    seen = value.data_ptr() in pointers  # bitsandbytes shares its quantisation maps: one copy each
                    tensors[f"{key}/{name}"] = value.clone() if seen else value
                    pointers.add(value.data_ptr())
                else:
                    scalars[f"{key}/{name}"] = value
    write_tensors(directory / "training_state.safetensors", tensors)
    write_json(directory / "training_state.json", {"progress": dataclasses.asdict(progress), "optimizer": scalars})


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore what `save_state` wrote, bit by bit.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    try:
        saved = read_json(directory / "training_state.json")
        progress, numbers = Progress(**saved["progress"]), dict(saved["optimizer"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{directory / 'training_state.json'} is damaged; resume from another step-*.") from None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[str, dict[str, Any]] = {name: {} for name in trainable}
    found = set()
    for entry, value in [*read_tensors([directory / "training_state.safetensors"]), *numbers.items()]:
        key, _, name = entry.partition("/")
        if name not in trainable or (key == "parameter" and value.shape != trainable[name].shape):
            raise UserError(f"{directory} is of another model: {name} does not fit.")
        if key == "parameter":
            found.add(name)
            trainable[name].data.copy_(value)
        else:
            state[name][key] = value
    if missing := sorted(trainable.keys() - found):
        raise UserError(f"{directory} is of another model: it lacks {', '.join(missing[:5])}.")
    for name, parameter in trainable.items():
        if state[name]:
            optimizer.state[parameter] = {
                k: v.to(parameter.device) if isinstance(v, torch.Tensor) else v for k, v in state[name].items()
            }
    return progress


def read_metrics(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def plot_metrics(directory: Path, results: dict[str, Any]) -> None:
    """Draw a run's loss curve, training and held-out, into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(directory / "metrics.csv")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats a target token)", title=directory.name)
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], label="training", linewidth=1.2)
    held_out = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    if "val_loss_after" in results:
        held_out = [(0, results["val_loss_before"]), *held_out, (int(rows[-1]["step"]), results["val_loss_after"])]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held-out")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
