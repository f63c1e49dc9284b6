"""Files and directories that are written atomically: under another name, flushed to disk and renamed."""

import difflib
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litmini.errors import UserError
from litmini.staging import CONTENT, OLD, OURS, PARTIAL, stage

CHECKSUMS = "sha256.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def write_atomically(
    directory: Path,
    later: Callable[[Callable[..., None]], object] | None = None,
    checksums: bool = False,
    new: bool = False,
) -> Iterator[Path]:
    """Yield a new directory beside `directory`; at the end everything in it is flushed to disk and it takes the name.

    When the block fails, or the process dies, `directory` is as it was before. Should it die between the two renames that
    replace an old directory, the next `write_atomically` or `check_checkpoint_dir` brings that one back.

    Args:
        later: takes what is left to do after the block (waiting for the disk, renaming), to call it in a thread, say.
            What was written in the block is a copy already: the kernel's, in memory. It may be given what waits for others
            who write there, to call that first.
        checksums: add the sha256 of each file, for `check_checksums`.
        new: `directory` must not exist, neither now nor at the end.

    Raises:
        UserError: another process is writing this directory; or it exists and should be new.
    """
    if new:
        _check_new(directory)
    staging, delete = stage(directory)
    content = staging / CONTENT

    def finish(wait: Callable[[], None] | None = None) -> None:
        try:
            if wait:
                wait()
            if checksums:
                files = [file for file in sorted(content.rglob("*")) if file.is_file()]
                write_json(content / CHECKSUMS, {str(file.relative_to(content)): file_hash(file) for file in files})
            for path in [*content.rglob("*"), content]:
                _flush(path)
            if new:
                _check_new(directory)
            elif os.path.lexists(directory):
                directory.rename(staging / OLD)
            content.rename(directory)
            _flush(directory.parent)
        finally:
            delete()

    try:
        content.mkdir()
        yield content
    except BaseException:
        delete()
        raise
    if later:
        later(finish)
    else:
        finish()


def _check_new(directory: Path) -> None:
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists already; choose another --out_dir or remove it.")


def check_checksums(directory: Path) -> None:
    """Compare the files of a directory with the checksums written with them.

    Raises:
        UserError: some are missing or changed; names them.
    """
    damaged, checksums = [], dict[str, Any]()
    try:
        checksums = read_json(directory / CHECKSUMS)
    except UserError:
        damaged.append(CHECKSUMS)
    for name, digest in checksums.items():
        file = directory / name
        if not file.is_file() or file_hash(file) != digest:
            damaged.append(name)
    if damaged:
        others = sorted(str(p) for p in directory.parent.glob("step-*") if p != directory)
        instead = f"resume from another: --resume {others[-1]}" if others else "there is no other to resume from"
        raise UserError(f"{directory} is damaged ({', '.join(damaged)} changed since it was written); {instead}.")


def discard(directory: Path) -> None:
    """Delete a directory, first its name, so that nobody finds half of it under that name."""
    staging, delete = stage(directory)
    directory.rename(staging / CONTENT)
    delete()


class Background:
    """A thread that does one job after the other. `wait` raises what they raise."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []

    def __call__(self, job: Callable[..., None], *args: Any) -> None:
        self._jobs.append(self._thread.submit(job, *args))

    def wait(self) -> None:
        """Return when all jobs are done."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()


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
    """Return the JSON object in a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        check_no_pointer(path)
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: neither a reader nor a crash finds half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, as `write_text` does."""
    partial = path.with_name(f".{path.name}{OURS}{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as opened:  # a new file: never through a link
            opened.write(content)
        _flush(partial)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_new_file(path: str, setting: str) -> Path:
    """Return `path` if a file can be written there and nothing is overwritten: to be called before what takes long.

    Raises:
        UserError: it exists already, or its directory does not, or is not writable.
    """
    file = Path(path)
    if os.path.lexists(file):
        kind = "a directory" if file.is_dir() else "a file"
        raise UserError(f"{setting} {file} exists already, as {kind}; choose another name or remove it.")
    if not file.parent.is_dir():
        raise UserError(f"{setting} {file}: there is no directory {file.parent}. Make it: mkdir -p {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{setting} {file}: the directory {file.parent} is not writable; choose another.")
    return file


def check_no_pointer(file: Path) -> None:
    """Check a file that cannot be read as what it should be.

    Raises:
        UserError: it is the pointer that git keeps in place of a large file.
    """
    with suppress(OSError), file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file} is not here: that file is only git's pointer to it, since the repository was cloned without "
                f"git-lfs. Type: git -C {file.parent} lfs pull. Or download it again: python scripts/download.py ORG/NAME"
            )


def existing_file(path: str, what: str) -> Path:
    """Return `path` if it is a file.

    Raises:
        UserError: it is none; names the nearest files beside it.
    """
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
    """Return the sha256 of a file, in hexadecimal, computed once for each state of the file."""
    status = path.stat()
    return _content_hash(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(1024)
def _content_hash(path: Path, *state: int) -> str:
    return file_hash(path)


def file_hash(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
