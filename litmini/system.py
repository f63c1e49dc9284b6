"""Operating systems: locks between processes, cores, memory and disk, with a fallback where one lacks what Linux has."""

import errno
import io
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from litmini.errors import UserError

_unlock: dict[tuple[int, int], Callable[[], None]] = {}  # (device, inode) of a directory locked by `lock` -> its unlock


def try_lock(directory: Path, wait: bool = False) -> Callable[[], None] | None:
    """Lock an existing directory against other processes and other calls; None if it is locked already.

    The lock ends when the returned function is called or the process ends, however it does.

    Args:
        wait: until it is unlocked.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout

        beside = FileLock(directory.with_name(f".{directory.name}.lock"), thread_local=False)
        try:
            beside.acquire(blocking=wait)
        except Timeout:
            return None
        return beside.release
    descriptor = os.open(directory, os.O_RDONLY)  # filelock would leave a file behind; a lock of the directory does not
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return partial(os.close, descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait until no other process or thread has locked `directory`; lock it meanwhile."""
    unlock = try_lock(directory, wait=True)
    assert unlock is not None, f"{directory}: waited for its lock in vain"
    try:
        yield
    finally:
        unlock()


def lock(directory: Path) -> None:
    """Lock a directory until `unlock_all`, or the end of this process.

    Raises:
        UserError: another process has locked it.
    """
    state = directory.stat()
    key = (state.st_dev, state.st_ino)
    if key not in _unlock:
        if (unlock := try_lock(directory)) is None:
            raise UserError(being_written(directory))
        _unlock[key] = unlock


def unlock_all() -> None:
    """Unlock what `lock` has locked in this process."""
    while _unlock:
        _unlock.popitem()[1]()


def being_written(directory: Path) -> str:
    return f"another process is writing {directory}: wait for it, or stop it, or choose another name."


def has_colors(stream: TextIO) -> bool:
    """Whether to write colors to `stream`: to a terminal that knows them, whose user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def cpu_count() -> int:
    """Return the cores that this process may use; all of them where the system does not say, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the name of this machine's CPU, such as `Intel(R) Xeon(R) Platinum 8488C`; its kind where there is no more."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Return the bytes of this process in memory; where there is no /proc, the most so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def mapped_files(suffix: str) -> list[tuple[int, int, int]]:
    """Return (first address, end, bytes in memory) of each mapping of a file whose name ends so; none without /proc."""
    found: list[tuple[int, int, int]] = []
    with suppress(OSError), open("/proc/self/smaps") as file:
        for line in file:
            name, *words = line.split()
            if not name.endswith(":"):
                first, end = (int(word, 16) for word in name.split("-"))
                wanted = line.rstrip().endswith(suffix)
            elif name == "Rss:" and wanted:
                found.append((first, end, int(words[0]) * 1024))
    return found


def peak_resident_bytes() -> int:
    """Return the most bytes of this process in memory so far; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def physical_bytes() -> int:
    """Return the bytes of memory of this machine; 2^63 - 1 where the system does not say, as on Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


class _Output(io.FileIO):
    """Standard output or error that can outlive its reader."""

    outlives = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:  # EIO: of a terminal that was closed
            if not (_Output.outlives and error.errno in (errno.EPIPE, errno.EIO)):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def repair_streams() -> None:
    """Prepare standard input, output and error of a command.

    A closed one becomes the null device, lest a file that is opened gets its number, and what others print; `sys.stdin` stays
    None. A terminal that is not UTF-8 shows ? for other characters.
    """
    is_posix = os.name == "posix"
    for number in range(3) if is_posix else ():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if is_posix and stream is getattr(sys, f"__{name}__"):  # nobody has put another in its place
            encoding = getattr(stream, "encoding", "utf-8")
            errors = "replace" if number == 1 else "backslashreplace"
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            is_lines = os.isatty(number) or number == 2
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=is_lines))
        elif number == 1 and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Lose what standard output still holds if it cannot be written, as on a full disk: Python would fail again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def outlive_readers() -> None:
    """Let this process go on when nobody reads its output any more: what it prints is lost, what it writes to files is not."""
    _Output.outlives = True


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the block with UserError(message) if it takes longer.

    See `end_after`.
    """
    with end_after(seconds, UserError, message):
        yield


@contextmanager
def end_after(seconds: float, error: type[BaseException], *arguments: object) -> Iterator[None]:
    """End the block with an error if it takes longer; again and again, should the block catch it.

    Python code and regular expressions can be ended, in the main thread; not on Windows.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise error(*arguments)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_disk_space(directory: Path, needed: int, spare: int = 0) -> None:
    """Check before anything is written in `directory`, which need not exist yet, that the disk holds it.

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
    """Return whether `error` says that a file could not grow: the disk, the quota or the file size limit is reached."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True  # safetensors and torch report the same as text
    return any(f"os error {number})" in str(error) for number in full) or "No space left on device" in str(error)
