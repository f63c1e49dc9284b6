"""Files that are whole or not there: written aside, flushed to disk and renamed."""

import difflib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litmini.config import UserError


@contextmanager
def write_aside(directory: Path) -> Iterator[Path]:
    """Yield a new directory beside `directory`; at the end everything in it is flushed to disk and it takes the name.

    When the block fails, or the process dies, `directory` is as it was before. Should it die between the two renames that
    replace an old directory, the next `write_aside` or `check_checkpoint_dir` brings that one back.
    """
    aside = directory.with_name(f".{directory.name}.partial")
    restore(directory)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        if directory.exists():
            old = _old(directory)
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
            aside.rename(directory)
            shutil.rmtree(old)
        else:
            aside.rename(directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def restore(directory: Path) -> None:
    """Bring `directory` back if a process died while it replaced it."""
    if not directory.exists() and _old(directory).is_dir():
        _old(directory).rename(directory)


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, never meets half of it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    aside.rename(path)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a file could not grow: the disk, the quota or the file size limit is reached."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True  # safetensors and torch report the same as text
    return any(f"os error {number})" in str(error) for number in full) or "No space left on device" in str(error)


def existing_file(path: str, what: str) -> Path:
    """`path` if it is a file, else a UserError that names the nearest files beside it."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise UserError(f"{what} expected, but {file} is a directory.")
    beside = sorted(p.name for p in file.parent.glob("*")) if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, beside, n=3) or beside[:5]
    where = f"{file.parent}/ holds {', '.join(near)}" if near else f"{file.parent}/ is empty or missing"
    raise UserError(f"{what} not found: {file} (in {Path.cwd()}); {where}.")


def content_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal, computed once a process and state of the file."""
    status = path.stat()
    return _content_hash(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(1024)
def _content_hash(path: Path, *state: int) -> str:
    return file_hash(path)


def file_hash(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
