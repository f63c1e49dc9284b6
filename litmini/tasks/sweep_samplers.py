"""How a sweep chooses settings: a grid, choices at random, or Optuna's."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, Protocol

import numpy as np

from litmini.config.sweep import SweepConfig
from litmini.errors import UserError

MOST_ASKED = 50  # choices that Optuna may repeat before there are taken to be no others
Choice = dict[str, Any]
"""Setting -> value."""


def word_of(value: Any) -> str:
    """Return a value as a word of a command line."""
    return value if isinstance(value, str) else json.dumps(value)


class Sampler(Protocol):
    """Chooses settings, one choice after the other."""

    def choose(self, number: int) -> Choice | None:
        """Return choice `number`, asked for in order; None: there are no more."""
        ...

    def tell(self, number: int, value: float | None, pruned: tuple[int, float] | None = None) -> None:
        """Learn what came of a choice; None: it failed, or was stopped at `pruned`, a step and its validation loss."""
        ...


class Listed:
    """All choices of a grid, or choices at random: known from the start, each once."""

    def __init__(self, config: SweepConfig) -> None:
        if config.sampler == "grid":
            self.choices = [
                dict(zip(config.grid, values, strict=True)) for values in itertools.product(*config.grid.values())
            ]
        else:
            found = [random_choice(config, number) for number in range(config.trials)]
            self.choices = list({json.dumps(one, sort_keys=True): one for one in found}.values())

    def choose(self, number: int) -> Choice | None:
        return self.choices[number] if number < len(self.choices) else None

    def tell(self, number: int, value: float | None, pruned: tuple[int, float] | None = None) -> None:
        pass


def random_choice(config: SweepConfig, number: int) -> Choice:
    """Return choice `number` at random: a function of `sampler_seed` and the number."""
    random = np.random.default_rng((config.sampler_seed, number))
    found: Choice = {}
    for name, values in config.space.items():
        if isinstance(values, list):
            found[name] = values[int(random.integers(len(values)))]
            continue
        low, high = values["min"], values["max"]
        whole = isinstance(low, int) and isinstance(high, int)
        if values.get("log"):
            value = math.exp(random.uniform(math.log(low), math.log(high + whole)))
        else:
            value = random.uniform(low, high + whole)
        found[name] = min(int(value), high) if whole else _short(value)
    return found


def _short(value: float) -> float:
    """Return a value of three digits, as people write it."""
    return float(f"{value:.3g}")


class Tpe:
    """Choices by Optuna's TPE. It learns from what earlier choices came to, also from those before the sweep was continued.

    Args:
        known: choices that were made before.
    """

    def __init__(self, config: SweepConfig, known: list[Choice]) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError('sampler optuna needs Optuna: pip install -e ".[sweep]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.known = config, known
        sampler = optuna.samplers.TPESampler(seed=config.sampler_seed + len(known))
        self.study = optuna.create_study(direction="maximize" if config.maximize else "minimize", sampler=sampler)
        self._optuna, self._trials = optuna, dict[int, Any]()
        self._choices, self._values = list[Choice](), dict[int, float | None]()

    def choose(self, number: int) -> Choice | None:
        if number >= self.config.trials:
            return None
        if number < len(self.known):
            self.study.enqueue_trial(_as_params(self.known[number], self.config.space))
            trial, _ = self._ask()
            return self._take(number, self.known[number], trial)
        for _ in range(MOST_ASKED):
            trial, found = self._ask()
            if found not in self._choices:
                return self._take(number, found, trial)
            self._tell(trial, self._values.get(self._choices.index(found)))
        return None

    def _take(self, number: int, choice: Choice, trial: Any) -> Choice:
        self._trials[number] = trial
        self._choices.append(choice)
        return choice

    def _ask(self) -> tuple[Any, Choice]:
        """Return a trial of Optuna, and its choice."""
        trial, found = self.study.ask(), Choice()
        for name, values in self.config.space.items():
            if isinstance(values, list):
                words = [word_of(value) for value in values]
                found[name] = values[words.index(trial.suggest_categorical(name, words))]
            elif isinstance(values["min"], int) and isinstance(values["max"], int):
                found[name] = trial.suggest_int(name, values["min"], values["max"], log=values.get("log", False))
            else:
                value = trial.suggest_float(name, values["min"], values["max"], log=values.get("log", False))
                found[name] = min(max(_short(value), values["min"]), values["max"])
        return trial, found

    def tell(self, number: int, value: float | None, pruned: tuple[int, float] | None = None) -> None:
        self._values[number] = value
        self._tell(self._trials[number], value, pruned)

    def _tell(self, trial: Any, value: float | None, pruned: tuple[int, float] | None = None) -> None:
        state = self._optuna.trial.TrialState
        if value is None and pruned is not None:
            trial.report(pruned[1], pruned[0])
            self.study.tell(trial, state=state.PRUNED)
        else:
            self.study.tell(trial, value, state=state.FAIL if value is None else None)


def _as_params(choice: Choice, space: dict[str, Any]) -> dict[str, Any]:
    return {name: word_of(value) if isinstance(space[name], list) else value for name, value in choice.items()}


def make_sampler(config: SweepConfig, known: list[Choice]) -> Sampler:
    """Return the sampler of a sweep; `known` are the choices that it made before it was interrupted."""
    return Tpe(config, known) if config.sampler == "optuna" else Listed(config)
