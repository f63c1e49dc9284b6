"""The settings of sweep.py. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from litmini.errors import UserError, check


@dataclass(kw_only=True)
class SweepConfig:
    """Settings of sweep.py."""

    script: str
    """The training script, such as finetune_lora."""
    out_dir: str
    """Directory of the sweep: of its runs, each a directory of its own, and of sweep.md, .json and .png."""
    settings: str | None = None
    """YAML file with the settings that all runs have; given as --config."""
    set: dict[str, Any] = field(default_factory=dict)
    """Further settings that all runs have, such as '{train.max_steps: 100}'."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Setting -> its values, such as '{optim.lr: [1e-4, 3e-4], lora.rank: [8, 16]}': every combination is run."""
    space: dict[str, Any] = field(default_factory=dict)
    """For random and optuna: setting -> a list of values, or a range such as '{min: 1e-5, max: 1e-3, log: true}', of whole
    numbers if both ends are."""
    sampler: Literal["grid", "random", "optuna"] = "grid"
    """How settings are chosen: all of grid; at random from space; or by Optuna's TPE (pip install -e ".[sweep]")."""
    trials: int = 20
    """random, optuna: how many choices are run."""
    seeds: list[int] = field(default_factory=list)
    """Each choice is run with each of these seeds, and their standard deviation is shown. Empty: once, with the seed of
    the settings."""
    metric: str = "val_loss"
    """What is compared: a result that is measured after training, such as val_loss, exact_match or accuracy."""
    maximize: bool = False
    """The highest is best, as of exact_match; else the lowest, as of val_loss."""
    prune: bool = False
    """Stop a run whose validation loss (train.eval_every) is above the median of what others had after as many steps."""
    prune_after: int = 3
    """Others that must have got so far before a run is stopped."""
    jobs: int = 1
    """Runs at once. They take turns on the GPUs of CUDA_VISIBLE_DEVICES, or on all there are."""
    sampler_seed: int = 0
    """Seed of random and optuna."""

    def __post_init__(self) -> None:
        self.script = self.script.removesuffix(".py").rpartition("/")[2]
        check(
            "",
            self,
            script=bool(self.script),
            out_dir=bool(self.out_dir),
            trials=self.trials > 0,
            jobs=0 < self.jobs <= 1024,
            prune_after=self.prune_after > 0,
            seeds=len(set(self.seeds)) == len(self.seeds) and all(0 <= seed < 2**32 for seed in self.seeds),
            metric=bool(self.metric),
            sampler_seed=0 <= self.sampler_seed < 2**32,
        )
        given, other = ("grid", "space") if self.sampler == "grid" else ("space", "grid")
        if not getattr(self, given) or getattr(self, other):
            raise UserError(f"sampler {self.sampler} takes its settings from --{given}; expected it, and no --{other}.")
        if empty := [name for name, values in self.grid.items() if not isinstance(values, list) or not values]:
            raise UserError(f"grid: {empty[0]} has no values; expected a list such as [1, 2].")
        if twice := [name for name, values in self.grid.items() if len(set(map(repr, values))) < len(values)]:
            raise UserError(f"grid: {twice[0]} has a value twice; expected each once.")
        for name, values in self.space.items():
            _check_space(name, values)
        varied = {*self.grid, *self.space}
        if fixed := sorted(varied & self.set.keys()):
            raise UserError(f"{fixed[0]} is varied, and given to all runs by --set as well.")
        if self.seeds and "seed" in varied | self.set.keys():
            raise UserError("seed is among the settings, and seeds are given as well; expected one of them.")
        if own := sorted((varied | self.set.keys()) & {"out_dir", "resume", "config", "dry_run", "show_masks"}):
            raise UserError(f"{own[0]} cannot be set: the sweep chooses it for each run.")


def _check_space(name: str, values: Any) -> None:
    """Raise UserError unless `values` is a list, or a range."""
    if isinstance(values, list) and values:
        return
    expected = "expected a list of values, or a range such as {min: 1e-5, max: 1e-3, log: true}"
    wrong = f"space: {name} is {values!r:.80}; {expected}"
    if not isinstance(values, dict) or not {"min", "max"} <= values.keys() <= {"min", "max", "log"}:
        raise UserError(f"{wrong}.")
    low, high, log = values["min"], values["max"], values.get("log", False)
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (low, high))
    if not numbers or not isinstance(log, bool) or not -math.inf < low < high < math.inf or (log and low <= 0):
        raise UserError(f"{wrong}, with min below max, and above 0 if log.")
