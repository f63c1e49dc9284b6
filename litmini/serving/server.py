"""An OpenAI-compatible HTTP server over the engine: chat completions, completions, models.

Needs the `serve` extra (starlette, uvicorn). Everything a client can make grow has a limit.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError, counted
from litmini.generation.batch import check_prompt
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.prompts import check_utf8
from litmini.serving.access import AllowedHosts, has_key
from litmini.serving.completion import Completion, Refused, error_body
from litmini.serving.engine import Busy, Engine
from litmini.serving.log import RequestLog
from litmini.serving.openai_protocol import CompletionSettings, check_output, encode, read_request
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest


@dataclass(frozen=True)
class Limits:
    """Limits of what a client may ask."""

    max_batch: int
    max_queue: int
    max_new_tokens: int
    max_context: int
    """Tokens of a prompt and its completion together."""
    max_body_bytes: int
    body_seconds: float = 30.0
    """Time to send a body in."""
    max_output_bytes: int = 8 * 2**20
    """Most log-probabilities that are kept for a client that has not received them."""


class Server:
    """The application's state.

    Args:
        model: in evaluation mode.
        tokenizers: by the names that clients give. The first is the bare model's, and taken where none is given; the
            others are those of adapters in `multi_lora`, by the same names.
        api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
        hosts: the names of this server in `Host` headers.
        defaults: model -> how it samples where a request does not say; greedy where it is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizers: dict[str, Tokenizer],
        limits: Limits,
        api_key: str | None,
        multi_lora: MultiLoRA | None = None,
        hosts: AllowedHosts | None = None,
        defaults: dict[str, SamplingConfig] | None = None,
    ) -> None:
        config: Any = model.config
        self.tokenizers, self.limits, self.api_key, self.hosts = tokenizers, limits, api_key, hosts or AllowedHosts()
        self.vocab_size = config.vocab_size
        self.base = next(iter(tokenizers))
        self.defaults = defaults or {}
        self.context = min(limits.max_context, config.max_positions)
        self.engine = Engine(model, multi_lora, limits.max_batch, limits.max_queue)
        self.preparing = ThreadPoolExecutor(2, "litmini-prepare")  # few: what a body becomes is many times its size
        self.log = RequestLog()
        self.started = int(time.time())

    def close(self) -> None:
        """Stop the threads; what is unfinished stays so."""
        self.engine.close()
        self.preparing.shutdown(cancel_futures=True)
        self.log.close()

    def check_access(self, request: "HTTPRequest") -> None:
        """Check the name that the client calls this server by, and its key."""
        if (host := request.headers.get("host", "")) not in self.hosts:
            hint = "start the server with --allowed_hosts '[NAME]' if it is."
            raise Refused(403, f"{host!r:.100} is no name of this server; {hint}", "permission_error")
        if self.api_key is not None and not has_key(request.headers.get("authorization", ""), self.api_key):
            raise Refused(401, "wrong or missing API key.", "authentication_error")

    async def read_body(self, request: "HTTPRequest") -> bytes:
        """Read the body of a request, no more of it than allowed."""
        import anyio  # comes with starlette; asyncio.timeout came with Python 3.11

        max_bytes = self.limits.max_body_bytes
        if not request.headers.get("content-type", "").startswith("application/json"):
            # a web page of another site cannot send that
            raise Refused(415, "expected Content-Type: application/json.")
        length = request.headers.get("content-length", "0")
        body = bytearray()
        if length.isdigit() and int(length) <= max_bytes:
            try:
                with anyio.fail_after(self.limits.body_seconds):
                    async for part in request.stream():
                        body += part
                        if len(body) > max_bytes:
                            break
            except TimeoutError:
                raise Refused(408, f"the body took more than {self.limits.body_seconds:.0f} s.") from None
        if len(body) > max_bytes or not length.isdigit() or int(length) > max_bytes:
            raise Refused(413, f"the body has more than {max_bytes:,} bytes.")
        return bytes(body)

    def prepare(self, body: bytes, chat: bool) -> tuple[CompletionSettings, str, list[list[int]]]:
        """Return the settings in a body, the model's name, and the token ids of its prompts."""
        try:
            content = json.loads(body.decode("utf-8-sig"))  # of bytes, json would take lone surrogates, too
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not valid JSON: {error}"[:300]) from None
        try:
            check_utf8(content)
            settings = read_request(content, chat, self.limits.max_new_tokens, self.default_sampling)
            name = settings.model or self.base
            self.describe(name)
            prompts = encode(settings, self.tokenizers[name])
            for prompt in prompts:
                check_prompt(prompt, self.context, self.vocab_size)
            check_output(settings, prompts, self.context, self.limits.max_output_bytes)
        except UserError as error:
            raise Refused(400, str(error)) from None
        except RecursionError:
            raise Refused(400, "the body is nested too deeply.") from None
        return settings, name, prompts

    def default_sampling(self, name: str) -> SamplingConfig:
        """Return how the model of a request samples where the request does not say."""
        return self.defaults.get(name or self.base, SamplingConfig())

    async def models(self, request: "HTTPRequest") -> dict[str, Any]:
        """List the base model and its adapters."""
        self.check_access(request)
        return {"object": "list", "data": [self.describe(name) for name in self.tokenizers]}

    async def model(self, request: "HTTPRequest") -> dict[str, Any]:
        """Return one entry of the list of models."""
        self.check_access(request)
        return self.describe(request.path_params["name"])

    def describe(self, name: str) -> dict[str, Any]:
        """Return what clients read about a model.

        Raises:
            Refused: there is none of this name.
        """
        if name not in self.tokenizers:
            raise Refused(404, f"no model {name!r:.100}; available: {', '.join(self.tokenizers)}.")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "litmini"}

    async def complete(self, request: "HTTPRequest", chat: bool) -> dict[str, Any] | AsyncIterator[str]:
        """Check and queue a request; return the body of the response, or the events of a stream."""
        started = time.perf_counter()
        self.check_access(request)
        body = await self.read_body(request)
        loop = asyncio.get_running_loop()
        settings, name, prompts = await loop.run_in_executor(self.preparing, self.prepare, body, chat)
        adapter = None if name == self.base else name
        tokenizer = self.tokenizers[name]
        most = self.limits.max_output_bytes
        completion = Completion(self.engine, tokenizer, settings, name, adapter, prompts, self.context, most)
        try:
            self.engine.submit(completion.jobs)
        except Busy:
            raise Refused(
                429, f"{self.limits.max_queue} requests are waiting; try again.", "rate_limit_error"
            ) from None
        if settings.stream:
            return self._logged(completion, request, started)
        response = await completion.whole(request)
        self._log(completion, request, started, 200 if response else 499)
        return response

    async def _logged(self, completion: Completion, request: "HTTPRequest", started: float) -> AsyncIterator[str]:
        """Yield the events of a stream, and log the request at its end."""
        try:
            async with aclosing(completion.stream()) as events:  # a client that leaves frees its slots at once
                async for event in events:
                    yield event
        finally:
            self._log(completion, request, started)

    def _log(self, completion: Completion, request: "HTTPRequest", started: float, status: int = 200) -> None:
        read, written = completion.tokens()
        seconds = time.perf_counter() - started
        self.log.add(
            request, status, f"{completion.head['model']}, {read} + {counted(written, 'token')}, {seconds:.1f} s"
        )


def make_app(server: Server) -> "Starlette":
    """Return the ASGI application; its shutdown stops the engine."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def models(request: "HTTPRequest") -> Response:
        return JSONResponse(await server.models(request))

    async def model(request: "HTTPRequest") -> Response:
        return JSONResponse(await server.model(request))

    async def complete(request: "HTTPRequest") -> Response:
        response = await server.complete(request, chat=request.url.path.endswith("/chat/completions"))
        if isinstance(response, dict):
            return JSONResponse(response)
        return StreamingResponse(response, media_type="text/event-stream")

    async def refused(request: "HTTPRequest", error: Exception) -> Response:
        assert isinstance(error, Refused), error
        server.log.add(request, error.status, error.kind)  # the message quotes what the client sent
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
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: refused, ClientDisconnect: gone}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
