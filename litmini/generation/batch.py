"""Requests that are decoded together; they join and leave between steps.

A step adds a token to each request; on a GPU several, as the host need not wait for each.
"""

import contextlib
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from litmini.distributed.fsdp import is_sharded
from litmini.errors import UserError, counted
from litmini.generation.decoding import AHEAD, Captured, Decoding, finite_tokens, is_gpu
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.generation.sampling import Sampler
from litmini.generation.speculative import Draft
from litmini.methods.heads import possible_heads
from litmini.ops.kv_cache import CHUNK, KVCache

NOT_FINITE = (
    "the model's logits are not finite: weights of the model or its adapter are NaN or infinite, or values overflow in this "
    "dtype. litmini.load(..., check_finite=True) and --check_finite true name such weights."
)


class Batch:
    """Requests in progress over one cache.

    Args:
        model: in evaluation mode. One thread at a time may use it.
        draft: proposes tokens for speculative decoding of a single greedy request.
        chunk: most tokens of a prompt in one forward.
        multi_lora: the adapters that requests name.
    """

    def __init__(
        self, model: nn.Module, draft: Draft | None = None, chunk: int = CHUNK, multi_lora: MultiLoRA | None = None
    ) -> None:
        config: Any = model.config
        self.model, self.config, self.draft, self.chunk, self.multi_lora = model, config, draft, chunk, multi_lora
        self.requests: list[Request] = []
        self.cache: KVCache | None = None
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.on_gpu = is_gpu(self.device)
        if self.on_gpu and torch.is_autocast_enabled(self.device.type):  # FlashAttention has no fp32
            self.dtype = torch.get_autocast_dtype(self.device.type)
        self._decoding: Decoding | None = None
        self._captured: Captured | None = None
        # inference_mode saves a tenth of each operation; weights that FSDP gathers in it could not be trained afterwards
        self._without_gradients: Any = torch.no_grad if is_sharded(model) else torch.inference_mode

    def add(self, requests: list[Request]) -> None:
        """Add requests: their prompts are read together, in one forward for each chunk of tokens, and give the first tokens.

        Requests that this token completes do not join the batch.

        Raises:
            UserError: a prompt is empty, or fills the model's context.
        """
        for request in requests:
            check_prompt(request.prompt, self.config.max_positions, self.config.vocab_size)
        if self.draft is not None:
            _check_draft([*self.requests, *requests])
        for request in requests:
            request.max_new_tokens = min(request.max_new_tokens, self.config.max_positions - len(request.prompt))
            request.generator = torch.Generator(self.device)
            seed = request.sampling.seed
            request.generator.seed() if seed is None else request.generator.manual_seed(seed)
        capacities = [len(r.prompt) + r.max_new_tokens for r in requests]
        cache = KVCache(self.config, len(requests), capacities, self.dtype, self.device, self.chunk, self.on_gpu)
        longest = max(len(r.prompt) for r in requests)
        tokens = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for r in requests], device=self.device)
        lengths = torch.tensor([[len(r.prompt)] for r in requests], device=self.device)  # (B, 1)
        positions = torch.arange(longest, device=self.device) - (longest - lengths)  # (B, T), below 0: padding
        settings, generators = [r.sampling for r in requests], [r.generator for r in requests]
        sampler = Sampler(settings, [r.prompt for r in requests], generators, self.device)
        with self._without_gradients():
            with self._adapters(requests):
                logits = prefill(self.model, tokens, positions, cache)
            chosen = finite_tokens(sampler.choose(logits), logits).tolist()  # CPU-GPU sync point
            for request, token, row in zip(requests, chosen, logits, strict=True):
                _push(request, token, row)
            going = [(i, r) for i, r in enumerate(requests) if r.finish is None]
            rows = [(cache, i, len(r.tokens) - 1) for i, r in going]
            self._gather(self._rows() + rows, [*self.requests, *(r for _, r in going)])
        if self.draft is not None:
            self.draft.begin(cache.capacity)

    def step(self) -> None:
        """Add the next token to every request, on a GPU or with a draft one or more; those that end leave the batch."""
        with self._without_gradients():
            if self.draft is not None:
                self._step_drafted(self.draft, self.requests[0])
            else:
                self._step_together()
        self.drop()

    def _step_together(self) -> None:
        """Decode until the first request may be complete, at most `AHEAD` tokens on a GPU; then give them to the requests."""
        # the logits that requests get are those of one token
        one = not self.on_gpu or any(r.wants_logits for r in self.requests)
        remaining = min(r.remaining_tokens for r in self.requests)
        count = 1 if one else min(AHEAD, remaining)
        with self._adapters(self.requests):
            if self._decoding is None:
                assert self.cache is not None
                # adapters come and go, and shards are gathered in each forward; a graph costs as much as some tokens
                graph = self.on_gpu and self.multi_lora is None and not is_sharded(self.model) and remaining >= AHEAD
                self._decoding = Decoding(self.model, self.cache, self.requests, graph, self._captured)
                self._captured = self._decoding.graph or self._captured
            tokens, logits = self._decoding.run(count)
        for request, row, chosen in zip(self.requests, logits, tokens, strict=True):
            for token in chosen:
                if request.finish is None:
                    _push(request, token, row)

    def _step_drafted(self, draft: Draft, request: Request) -> None:
        """Verify the drafted tokens in one forward; accept those that greedy decoding would choose."""
        assert self.cache is not None
        last = len(request.tokens) - 1
        start = self.cache.resume(last)
        most = min(request.remaining_tokens, self.chunk) - 1  # with the last token they are one forward
        # states that hold rejected tokens read those accepted again, and without a draft keep them
        drafted = draft.propose(request.tokens, most) if start == last else []
        # a draft model may have more rows
        drafted = list(takewhile(lambda token: token < self.config.vocab_size, drafted))
        tokens = torch.tensor([[*request.tokens[start:], *drafted]], device=self.device)  # (1, T)
        positions = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
        with self._adapters([request]):
            logits = self.model(tokens, positions, cache=self.cache)[0, last - start :].float()  # (1 + drafted, vocab)
        chosen = finite_tokens(logits.argmax(-1), logits).tolist()  # CPU-GPU sync point
        for row, token, proposed in zip(logits, chosen, [*drafted, None], strict=True):
            _push(request, token, row)
            if token != proposed or request.finish:
                break  # rejected positions are overwritten in the cache

    def step_apart(self) -> None:
        """`step` for each request alone, after it has failed for all together; an error ends the request that causes it."""
        rows: list[tuple[KVCache, int, int]] = []
        for row, request in zip(self._rows(), self.requests, strict=True):
            single = Batch(self.model, None, self.chunk, self.multi_lora)
            try:
                with self._without_gradients():
                    single._gather([row], [request])
                single.step()
            except Exception as error:
                request.fail(error)
            if request.finish is None and single.cache is not None:
                rows.append((single.cache, 0, len(request.tokens) - 1))
        with self._without_gradients():
            self._gather(rows, [request for request in self.requests if request.finish is None])

    def drop(self) -> None:
        """Remove requests that have ended."""
        going = [(row, r) for row, r in zip(self._rows(), self.requests, strict=True) if r.finish is None]
        if len(going) < len(self.requests):
            with self._without_gradients():
                self._gather([row for row, _ in going], [r for _, r in going])

    def _adapters(self, requests: list[Request]) -> contextlib.AbstractContextManager[None]:
        """Apply to each row the adapter that its request names."""
        return (
            contextlib.nullcontext() if self.multi_lora is None else self.multi_lora.use([r.adapter for r in requests])
        )

    def _rows(self) -> list[tuple[KVCache, int, int]]:
        return [(self.cache, i, len(r.tokens) - 1) for i, r in enumerate(self.requests)] if self.cache else []

    def _gather(self, rows: list[tuple[KVCache, int, int]], requests: list[Request]) -> None:
        if rows and all(cache is rows[0][0] for cache, _, _ in rows) and len(rows) == rows[0][0].batch:
            self.cache = rows[0][0]  # nothing to rearrange
        else:
            self.cache = KVCache.gather(self.config, rows) if rows else None
        self.requests, self._decoding = requests, None


def _push(request: Request, token: int, logits: Tensor) -> None:
    """Give a request its next token, with the logits (vocab,) behind it; an error ends this request, not its neighbours."""
    try:
        if token < 0:
            raise UserError(NOT_FINITE)
        request.push(token, logits)
    except Exception as error:
        request.fail(error)


def check_prompt(prompt: list[int], context: int, vocab_size: int) -> None:
    """Raise a `UserError` for a prompt that is empty, fills a context of so many tokens, or has ids beyond the vocabulary."""
    if not prompt:
        raise UserError("the prompt is empty.")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {counted(len(prompt), 'token')}, the model's context {context}: "
            f"no token remains for a completion."
        )
    check_ids(prompt, vocab_size)


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Raise a `UserError` for token ids that a model of so many rows does not have."""
    if wrong := sorted({token for token in ids if not 0 <= token < vocab_size}):
        raise UserError(
            f"the text has the token ids {', '.join(map(str, wrong[:5]))}, but the model has rows for 0 to {vocab_size - 1} "
            f"only: the tokenizer does not belong to this model."
        )


def _check_draft(requests: list[Request]) -> None:
    first = requests[0].sampling
    if len(requests) > 1 or first.temperature or first.repetition_penalty != 1.0:
        raise UserError("a draft is for one prompt at a time, with temperature 0 and without repetition penalty.")


def prefill(model: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Read prompts (B, T) at positions (B, T) into the cache, in parts.

    Returns:
        The logits (B, vocab) fp32 of the tokens that follow; the head reads the last positions only.
    """
    parts = list(zip(tokens.split(cache.chunk, 1), positions.split(cache.chunk, 1), strict=True))
    for part, where in parts[:-1]:
        with _head_reads(model, 0):
            model(part, where, cache=cache)
    with _head_reads(model, 1):
        logits: Any = model(*parts[-1], cache=cache)
    return logits[:, -1].float()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _head_reads(model: nn.Module, count: int) -> Iterator[None]:
    """Let the output head read only the last `count` positions. A user's model whose head is not found reads all."""
    if len(names := possible_heads(model)) != 1:
        yield
        return

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        last = args[0][:, args[0].shape[1] - count :]
        return last.clone(memory_format=torch.contiguous_format), *args[1:]  # with the strides of a single token

    hook = model.get_submodule(names[0]).register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
