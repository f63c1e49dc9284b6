"""The runs of a sweep: their command lines, checked before anything runs, and what an earlier command has run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litmini.config.sweep import SweepConfig
from litmini.config.training import RunConfig
from litmini.errors import UserError
from litmini.files import read_json
from litmini.runs.sweep import Outcome, is_finished, read_outcome, starting_words
from litmini.tasks.from_python import SCRIPTS
from litmini.tasks.sweep_samplers import Choice, Listed, make_sampler, word_of

LONGEST_NAME = 80  # characters of the name of a run's directory
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    """Of its directory."""
    number: int
    """Of its choice; runs with several seeds have it in common."""
    choice: Choice
    seed: int | None
    words: list[str] = field(default_factory=list)
    """Its command line, after the script's name."""


def config_class(script: str) -> type[RunConfig]:
    """Return the settings of a training script.

    Raises:
        UserError: there is no such script.
    """
    found = {name: kind for kind, name in SCRIPTS.items()}
    if script not in found:
        raise UserError(f"no training script {script!r}; expected one of {', '.join(found)}.")
    return found[script]


def make_run(config: SweepConfig, number: int, choice: Choice, seed: int | None) -> Run:
    """Return a run of a choice; its directory is named by the settings that differ."""
    parts = [f"{key.rpartition('.')[2]}-{word_of(value)}" for key, value in choice.items()]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.") or "run"
    if len(name) > LONGEST_NAME or name != "_".join(parts):
        key = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_NAME]}-{key}"
    name += f"_seed-{seed}" if seed is not None else ""
    return Run(name, number, choice, seed, command_words(config, choice, seed, str(Path(config.out_dir) / name)))


def command_words(config: SweepConfig, choice: Choice, seed: int | None, out_dir: str) -> list[str]:
    """Return the words of a run after the script's name."""
    words = ["--config", config.settings] if config.settings else []
    settings = {**config.set, **choice, **({} if seed is None else {"seed": seed}), "out_dir": out_dir}
    for name, value in settings.items():
        word = word_of(value)
        words += [f"--{name}={word}"] if word.startswith("--") else [f"--{name}", word]
    return words


def corners(config: SweepConfig) -> list[Choice]:
    """Return choices that have every value of a list, and both ends of every range, at least once."""
    if config.sampler == "grid":
        return Listed(config).choices
    ends = {
        name: values if isinstance(values, list) else [values["min"], values["max"]]
        for name, values in config.space.items()
    }
    return [
        {name: values[min(i, len(values) - 1)] for name, values in ends.items()}
        for i in range(max(map(len, ends.values())))
    ]


def read_earlier(file: Path, fixed: dict[str, Any], varied: list[str]) -> dict[str, Outcome]:
    """Return what an earlier command of a sweep has run, by name; `file` is its sweep.json, if there is one.

    Args:
        fixed: settings that have to be the same.
        varied: the settings that are varied now.

    Raises:
        UserError: it is another sweep's, or no sweep's.
    """
    if not file.is_file():
        return {}
    before = read_json(file)
    try:
        runs = [Outcome(**one) for one in before["runs"]]
        changed = [name for name in fixed if before["fixed"].get(name) != fixed[name]]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not that of a sweep: choose another --out_dir.") from None
    if changed:
        raise UserError(
            f"{file.parent} has a sweep with other settings ({', '.join(changed)}): choose another --out_dir."
        )
    for keys in (list(one.choice) for one in runs):
        # their directories would have the same names
        if keys != varied and [key.rpartition(".")[2] for key in keys] == [key.rpartition(".")[2] for key in varied]:
            raise UserError(f"{file.parent} has a sweep over {', '.join(keys)}: choose another --out_dir.")
    return {one.name: one for one in runs}


class Schedule:
    """The runs of a sweep in their order; those that an earlier command has run are read.

    Args:
        earlier: outcomes of an earlier command by name.
    """

    def __init__(self, config: SweepConfig, earlier: dict[str, Outcome]) -> None:
        known = {one.number: one.choice for one in earlier.values()}
        self.config, self.earlier, self.out_dir = config, earlier, Path(config.out_dir)
        self.sampler = make_sampler(config, [known[number] for number in sorted(known)])
        self.seeds: list[int | None] = [*config.seeds] or [None]
        self.outcomes: list[Outcome] = []

    def __iter__(self) -> Iterator[tuple[Outcome, list[str]]]:
        """Yield each run with its words. Choices are made as they are asked for, by what came of those before."""
        number = 0
        while (choice := self.sampler.choose(number)) is not None:
            for seed in self.seeds:
                run = make_run(self.config, number, choice, seed)
                directory, outcome = self.out_dir / run.name, self.earlier.get(run.name)
                if outcome is None or outcome.status != "pruned" or not self.config.prune:
                    outcome = Outcome(run.name, number, choice, seed)
                outcome.number = number
                if is_finished(directory):
                    read_outcome(outcome, directory, self.config.metric)
                self.outcomes.append(outcome)
                yield outcome, starting_words(run.words, directory)
            number += 1

    def learn(self, number: int) -> None:
        """Let the sampler know what came of a choice, once all of its runs have ended."""
        mine = [one for one in self.outcomes if one.number == number]
        if len(mine) < len(self.seeds) or any(one.status in ("waiting", "running") for one in mine):
            return
        values = [one.value for one in mine if one.status == "done" and one.value is not None]
        pruned = [(one.step or 0, one.value or 0.0) for one in mine if one.status == "pruned"]
        mean = sum(values) / len(values) if len(values) == len(mine) else None
        self.sampler.tell(number, mean, pruned[0] if pruned else None)
