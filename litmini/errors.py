"""Mistakes that a user can fix: one exception, and checks of settings."""

from typing import Any


class UserError(Exception):
    """A mistake that the user can mend. Says what was found, what was expected and what to type next."""

    status = 1
    """Exit status of the command."""


def check(group: str, config: Any, **fine: bool) -> None:
    """Refuse settings out of range, all of a group at once: name -> whether its value is possible."""
    wrong = [f"{group}{name} is {getattr(config, name)!r}" for name, ok in fine.items() if not ok]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}. See --help.")
