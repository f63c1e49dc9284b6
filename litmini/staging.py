"""Staging directories: what is not complete yet lies beside its target, as .NAME.litmini-XXXXXXXX.partial.

One holds a file that says whose it is, the new content, and what that replaces. Nothing else is ever renamed or deleted,
whatever its name, and no link is followed.
"""

import os
import random
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from litmini.errors import UserError
from litmini.system import being_written, try_lock

OURS, PARTIAL = ".litmini-", ".partial"  # around eight random letters, in names of what is not complete
MARKER, CONTENT, OLD = ".staging", "new", "old"  # in a staging directory


def stage(directory: Path) -> tuple[Path, Callable[[], None]]:
    """Make a staging directory for `directory`, and delete those that dead processes left for it.

    Returns:
        it, and what deletes it; an old directory in it gets its name back first, if that is free.

    Raises:
        UserError: another process is writing this directory.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    while True:
        staging = Path(tempfile.mkdtemp(PARTIAL, f".{directory.name}{OURS}", directory.parent))
        unlock = _lock(staging)
        with suppress(FileNotFoundError):
            (staging / MARKER).touch()
        since = _since(staging)
        if unlock is None or since is None:
            continue  # another process took it for that of a dead one, before it was locked and marked

        def delete(staging: Path = staging, unlock: Callable[[], None] = unlock) -> None:
            _delete(staging, directory)
            unlock()

        others = [path for path in _find(directory.parent, directory.name) if path.name != staging.name]
        alive = [_since(other) for other in others if not _delete_if_dead(other, directory)]
        first = min((age for age in alive if age is not None), default=since + 1)
        if first > since:
            return staging, delete
        delete()
        if first < since:
            raise UserError(being_written(directory))
        time.sleep(random.uniform(0.01, 0.1))  # both began within one tick of the clock: one of them will be first


def restore(directory: Path) -> None:
    """Rename a directory back if a process died while it replaced it. Nothing is deleted."""
    for staging in _find(directory.parent, directory.name):
        if (unlock := _lock(staging)) is not None:
            _put_back(staging, directory)
            unlock()


def restore_all(parent: Path) -> None:
    """`restore` every directory in `parent`."""
    for staging in _find(parent):
        restore(parent / _target(staging))


def delete_leftovers(parent: Path) -> None:
    """Delete what dead processes left in a directory: staging directories, and files of `write_text`."""
    for staging in _find(parent):
        _delete_if_dead(staging, parent / _target(staging))
    for file in parent.glob(f".*{OURS}????????{PARTIAL}"):
        if stat.S_ISREG(file.lstat().st_mode) and _is_own(file):
            file.unlink()


def _lock(staging: Path) -> Callable[[], None] | None:
    """Lock a staging directory; None: another process has locked or deleted it."""
    with suppress(FileNotFoundError):
        return try_lock(staging)
    return None


def _target(staging: Path) -> str:
    return staging.name[1:].rpartition(OURS)[0]


def _find(parent: Path, name: str | None = None) -> list[Path]:
    """Return the staging directories in `parent`, of one target or all: directories of this user, with the marker."""
    wanted = re.compile(rf"\..+{re.escape(OURS)}\w{{8}}{re.escape(PARTIAL)}")
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if not wanted.fullmatch(path.name) or name not in (None, _target(path)):
            continue
        with suppress(OSError):  # gone meanwhile, or not to be read
            content = [inside.name for inside in path.iterdir()] if is_own_directory(path) else ["another's"]
            found += [path] if not content or MARKER in content else []
    return found


def is_own_directory(path: Path) -> bool:
    """Whether `path` is a directory, no link to one, and belongs to the user of this process."""
    return stat.S_ISDIR(path.lstat().st_mode) and _is_own(path)


def _is_own(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()


def _since(staging: Path) -> int | None:
    """When a staging directory was marked, in ns; None: it is not yet, or no longer there."""
    with suppress(OSError):
        return (staging / MARKER).stat().st_mtime_ns
    return None


def _delete_if_dead(staging: Path, directory: Path) -> bool:
    """Delete a staging directory whose process died; return whether it did."""
    if (unlock := _lock(staging)) is None:
        return False
    _delete(staging, directory)
    unlock()
    return True


def _delete(staging: Path, directory: Path) -> None:
    """Delete a staging directory, its marker last: what is left, if this process dies, is known as ours."""
    _put_back(staging, directory)
    with suppress(OSError):
        for path in staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARKER:
                path.unlink()
        (staging / MARKER).unlink(missing_ok=True)
        staging.rmdir()


def _put_back(staging: Path, directory: Path) -> None:
    if os.path.lexists(staging / OLD) and not os.path.lexists(directory):
        (staging / OLD).rename(directory)
