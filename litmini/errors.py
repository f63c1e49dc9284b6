"""Mistakes that a user can fix: one exception, checks of settings, and what messages say of many things."""

from typing import Any


class UserError(Exception):
    """A mistake that the user can fix. The message says what was found, what was expected and what to type next."""

    status = 1
    """Exit status of the command."""
    title = "error: "
    """Beginning of the line that the command prints."""


def check(group: str, config: Any, **fine: bool) -> None:
    """Raise UserError that lists all settings of a group that are out of range.

    Args:
        group: prefix of their names, such as `train.`.
        fine: name -> whether its value is allowed.
    """
    wrong = [f"{group}{name} is {getattr(config, name)!r}" for name, ok in fine.items() if not ok]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}. See --help.")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and its noun: `1 step`, `1,200 steps`.

    Args:
        plural: of a noun that does not take an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def by_cause(problems: list[str], total: int | None = None, shown: int = 10) -> str:
    """Return problems, each `FILE:LINE: CAUSE`, as indented lines: one for each cause, with its number and first location.

    Args:
        total: records in all, to say that a cause is that of all of them.
        shown: most lines.
    """
    causes: dict[str, list[str]] = {}
    for problem in problems:
        where, _, cause = problem.partition(": ")
        causes.setdefault(cause, []).append(where)
    lines = []
    for cause, locations in causes.items():
        every = "all " if len(locations) == total else ""
        many = f"{every}{counted(len(locations), 'record')}: {cause}; first {locations[0]}"
        lines.append(many if len(locations) > 1 else f"{locations[0]}: {cause}")
    more = [f"... and {len(lines) - shown} more"] * (len(lines) > shown)
    return "\n  ".join(lines[:shown] + more)
