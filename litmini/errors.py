"""Mistakes that a user can fix: one exception, and checks of settings."""

from typing import Any


class UserError(Exception):
    """A mistake that the user can fix. The message says what was found, what was expected and what to type next."""

    status = 1
    """Exit status of the command."""


def check(group: str, config: Any, **fine: bool) -> None:
    """Raise UserError that lists all settings of a group that are out of range.

    Args:
        group: prefix of their names, such as `train.`.
        fine: name -> whether its value is allowed.
    """
    wrong = [f"{group}{name} is {getattr(config, name)!r}" for name, ok in fine.items() if not ok]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}. See --help.")
