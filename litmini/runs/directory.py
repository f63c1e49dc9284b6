"""The run directory, checked before anything is loaded: a new directory, or one to resume from."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from litmini.config.training import RunConfig
from litmini.errors import UserError
from litmini.files import content_hash, read_json
from litmini.runs.manifest import check_same
from litmini.staging import restore_all
from litmini.system import outlive_readers

PROCESSES = ("devices", "num_nodes", "strategy")
REPORT = "report.html"  # the last file that a run writes: without it, the result has not been measured
WRITTEN = re.compile(  # by a run, in its directory
    r"config\.yaml|manifest\.json|metrics\.csv|samples\.jsonl|(loss|reward)\.png|rewards(-rank-\d+)?\.log|report\.html|final|"
    r"(bad-)?step-.*|tensorboard|wandb.*"
)
MAY_CHANGE = re.compile(  # on resuming; any other setting changes the result of the run
    r"(resume|resume_changed|dry_run|show_masks|download_from|out_dir|devices|num_nodes|strategy|loggers|eval\.\w+|"
    r"train\.(log_every|eval_every|save_every|keep_last|keep_best|on_nonfinite|micro_batch_size|sample_every|patience))"
)

IF_ASKED = re.compile(  # with --resume_changed: what changes the result, and leaves what the run has learned as it is
    r"(train\.(epochs|max_steps)|optim\.(lr|min_lr|schedule|decay_fraction|warmup_steps|weight_decay|betas|max_grad_norm)|"
    r"lora\.(dropout|plus_ratio)|compile|attention|float32_matmul_precision)"
)
CHOSEN = ("compile", "data.max_seq_len", "train.global_batch_size")  # null: the run chooses them, and saves its choice


class RunDirectory:
    """The directory of one run, `out/<name>/`. Making this object writes nothing.

    Attributes:
        restart_from: the checkpoint to resume from; None: the run begins with its first step.
        before: the manifest of the run to resume.
        other_processes: settings of devices and strategy that differ from those of the run to resume.
        changed: settings that change its result, and differ from those of the run to resume (`resume_changed`).

    Raises:
        UserError: the directory already holds a run and `config.resume` is false; it holds what a run would overwrite and no
            run has written; there is nothing to resume; or settings differ that change the result of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.loggers:
            from litmini.runs.loggers import check_loggers

            check_loggers(config.loggers)
        outlive_readers()
        self.directory = Path(config.out_dir)
        self.config = config
        self.before: dict[str, Any] = {}
        self.other_processes: list[str] = []
        self.changed: list[str] = []
        self.restart_from = self._find_restart(self.checkpoints())
        if self.restart_from:
            self._check_same_meaning(self.restart_from.parent)

    def _find_restart(self, steps: list[Path]) -> Path | None:
        config = self.config
        holds_run = (self.directory / "config.yaml").exists() or bool(steps)
        if not (config.dry_run or config.show_masks or (holds_run and config.resume is False)):
            self._check_ours(bool(steps) or self._has_settings())
        if config.resume is False:
            if holds_run and not (config.dry_run or config.show_masks):
                raise UserError(
                    f"{self.directory} already holds a run. Resume it: --resume auto. Or start another: "
                    f"--out_dir {self._free_name()}"
                )
            return None
        finished = (self.directory / "final").exists() and ((self.directory / REPORT).exists() or not steps)
        if finished and not (config.resume_changed and steps):
            raise UserError(self._how_to_go_on(steps))
        if config.resume in (True, "auto"):
            return steps[-1] if steps else None
        chosen = Path(str(config.resume))
        if not (chosen / "training_state.json").is_file():
            existing = ", ".join(str(p) for p in steps) or "none"
            raise UserError(f"{chosen} is not a training checkpoint; those of {self.directory}: {existing}")
        if holds_run and chosen.resolve().parent != self.directory.resolve():
            raise UserError(f"{self.directory} holds another run. Start a new one: --out_dir {self._free_name()}")
        return chosen

    def _how_to_go_on(self, steps: list[Path]) -> str:
        """Return what to type for more training of a run that is finished."""
        final = self.directory / "final"
        is_adapter = (final / "adapter_config.json").is_file()
        start = "--adapter_dir" if is_adapter else "--checkpoint_dir"
        more = f"Start another from its result: {start} {final} --out_dir {self._free_name()}"
        if steps:
            more += f". Or train on from {steps[-1]}: --resume auto --resume_changed true, with more --train.epochs"
        return f"the run in {self.directory} is finished: {final} exists. {more}"

    @property
    def began(self) -> datetime | None:
        """When the run to resume began; None: unknown, or a new run. Its templates go on to write that time."""
        try:
            return datetime.fromisoformat(self.before["began"])
        except (KeyError, TypeError, ValueError):
            return None

    def _check_ours(self, holds_run: bool) -> None:
        """Raise UserError if the directory holds anything that a run would overwrite, and that no run has written."""
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"out_dir {self.directory} is a file; choose another: --out_dir {self._free_name()}")
        existing = sorted(self.directory.iterdir()) if self.directory.is_dir() else []
        written = [path for path in existing if WRITTEN.fullmatch(path.name)]
        ours = {"step": "training_state.json", "final": "manifest.json"}
        if holds_run:  # what stands there is the run's, but directories that it would replace
            made = [path for path in written if path.name == "final" or re.fullmatch(r"step-\d+", path.name)]
            written = [path for path in made if not (path / ours[path.name.partition("-")[0]]).is_file()]
        if written:
            names = ", ".join(path.name for path in written[:5])
            raise UserError(
                f"{self.directory} holds {names}, which a run would overwrite and no run has written; move that away, or "
                f"choose another: --out_dir {self._free_name()}"
            )

    def _has_settings(self) -> bool:
        """Whether config.yaml is that of a run."""
        try:
            return "out_dir" in yaml.safe_load((self.directory / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return False

    def check_again(self) -> None:
        """Check once more, when the directory is locked: another process may have written a run there meanwhile."""
        if (found := self._find_restart(self.checkpoints())) != self.restart_from:
            raise UserError(f"another process has saved {found} in {self.directory} meanwhile; start this one again.")

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of this run, oldest first."""
        restore_all(self.directory)
        steps = (p for p in self.directory.glob("step-*") if p.name[5:].isdigit())
        return sorted((p for p in steps if (p / "training_state.json").is_file()), key=lambda p: int(p.name[5:]))

    def _free_name(self) -> Path:
        return next(
            p for n in range(2, 10**6) if not (p := self.directory.with_name(f"{self.directory.name}-{n}")).exists()
        )

    def _check_same_meaning(self, run: Path) -> None:
        """Raise UserError if settings or data differ from those that the run in `run` began with."""
        try:
            before, now = flat(yaml.safe_load((run / "config.yaml").read_text())), flat(plain(self.config))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"{run / 'config.yaml'} is damaged, and {self.restart_from} needs it: {error}") from None
        before = {**{name: value for name, value in flat(defaults(self.config)).items() if name in now}, **before}
        for name in CHOSEN:  # as before, also where an older version had another default
            if now.get(name, 0) is None:
                now[name] = before[name]
                put(self.config, name, before[name])
        self.before = read_json(run / "manifest.json")
        # the others are data sets of the hub
        files = [name for name in self.before.get("data", {}) if Path(name).is_file()]
        hashes = {name: {"sha256": content_hash(Path(name))} for name in files}
        check_same(self.before, {"data": hashes}, self.restart_from)
        self.other_processes = [f"{k}: {before.get(k)} -> {now[k]}" for k in PROCESSES if before.get(k) != now[k]]
        changed = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
        self.changed = [line for line in changed if not MAY_CHANGE.fullmatch(line.split(":")[0])]
        never = [line for line in self.changed if not IF_ASKED.fullmatch(line.split(":")[0])]
        if never or (self.changed and not self.config.resume_changed):
            advice = "To train on with them, which is another run from here on: --resume_changed true"
            if never:
                advice = f"Start another run with them: --out_dir {self._free_name()}"
            listed = "\n  ".join(never if self.config.resume_changed else self.changed)
            raise UserError(f"cannot resume {self.restart_from} with other settings:\n  {listed}\n{advice}")


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as a dictionary of YAML types."""
    return {
        k: list(v) if isinstance(v, tuple) else plain(v) if dataclasses.is_dataclass(v) else v
        for k, v in vars(config).items()
    }


def put(config: Any, name: str, value: Any) -> None:
    """Set the setting with a dotted name."""
    *groups, last = name.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, last, value)


def defaults(config: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that have a default, as `plain` does: those of a run that does not know them yet."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            found[field.name] = plain(made) if dataclasses.is_dataclass(made) else made
        elif dataclasses.is_dataclass(value):
            found[field.name] = defaults(value)
    return found


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names."""
    flattened = {}
    for key, value in settings.items():
        flattened.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flattened
