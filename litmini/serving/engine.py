"""Requests that come and go, on a thread of their own: a queue of limited length before one `Batch`."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from litmini.generation.batch import Batch
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request


class Busy(Exception):
    """The queue is full."""


class Job:
    """One reply on its way through the engine.

    Args:
        news: called on the engine's thread whenever there may be more of the reply, and when `done` is set.
    """

    def __init__(self, reply: Request, news: Callable[[], object]) -> None:
        self.reply, self.news = reply, news
        self.done = False
        self.cancelled = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self.error, self.done = error, True
        self.news()


class Engine:
    """Answers jobs: `max_batch` at a time, while at most `max_queue` wait.

    Args:
        model: in evaluation mode.
        bank: its adapters, which replies name.
    """

    def __init__(self, model: nn.Module, bank: MultiLoRA | None, max_batch: int, max_queue: int) -> None:
        self.model, self.bank, self.max_batch, self.max_queue = model, bank, max_batch, max_queue
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch = Batch(model, bank=bank)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="litmini-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            Busy: there is no room for them.
        """
        with self._changed:
            if len(self.waiting) + len(jobs) > self.max_queue:
                raise Busy
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue now, or the batch before the next step."""
        job.cancelled = True
        with self._changed:
            self.waiting = deque(waiting for waiting in self.waiting if waiting is not job)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step in hand; what is unfinished stays so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.waiting or self.running)
                if self._closed:
                    return
                joining = self._admit()
            for job in joining:
                with self._guard([job]):
                    self.batch.add([job.reply])
                    self.running.append(job)
            with self._guard(self.running):
                self._step()
            self.running = [job for job in self.running if not job.done]

    def _admit(self) -> list[Job]:
        """Take what may join now off the queue."""
        return [self.waiting.popleft() for _ in range(min(self.max_batch - len(self.running), len(self.waiting)))]

    def _step(self) -> None:
        for job in self.running:
            if job.cancelled:
                job.reply.end("stop")
        self.batch.drop()
        if self.batch.replies:
            self.batch.step()
        for job in self.running:
            job.end() if job.reply.finish else job.news()

    @contextmanager
    def _guard(self, jobs: list[Job]) -> Iterator[None]:
        """An error, such as memory that ran out, ends the jobs that it happened to, not the engine."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            if jobs is self.running:
                self.batch = Batch(self.model, bank=self.bank)
            for job in jobs:
                job.end(error)
