"""One HTTP request in progress: its jobs in the engine, and the response or the events of a stream made of them."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from litmini.errors import UserError
from litmini.generation.request import Request
from litmini.serving.engine import Engine, Job
from litmini.serving.openai_protocol import ENTRY_BYTES, CompletionSettings, choice, n_logprobs, usage
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest


class Refused(Exception):
    """A request that gets an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def error_body(message: str, kind: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Completion:
    """One HTTP request in progress: a job for each of its choices."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: CompletionSettings,
        name: str,
        adapter: str | None,
        prompts: list[list[int]],
        context: int,
        max_output_bytes: int,
    ) -> None:
        """
        Args:
            name: of the model, as the client called it.
            adapter: its name in the engine; None: the base.
            prompts: token ids.
            context: most tokens of a prompt and its completion.
            max_output_bytes: most log-probabilities that are kept until they are sent.
        """
        self.engine, self.tokenizer, self.settings, self.prompts = engine, tokenizer, settings, prompts
        self.moved = moved = asyncio.Event()  # the jobs know it, not this object: no cycle keeps requests in memory
        loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []
        n_jobs = len(prompts) * settings.n
        max_kept = None
        if settings.stream and settings.sampling.logprobs is not None:  # else they are kept for the whole response
            max_kept = max(1, max_output_bytes // (ENTRY_BYTES * n_logprobs(settings, n_jobs)))
        for number, prompt in enumerate(p for p in prompts for _ in range(settings.n)):
            remaining = min(settings.sampling.max_new_tokens, context - len(prompt))
            seed = None if settings.sampling.seed is None else (settings.sampling.seed + number) % 2**63
            sampling = replace(settings.sampling, max_new_tokens=remaining, seed=seed)
            request = Request(prompt, sampling, self.tokenizer.stop_ids, self.tokenizer, adapter)
            self.jobs.append(Job(request, lambda: loop.call_soon_threadsafe(moved.set), max_kept))
        kind = "chat.completion" if settings.chat else "text_completion"
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if settings.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + ".chunk" * (settings.chat and settings.stream),
            "created": int(time.time()),
            "model": name,
        }

    def tokens(self) -> tuple[int, int]:
        """Return the tokens of the prompts, and those of the completions so far."""
        return sum(map(len, self.prompts)), sum(len(job.request.ids) for job in self.jobs)

    def leave(self) -> None:
        """Free the slots of the request."""
        for job in self.jobs:
            self.engine.cancel(job)

    def check(self) -> None:
        """Raise `Refused` if a job has failed."""
        if error := next((job.error for job in self.jobs if job.error is not None), None):
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise Refused(500, f"{name}{error}"[:300], "server_error")

    async def whole(self, request: "HTTPRequest") -> dict[str, Any]:
        """Return the response when it is complete; nothing if the client leaves before."""
        try:
            while not all(job.done for job in self.jobs):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.moved.wait(), 0.5)
                self.moved.clear()
                if await request.is_disconnected():
                    return {}
            self.check()
        finally:
            self.leave()
        requests = [job.request for job in self.jobs]
        choices = [
            choice(self.settings, i, r.text, r.finish, r.logprobs, self.tokenizer) for i, r in enumerate(requests)
        ]
        return {**self.head, "choices": choices, "usage": usage(self.prompts, requests)}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events. When the client hangs up, this is closed and `leave` frees its slots."""
        ended = [False] * len(self.jobs)
        try:
            while not all(ended):
                await self.moved.wait()
                self.moved.clear()
                self.check()
                for i, job in enumerate(self.jobs):
                    done = job.done
                    # With tools, a text may turn out to be calls, so it is sent as a whole
                    piece = job.request.take() if done or not self.settings.tools else ""
                    if ended[i] or not (done or piece or job.request.logprobs):
                        continue
                    logprobs, ended[i] = job.request.take_logprobs(), done
                    part = choice(
                        self.settings, i, piece, job.request.finish if done else None, logprobs, self.tokenizer
                    )
                    yield _event({**self.head, "choices": [part]})
            if self.settings.usage:
                requests = [job.request for job in self.jobs]
                yield _event({**self.head, "choices": [], "usage": usage(self.prompts, requests)})
        except Refused as error:  # the status line has gone out already
            yield _event(error_body(str(error), error.kind))
        finally:
            self.leave()
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
