"""An OpenAI-compatible HTTP server over the engine: chat completions, completions, models.

Needs the `serve` extra (starlette, uvicorn). Everything a client can make grow has a limit.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from litmini.errors import UserError
from litmini.generation.batch import check_prompt
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.serving.engine import Busy, Engine, Job
from litmini.serving.openai_protocol import Asked, choice, encode, read_request, usage
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest


@dataclass(frozen=True)
class Limits:
    """What a client may ask of a server."""

    max_batch: int
    max_queue: int
    max_new_tokens: int
    max_context: int
    """Tokens of a prompt and its answer together."""
    max_body_bytes: int
    body_seconds: float = 30.0
    """Time to send a body in."""


class Refused(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Server:
    """The application's state.

    Args:
        model: in evaluation mode.
        tokenizers: by the names that clients give. The first is the bare model's, and taken where none is given; the
            others are those of adapters in `bank`, by the same names.
        api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizers: dict[str, Tokenizer],
        limits: Limits,
        api_key: str | None,
        bank: MultiLoRA | None = None,
    ) -> None:
        config: Any = model.config
        self.tokenizers, self.limits, self.api_key = tokenizers, limits, api_key
        self.base = next(iter(tokenizers))
        self.context = min(limits.max_context, config.max_positions)
        self.engine = Engine(model, bank, limits.max_batch, limits.max_queue)
        self.preparing = ThreadPoolExecutor(2, "litmini-prepare")  # few: what a body becomes is many times its size
        self.started = int(time.time())

    def close(self) -> None:
        """Stop the threads; what is unfinished stays so."""
        self.engine.close()
        self.preparing.shutdown(cancel_futures=True)

    def check_key(self, request: "HTTPRequest") -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Refused(401, "wrong or missing API key.", "authentication_error")

    async def read_body(self, request: "HTTPRequest") -> bytes:
        """The body of a request, of which no more is read than allowed."""
        most = self.limits.max_body_bytes
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refused(415, "expected Content-Type: application/json.")  # a web page cannot send that unasked
        length = request.headers.get("content-length", "0")
        body = bytearray()
        if length.isdigit() and int(length) <= most:
            try:
                async with _time_limit(self.limits.body_seconds):
                    async for part in request.stream():
                        body += part
                        if len(body) > most:
                            break
            except asyncio.TimeoutError:
                raise Refused(408, f"the body took more than {self.limits.body_seconds:.0f} s.") from None
        if len(body) > most or not length.isdigit() or int(length) > most:
            raise Refused(413, f"the body has more than {most:,} bytes.")
        return bytes(body)

    def prepare(self, body: bytes, chat: bool) -> tuple[Asked, str, list[list[int]]]:
        """What a body asks, of which model, and the token ids of its prompts."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not valid JSON: {error}"[:300]) from None
        try:
            asked = read_request(content, chat, self.limits.max_new_tokens)
            name = asked.model or self.base
            if name not in self.tokenizers:
                raise Refused(404, f"no model {name!r:.100}; there are: {', '.join(self.tokenizers)}.")
            prompts = encode(asked, self.tokenizers[name])
            for prompt in prompts:
                check_prompt(prompt, self.context)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return asked, name, prompts

    async def models(self, request: "HTTPRequest") -> dict[str, Any]:
        """What there is to talk to."""
        self.check_key(request)
        listing = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "litmini"} for name in self.tokenizers
        ]
        return {"object": "list", "data": listing}

    async def complete(self, request: "HTTPRequest", chat: bool) -> dict[str, Any] | AsyncIterator[str]:
        """Check, queue, answer: the body of the response, or the events of a stream."""
        self.check_key(request)
        body = await self.read_body(request)
        loop = asyncio.get_running_loop()
        asked, name, prompts = await loop.run_in_executor(self.preparing, self.prepare, body, chat)
        answer = Answering(self, asked, name, prompts)
        try:
            self.engine.submit(answer.jobs)
        except Busy:
            raise Refused(
                429, f"{self.limits.max_queue} requests are waiting; try again.", "rate_limit_error"
            ) from None
        return answer.stream() if asked.stream else await answer.whole(request)


class Answering:
    """One request while its replies are made."""

    def __init__(self, server: Server, asked: Asked, name: str, prompts: list[list[int]]) -> None:
        self.server, self.asked, self.prompts = server, asked, prompts
        self.tokenizer = server.tokenizers[name]
        self.moved = moved = asyncio.Event()  # the jobs know it, not this object: no cycle keeps requests in memory
        loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []
        for number, prompt in enumerate(p for p in prompts for _ in range(asked.n)):
            room = min(asked.sampling.max_new_tokens, server.context - len(prompt))
            seed = None if asked.sampling.seed is None else (asked.sampling.seed + number) % 2**63
            sampling = replace(asked.sampling, max_new_tokens=room, seed=seed)
            adapter = None if name == server.base else name
            reply = Request(prompt, sampling, self.tokenizer.stop_ids, self.tokenizer, adapter)
            self.jobs.append(Job(reply, lambda: loop.call_soon_threadsafe(moved.set)))
        kind = "chat.completion" if asked.chat else "text_completion"
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + ".chunk" * (asked.chat and asked.stream),
            "created": int(time.time()),
            "model": name,
        }

    def leave(self) -> None:
        """The request is over, one way or another: its slots are free."""
        for job in self.jobs:
            self.server.engine.cancel(job)

    def check(self) -> None:
        if error := next((job.error for job in self.jobs if job.error is not None), None):
            raise Refused(500, f"{type(error).__name__}: {error}"[:300], "server_error")

    async def whole(self, request: "HTTPRequest") -> dict[str, Any]:
        """The response, once all of it is there; nothing if the client leaves before."""
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
        replies = [job.reply for job in self.jobs]
        choices = [choice(self.asked, i, r.text, r.finish, r.logprobs, self.tokenizer) for i, r in enumerate(replies)]
        return {**self.head, "choices": choices, "usage": usage(self.prompts, replies)}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events. When the client hangs up, this is closed and `leave` frees its slots."""
        sent, ended = [0] * len(self.jobs), [False] * len(self.jobs)
        try:
            while not all(ended):
                await self.moved.wait()
                self.moved.clear()
                self.check()
                for i, job in enumerate(self.jobs):
                    done, piece = job.done, job.reply.take()
                    if ended[i] or not (done or piece):
                        continue
                    logprobs = job.reply.logprobs[sent[i] :]
                    sent[i], ended[i] = sent[i] + len(logprobs), done
                    part = choice(self.asked, i, piece, job.reply.finish if done else None, logprobs, self.tokenizer)
                    yield _event({**self.head, "choices": [part]})
            if self.asked.usage:
                replies = [job.reply for job in self.jobs]
                yield _event({**self.head, "choices": [], "usage": usage(self.prompts, replies)})
        except Refused as error:  # the status line has gone out already
            yield _event(error_body(str(error), error.kind))
        finally:
            self.leave()
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """asyncio.timeout, which Python 3.10 does not have."""
    task = asyncio.current_task()
    assert task is not None, "runs within a request"
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def make_app(server: Server) -> "Starlette":
    """The ASGI application; its shutdown stops the engine."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def models(request: "HTTPRequest") -> Response:
        return JSONResponse(await server.models(request))

    async def complete(request: "HTTPRequest") -> Response:
        answer = await server.complete(request, chat=request.url.path.endswith("/chat/completions"))
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return StreamingResponse(answer, media_type="text/event-stream")

    async def refused(request: "HTTPRequest", error: Exception) -> Response:
        assert isinstance(error, Refused), error
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        return JSONResponse(error_body(str(error), error.kind), error.status, headers)

    async def gone(request: "HTTPRequest", error: Exception) -> Response:
        return Response(status_code=499)

    @asynccontextmanager
    async def lifespan(app: "Starlette") -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    routes = [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: refused, ClientDisconnect: gone}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
