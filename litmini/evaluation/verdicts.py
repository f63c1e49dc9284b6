"""Verdicts about pairs of answers: kept in a file as they come, and what they say together."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from litmini.errors import UserError
from litmini.evaluation.answers import Pair
from litmini.evaluation.intervals import wilson
from litmini.files import read_json, write_json
from litmini.system import lock

VERDICTS, SETTINGS = "verdicts.jsonl", "judge.json"


@dataclass
class Verdict:
    """What a judge said of a pair, shown in one order."""

    pair: int
    order: str
    """ab: the answer of a was shown first; ba; none: of a reward model, which sees one answer at a time."""
    winner: str | None
    """a, b or tie; None: the judge said neither."""
    reply: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What the judge was asked."""
    scores: list[float] = field(default_factory=list)
    """Of a and b, by a reward model."""


class VerdictFile:
    """The verdicts of a directory: a line is written, and flushed to disk, as soon as there is a verdict.

    Args:
        settings: what the verdicts depend on.

    Raises:
        UserError: the directory has verdicts that depend on others, or is not one of verdicts.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._file = directory / VERDICTS
        settings = json.loads(json.dumps(settings))
        if (directory / SETTINGS).is_file():
            before = read_json(directory / SETTINGS)
            if changed := sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)):
                raise UserError(
                    f"{directory} has verdicts of another comparison: {', '.join(changed)} differ. Choose another --out_dir."
                )
        elif directory.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} is not empty and has no verdicts; choose another --out_dir.")
        directory.mkdir(parents=True, exist_ok=True)
        lock(directory)
        write_json(directory / SETTINGS, settings)
        self.verdicts = self._whole_lines()
        self._out: TextIO = self._file.open("a", encoding="utf-8")

    def _whole_lines(self) -> list[Verdict]:
        """Return the verdicts on disk; a line that a crash has cut off is removed."""
        if not self._file.is_file():
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._file, len(whole))
        try:
            return [Verdict(**json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._file} is damaged: {error}. Remove its broken line to ask for that verdict again."
            ) from None

    def missing(self, pairs: list[Pair], orders: tuple[str, ...]) -> list[tuple[Pair, str]]:
        """Return the pairs, with the order to show them in, that have no verdict yet."""
        known = {(one.pair, one.order) for one in self.verdicts}
        return [(pair, order) for pair in pairs for order in orders if (pair.number, order) not in known]

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict."""
        self.verdicts.append(verdict)
        self._out.write(json.dumps(asdict(verdict)) + "\n")
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self) -> None:
        self._out.close()


def winners(pairs: list[Pair], verdicts: list[Verdict]) -> dict[int, str]:
    """Return number of a pair -> who wins: the one that every order names; a tie where orders differ.

    Pairs without a verdict in each order, because the judge said neither, are left out.
    """
    by_pair: dict[int, list[Verdict]] = {}
    for one in verdicts:
        by_pair.setdefault(one.pair, []).append(one)
    found: dict[int, str] = {}
    for pair in pairs:
        given = by_pair.get(pair.number, [])
        names = {one.winner for one in given}
        if None not in names and (len(given) == 2 or any(one.order == "none" for one in given)):
            found[pair.number] = str(names.pop()) if len(names) == 1 else "tie"
    return found


def summarize(pairs: list[Pair], verdicts: list[Verdict], human: dict[int, str] | None = None) -> dict[str, Any]:
    """Return win rate with its interval, position bias, lengths, tokens and, if given, agreement with people.

    `win_rate` is that of a, ties counted as halves; `decided` leaves them out.
    """
    won = winners(pairs, verdicts)
    counts = Counter(won.values())
    n, decided = len(won), counts["a"] + counts["b"]
    found: dict[str, Any] = {"pairs": len(pairs), "judged": n, "a": counts["a"], "b": counts["b"], "tie": counts["tie"]}
    found["invalid_verdicts"] = sum(one.winner is None for one in verdicts)
    found |= _rate("win_rate", counts["a"] + counts["tie"] / 2, n) | _rate("decided", counts["a"], decided)
    shown = [(one.order[0], one.winner) for one in verdicts if one.order != "none" and one.winner in ("a", "b")]
    if shown:
        found |= _rate("first_wins", sum(first == winner for first, winner in shown), len(shown))
        both = Counter(one.pair for one in verdicts if one.order != "none" and one.winner is not None)
        twice = [number for number, count in both.items() if count == 2]
        said = {number: {one.winner for one in verdicts if one.pair == number} for number in twice}
        found["orders_agree"] = sum(len(one) == 1 for one in said.values()) / len(twice) if twice else None
    words = {pair.number: (len(pair.a.split()), len(pair.b.split())) for pair in pairs}
    found["words"] = [sum(one[i] for one in words.values()) / len(words) for i in (0, 1)]
    unequal = [i for i, winner in won.items() if winner != "tie" and words[i][0] != words[i][1]]
    found |= _rate("longer_wins", sum((words[i][0] > words[i][1]) == (won[i] == "a") for i in unequal), len(unequal))
    found["prompt_tokens"] = sum(one.prompt_tokens for one in verdicts)
    found["completion_tokens"] = sum(one.completion_tokens for one in verdicts)
    if human is not None:
        common = [i for i in human if i in won]
        clear = [i for i in common if "tie" not in (human[i], won[i])]
        found |= _rate("human_agreement", sum(human[i] == won[i] for i in common), len(common))
        found |= _rate("human_agreement_decided", sum(human[i] == won[i] for i in clear), len(clear))
    return found


def _rate(name: str, successes: float, n: int) -> dict[str, Any]:
    if not n:
        return {name: None, f"{name}_interval": None, f"{name}_of": 0}
    return {name: successes / n, f"{name}_interval": list(wilson(successes, n)), f"{name}_of": n}


def describe(s: dict[str, Any], names: tuple[str, str]) -> str:
    """Return what `summarize` found as lines of text.

    Args:
        names: of a and b.
    """

    def rate(name: str) -> str:
        if s.get(name) is None:
            return "-"
        low, high = s[f"{name}_interval"]
        return f"{s[name]:.1%} (95%: {low:.1%} to {high:.1%}) of {s[f'{name}_of']:,}"

    lines = [f"a: {names[0]}", f"b: {names[1]}", ""]
    lines.append(
        f"{s['judged']:,} of {s['pairs']:,} pairs judged: a wins {s['a']:,}, b wins {s['b']:,}, ties {s['tie']:,}"
    )
    lines += [f"win rate of a, ties as halves  {rate('win_rate')}", f"without ties                   {rate('decided')}"]
    if "first_wins" in s:
        lines.append(f"position: the first shown wins {rate('first_wins')} verdicts; 50% has no bias")
        if s["orders_agree"] is not None:
            lines.append(f"both orders agree              {s['orders_agree']:.1%}; where they do not, it is a tie")
    lines.append(
        f"length: the longer wins        {rate('longer_wins')}; a has {s['words'][0]:.0f} words, b {s['words'][1]:.0f}"
    )
    if s["invalid_verdicts"]:
        lines.append(f"verdicts that said neither     {s['invalid_verdicts']:,}; their pairs are left out")
    if "human_agreement" in s:
        lines += [f"agreement with people          {rate('human_agreement')}"]
        lines += [f"where neither says tie         {rate('human_agreement_decided')}"]
    if s["prompt_tokens"] or s["completion_tokens"]:
        lines.append(f"tokens: {s['prompt_tokens']:,} of prompts, {s['completion_tokens']:,} of replies")
    return "\n".join(lines)


def preferences(pairs: list[Pair], verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """Return the pairs that have a winner as records for `finetune_preference.py`, with a margin from reward models."""
    won = winners(pairs, verdicts)
    margins = {one.pair: abs(one.scores[0] - one.scores[1]) for one in verdicts if len(one.scores) == 2}
    found = []
    for pair in pairs:
        if won.get(pair.number) in ("a", "b"):
            both = (pair.a, pair.b) if won[pair.number] == "a" else (pair.b, pair.a)
            margin = margins.get(pair.number)
            found.append(
                {"prompt": pair.prompt, "chosen": both[0], "rejected": both[1]}
                | ({} if margin is None or not math.isfinite(margin) else {"margin": margin})
            )
    return found
