"""Files that are whole or not there: written aside, flushed to disk and renamed."""

import difflib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litmini.errors import UserError

SEAL = "sha256.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_held: dict[tuple[int, int], int] = {}  # (device, inode) of a directory -> descriptor that locks it


@contextmanager
def write_atomically(
    directory: Path, later: Callable[[Callable[..., None]], object] | None = None, sealed: bool = False
) -> Iterator[Path]:
    """Yield a new directory beside `directory`; at the end everything in it is flushed to disk and it takes the name.

    When the block fails, or the process dies, `directory` is as it was before. Should it die between the two renames that
    replace an old directory, the next `write_atomically` or `check_checkpoint_dir` brings that one back.

    Args:
        later: takes what is left to do after the block (waiting for the disk, renaming), to call it in a thread, say.
            What was written in the block is a copy already: the kernel's, in memory. It may be given what waits for others
            who write there, to call that first.
        sealed: add the hash of each file, for `check_seal`.

    Raises:
        UserError: another process is writing this directory.
    """
    restore(directory)
    aside = _aside(directory)
    lock = _claim(aside, directory)

    def finish(wait: Callable[[], None] | None = None) -> None:
        try:
            if wait:
                wait()
            if sealed:
                files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
                hashes = {str(file.relative_to(aside)): file_hash(file) for file in files}
                write_json(aside / SEAL, hashes)
            for path in [*aside.rglob("*"), aside]:
                _flush(path)
            _take_name(aside, directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            os.close(lock)

    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)
        raise
    if later:
        later(finish)
    else:
        finish()


def check_seal(directory: Path) -> None:
    """Compare the files of a sealed directory with what was written.

    Raises:
        UserError: some are missing or changed; names them.
    """
    damaged, sealed = [], dict[str, Any]()
    try:
        sealed = read_json(directory / SEAL)
    except UserError:
        damaged.append(SEAL)
    for name, digest in sealed.items():
        file = directory / name
        if not file.is_file() or file_hash(file) != digest:
            damaged.append(name)
    if damaged:
        others = sorted(str(p) for p in directory.parent.glob("step-*") if p != directory)
        instead = f"go on from another: --resume {others[-1]}" if others else "there is no other to go on from"
        raise UserError(f"{directory} is damaged ({', '.join(damaged)} changed since it was written); {instead}.")


def discard(directory: Path) -> None:
    """Delete a directory, first its name: who lists what is there never meets half of it."""
    aside = _aside(directory)
    directory.rename(aside)
    shutil.rmtree(aside)


def hold(directory: Path) -> None:
    """Lock a directory until `release`, or the end of this process.

    Raises:
        UserError: another process has.
    """
    state = directory.stat()
    key = (state.st_dev, state.st_ino)
    if key not in _held:
        if (descriptor := lock(directory)) is None:
            raise UserError(f"another process is writing {directory}: wait for it, or stop it, or choose another name.")
        _held[key] = descriptor


def release() -> None:
    """Let others write what this process holds."""
    while _held:
        os.close(_held.popitem()[1])


def _take_name(aside: Path, directory: Path) -> None:
    if directory.exists():
        old = _old(directory)
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        aside.rename(directory)
        shutil.rmtree(old)
    else:
        aside.rename(directory)
    _flush(directory.parent)


def _claim(aside: Path, directory: Path) -> int:
    """Make `aside`, empty and locked until the returned descriptor is closed, or this process dies."""
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        descriptor = lock(aside)
        if descriptor is None:
            raise UserError(f"another process is writing {directory}: wait for it, or stop it, or choose another name.")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), aside.stat()):
                break
        os.close(descriptor)  # its owner has just given it its name
    for left in aside.iterdir():  # of a process that died
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return descriptor


def lock(directory: Path) -> int | None:
    """Lock a directory; None where somebody else has.

    It is free again when the returned descriptor is closed or the process ends, however it does. No file is left behind.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


class Background:
    """Jobs done one after the other in a thread. What they raise is raised by `wait`."""

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


def restore(directory: Path) -> None:
    """Bring `directory` back if a process died while it replaced it."""
    old = _old(directory)
    if not old.is_dir():
        return
    with suppress(FileNotFoundError):
        descriptor = lock(_aside(directory))
        if descriptor is None:  # it is alive, and about to
            return
        os.close(descriptor)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(directory)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


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
        check_no_pointer(path)
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, never meets half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    aside.rename(path)


def check_no_pointer(file: Path) -> None:
    """Call this where a file is not what it should be.

    Raises:
        UserError: it is the few lines that git keeps in place of a large file.
    """
    with suppress(OSError), file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file} is not here: that file is only git's pointer to it, since the repository was cloned without "
                f"git-lfs. Type: git -C {file.parent} lfs pull. Or get the model anew: python scripts/download.py ORG/NAME"
            )


def check_disk_space(directory: Path, needed: int, spare: int = 0) -> None:
    """Before anything is written in `directory`, which need not exist yet: is there room for it?

    Raises:
        UserError: fewer than `needed` + `spare` bytes are free.
    """
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed + spare > free:
        raise UserError(
            f"too little disk: {needed / 1e9:.2f} GB are still to come and {free / 1e9:.2f} GB are free in {parent}. "
            f"Free some space, or choose another --out_dir."
        )


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
