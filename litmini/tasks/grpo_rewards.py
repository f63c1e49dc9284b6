"""Rewards of completions: functions of the user's own by path, built-in ones, and reward models."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import json
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from litmini.config.grpo import RewardsConfig, reward_name
from litmini.config.judge import JudgeConfig
from litmini.data.prompts import Prompt
from litmini.errors import UserError
from litmini.files import content_hash, existing_file
from litmini.system import end_after
from litmini.tasks.grpo_judge import JudgeReward

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d[\d,]*)?|-?\.\d+")
FAILED = math.nan
"""The reward of a completion for which a function failed; None is that of one to which it does not apply."""
Reward = Callable[[Prompt, str], float | None]


class TookTooLong(BaseException):
    """A reward function takes too long. Not an `Exception`, which a function may catch."""


@dataclass
class Rewards:
    """The rewards of a run.

    Attributes:
        names: of each, as in metrics.
        failures: name -> the failures so far, and the first of them.
        output: what functions printed.
    """

    config: RewardsConfig
    names: tuple[str, ...]
    functions: list[Reward]
    models: dict[int, Any] = field(default_factory=dict)
    """Number of a reward -> the reward model, or judge, in its place."""
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    output: io.StringIO = field(default_factory=io.StringIO)

    @property
    def weights(self) -> list[float]:
        return self.config.weights or [1.0] * len(self.names)

    def score(self, completions: list[tuple[Prompt, str]]) -> list[list[float | None]]:
        """Return the rewards of each completion, one for each function: a number, None, or NaN where it failed."""
        columns: list[list[float | None]] = []
        for number, name in enumerate(self.names):
            if number in self.models:
                columns.append(self._score(name, self.models[number], completions))
            else:
                columns.append([self._call(name, self.functions[number], prompt, text) for prompt, text in completions])
        return [list(row) for row in zip(*columns, strict=True)]

    def _score(self, name: str, model: Any, completions: list[tuple[Prompt, str]]) -> list[float | None]:
        found: list[float | None] = model.score([(prompt.prompt, text) for prompt, text in completions])
        why = model.problem if isinstance(model, JudgeReward) else "is not finite"
        for (prompt, _), value in zip(completions, found, strict=True):
            if value is not None and math.isnan(value):
                self._failed(name, why, prompt)
        return found

    def total(self, values: list[float | None]) -> float:
        """Return the weighted sum of a completion's rewards that apply; NaN if one failed, or none applies."""
        applying = [w * value for w, value in zip(self.weights, values, strict=True) if value is not None]
        return sum(applying) if applying else FAILED

    def _call(self, name: str, function: Reward, prompt: Prompt, text: str) -> float | None:
        limit = self.config.time_limit
        try:
            with contextlib.redirect_stdout(self.output), end_after(limit, TookTooLong):
                value: Any = function(prompt, text)
        except TookTooLong:
            return self._failed(name, f"took more than {limit:g} s (rewards.time_limit)", prompt)
        except (Exception, SystemExit) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
            return self._failed(name, f"raised {what}", prompt)
        if value is None:
            return None
        if not isinstance(value, numbers.Real):
            return self._failed(name, f"returned {value!r:.80}, expected a number or None", prompt)
        if not math.isfinite(value):
            return self._failed(name, f"returned {float(value)}", prompt)
        return float(value)

    def _failed(self, name: str, what: str, prompt: Prompt) -> float:
        count, first = self.failures.get(name, (0, f"{name} {what}, for {prompt.where}"))
        self.failures[name] = (count + 1, first)
        return FAILED


def load_rewards(
    config: RewardsConfig, device: str = "cpu", judge: JudgeConfig | None = None
) -> tuple[Rewards, dict[str, str]]:
    """Return the rewards that `rewards.functions` names, and the sha256 of each file that they come from.

    Args:
        device: for reward models.
        judge: settings of the reward judge.

    Raises:
        UserError: one does not exist, or is none.
    """
    hashes: dict[str, str] = {}
    functions: list[Reward] = []
    models: dict[int, Any] = {}
    for number, name in enumerate(config.functions):
        path, _, function = name.rpartition(":")
        if path.endswith(".py"):
            hashes[path] = content_hash(existing_file(path, "reward file"))
            functions.append(_own_function(path, function, config.time_limit))
        elif name == "judge":
            models[number] = JudgeReward(judge or JudgeConfig())
            functions.append(lambda prompt, text: None)
        elif name in BUILTIN:
            functions.append(BUILTIN[name](config))
        elif Path(name).is_dir():
            from litmini.evaluation.rewards import RewardModel

            models[number] = RewardModel(name, config.checkpoint_dir, device)
            functions.append(lambda prompt, text: None)
        else:
            raise UserError(
                f"rewards.functions: {name!r} is not there; expected FILE.py:FUNCTION, the directory of a reward model, or "
                f"one of {', '.join(BUILTIN)}, judge."
            )
    if judge is not None and judge.prompt:
        hashes[judge.prompt] = content_hash(existing_file(judge.prompt, "judge prompt"))
    if config.schema:
        hashes[config.schema] = content_hash(existing_file(config.schema, "schema"))
    return Rewards(config, tuple(reward_name(one) for one in config.functions), functions, models), hashes


def _own_function(path: str, name: str, limit: float) -> Reward:
    """Return a function of a user's file as a reward."""
    spec = importlib.util.spec_from_file_location(f"rewards_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        with end_after(max(limit, 60.0), TookTooLong):  # it may import much
            spec.loader.exec_module(module)
    except (Exception, SystemExit, TookTooLong) as error:
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise UserError(f"{path} has no function {name!r}; there are {', '.join(own) or 'none'}.")
    try:
        inspect.signature(found).bind(prompt="", completion="", record={})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}:{name} does not take prompt, completion and record: {error}. Expected def {name}(prompt, completion, "
            f"record)."
        ) from None
    return lambda prompt, text: found(
        prompt=copy.deepcopy(prompt.prompt), completion=text, record=copy.deepcopy(prompt.record)
    )


def _column(prompt: Prompt, name: str) -> str:
    value = prompt.record.get(name)
    if value is None:
        raise KeyError(f"the record has no column {name!r}; --rewards.answer names another")
    return str(value)


def exact_match(prompt: Prompt, text: str, config: RewardsConfig) -> float:
    """Return 1 if the completion is the column `rewards.answer`, but for white space around it, else 0."""
    return float(text.strip() == _column(prompt, config.answer).strip())


def number_match(prompt: Prompt, text: str, config: RewardsConfig) -> float:
    """Return 1 if the last number of the completion equals that of the column `rewards.answer`, else 0."""
    found, expected = _last_number(text), _last_number(_column(prompt, config.answer))
    if expected is None:
        raise ValueError(f"the column {config.answer!r} has no number: {_column(prompt, config.answer)!r:.80}")
    return float(found == expected)


def _last_number(text: str) -> Fraction | None:
    for word in reversed(NUMBER.findall(text)):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return Fraction(word.replace(",", ""))
    return None


def regex(prompt: Prompt, text: str, config: RewardsConfig) -> float:
    """Return 1 if `rewards.pattern` is found in the completion, else 0."""
    return float(re.search(config.pattern or "", text) is not None)


def length(prompt: Prompt, text: str, config: RewardsConfig) -> float:
    """Return 1 up to `rewards.length` words, then less, 0 from twice as many on."""
    return min(1.0, max(0.0, 2 - len(text.split()) / config.length))


def _json_schema(config: RewardsConfig) -> Reward:
    validator = None
    if config.schema:
        try:
            schema = json.loads(existing_file(config.schema, "schema").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config.schema} is not valid JSON: {error}") from None
        validator = _validator(schema, config.schema)
    return partial(json_schema, validator=validator)


def _validator(schema: Any, where: str) -> Any:
    """Return what checks values against a JSON schema.

    Raises:
        UserError: it is none, or jsonschema is not installed.
    """
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise UserError('the reward json_schema needs jsonschema: pip install -e ".[schemas]"') from None
    if not isinstance(schema, dict | bool):
        raise UserError(f"{where} is {schema!r:.80}, expected a JSON schema: an object such as {{type: object}}.")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"{where} is no JSON schema: {error.message:.200}") from None
    return kind(schema, registry=referencing.Registry())  # which fetches nothing


def json_schema(prompt: Prompt, text: str, validator: Any) -> float:
    """Return 1 if the completion is JSON of a schema, which is that in the column schema if `validator` is None; else 0."""
    if validator is None:
        own = prompt.record.get("schema")
        validator = _validator(json.loads(own) if isinstance(own, str) else own, "the column schema")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    return float(validator.is_valid(value))


BUILTIN: dict[str, Callable[[RewardsConfig], Reward]] = {
    "exact_match": lambda config: partial(exact_match, config=config),
    "number_match": lambda config: partial(number_match, config=config),
    "regex": lambda config: partial(regex, config=config),
    "json_schema": _json_schema,
    "length": lambda config: partial(length, config=config),
}
"""Name -> what makes the reward of its settings."""


@contextlib.contextmanager
def kept_output(rewards: Rewards, file: Path) -> Iterator[None]:
    """Append to `file` what functions print meanwhile, which would go through the progress bar."""
    try:
        yield
    finally:
        if text := rewards.output.getvalue():
            with file.open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
            rewards.output.seek(0)
            rewards.output.truncate()
