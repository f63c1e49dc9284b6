"""Requests that come and go, on a thread of their own: a queue of limited length before one `Batch` for each model."""

import copy
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from litmini.generation import Batch
from litmini.reply import Reply


class Busy(Exception):
    """The queue is full."""


class Job:
    """One reply on its way through the engine.

    Args:
        model: which of the engine's models speaks.
        news: called on the engine's thread whenever there may be more of the reply, and when `done` or `error` is set.
    """

    def __init__(self, model: str, reply: Reply, news: Callable[[], object]) -> None:
        self.model, self.reply, self.news = model, reply, news
        self.done = False
        self.cancelled = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self.error, self.done = error, True
        self.news()


class Engine:
    """Answers jobs: `max_batch` at a time, while at most `max_queue` wait.

    Args:
        models: by name, in evaluation mode. Each has a batch of its own, and they take turns, step by step.
    """

    def __init__(self, models: dict[str, nn.Module], max_batch: int, max_queue: int) -> None:
        self.models, self.max_batch, self.max_queue = models, max_batch, max_queue
        self.waiting: deque[Job] = deque()
        self.running: dict[str, list[Job]] = {name: [] for name in models}
        self._batches = {name: Batch(model) for name, model in models.items()}
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
        """Nobody waits for it any more: it leaves before the next step."""
        job.cancelled = True
        with self._changed:
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
                self._changed.wait_for(lambda: self._closed or self.waiting or any(self.running.values()))
                if self._closed:
                    return
                joining = self._admit()
            for job in joining:
                with self._guard(job.model, [job]):
                    self._batches[job.model].add([job.reply])
                    self.running[job.model].append(job)
            for name, jobs in self.running.items():
                if jobs:
                    with self._guard(name, jobs):
                        self._step(name)
                    self.running[name] = [job for job in jobs if not job.done]

    def _admit(self) -> list[Job]:
        """Take what may join now off the queue; those that were cancelled there are gone."""
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        free = self.max_batch - sum(map(len, self.running.values()))
        return [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]

    def _step(self, name: str) -> None:
        batch, jobs = self._batches[name], self.running[name]
        for job in jobs:
            if job.cancelled:
                job.reply.end("stop")
        batch.drop()
        if batch.replies:
            batch.step()
        for job in jobs:
            job.end() if job.reply.finish else job.news()

    @contextmanager
    def _guard(self, name: str, jobs: list[Job]) -> Iterator[None]:
        """An error, such as memory that ran out, ends the jobs that it happened to, not the engine."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            if jobs is self.running[name]:
                self._batches[name] = Batch(self.models[name])
            for job in jobs:
                job.end(error)


def twin(model: nn.Module) -> nn.Module:
    """A model of its own, to be given an adapter, whose weights are those of `model` itself: no second copy in memory."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
