"""A thread that decodes one `Batch`, and a queue of limited length before it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import nn

from litmini.errors import UserError
from litmini.generation.batch import Batch
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.serving.log import log_error


class Busy(Exception):
    """The queue is full."""


class Job:
    """A request in the engine.

    Args:
        news: called on the engine's thread whenever there may be more text, and when `done` is set.
        max_kept: most tokens whose log-probabilities are kept for a client that does not take them; None: any number.
    """

    def __init__(self, request: Request, news: Callable[[], object], max_kept: int | None = None) -> None:
        self.request, self.news, self.max_kept = request, news, max_kept
        self.done = False
        self.cancelled = False
        self.error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self.error, self.done = error, True
        self.news()


class Engine:
    """Runs `max_batch` jobs at a time, while at most `max_queue` wait.

    Args:
        model: in evaluation mode.
        multi_lora: its adapters, which requests name.
    """

    def __init__(self, model: nn.Module, multi_lora: MultiLoRA | None, max_batch: int, max_queue: int) -> None:
        self.model, self.multi_lora, self.max_batch, self.max_queue = model, multi_lora, max_batch, max_queue
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch = Batch(model, multi_lora=multi_lora)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="litmini-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            Busy: the queue is full.
        """
        with self._changed:
            if len(self.waiting) + len(jobs) > self.max_queue:
                raise Busy
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Remove a job from the queue now, or from the batch before the next step."""
        job.cancelled = True
        with self._changed:
            self.waiting = deque(waiting for waiting in self.waiting if waiting is not job)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current step; unfinished jobs stay unfinished."""
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
                    self.batch.add([job.request])
                    self.running.append(job)
            with self._guard(self.running):
                self._step()
            self.running = [job for job in self.running if not job.done]

    def _admit(self) -> list[Job]:
        """Take the jobs that join the batch off the queue."""
        return [self.waiting.popleft() for _ in range(min(self.max_batch - len(self.running), len(self.waiting)))]

    def _step(self) -> None:
        for job in self.running:
            if job.cancelled:
                with self._guard([job]):
                    job.request.end("stop")
        self.batch.drop()
        if self.batch.requests:
            try:
                self.batch.step()
            except Exception as error:
                if len(self.batch.requests) == 1:
                    raise
                log_error(error)
                self.batch.step_apart()
        for job in (job for job in self.running if not job.done):
            with self._guard([job]):
                if job.request.error is not None:
                    raise job.request.error
                if job.max_kept is not None and len(job.request.logprobs) > job.max_kept:
                    job.request.finish = "error"
                    job.end(UserError("the client does not receive what it asked for."))  # no matter for the log
                elif job.request.finish:
                    job.end()
                else:
                    job.news()
        self.batch.drop()

    @contextmanager
    def _guard(self, jobs: list[Job]) -> Iterator[None]:
        """Let an error, such as out of memory, end `jobs` but not the engine."""
        try:
            yield
        except Exception as error:
            log_error(error)
            if jobs is self.running:
                self.batch = Batch(self.model, multi_lora=self.multi_lora)
            for job in jobs:
                job.request.finish = job.request.finish or "error"
                with suppress(Exception):  # such as that the event loop has ended
                    job.end(error)
