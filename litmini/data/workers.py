"""A function applied by several processes, whose results come in order. Imports nothing heavy: spawned processes do, too."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, Literal, TypeVar

from litmini.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


def map_in_order(
    make_function: Callable[[], Callable[[A], B]], items: Iterable[A], workers: int, method: Literal["fork", "spawn"]
) -> Iterator[B]:
    """Yield the function's result for each item, in order. A few items for each process are in memory at a time.

    The processes end with this one, even if it is killed.

    Args:
        make_function: called once in each process; "spawn" pickles it, "fork" does not.
        method: "fork" needs no imports, but must not be used when threads hold locks; "spawn" imports what is pickled.

    Raises:
        UserError: a process was killed.
    """
    pending: deque[Future[B]] = deque()
    with ProcessPoolExecutor(workers, get_context(method), _start_worker, (make_function,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_call, item))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenises was killed, most likely for lack of memory: free some. prepare_data.py can do with "
                "fewer --workers, and resumes if you type its command again."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _start_worker(make_function: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make_function()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
