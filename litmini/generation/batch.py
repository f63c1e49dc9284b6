"""A batch of requests that is decoded step by step; requests may join and leave between steps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from litmini.distributed.fsdp import is_sharded
from litmini.errors import UserError
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.generation.speculative import Draft
from litmini.ops.cross_entropy import IGNORE
from litmini.ops.kv_cache import CHUNK, KVCache


class Batch:
    """Answers in the making.

    Args:
        model: in evaluation mode.
        draft: proposes tokens, for a single greedy reply that comes faster and is the same.
    """

    def __init__(
        self, model: nn.Module, draft: Draft | None = None, chunk: int = CHUNK, bank: MultiLoRA | None = None
    ) -> None:
        config: Any = model.config
        self.model, self.config, self.draft, self.chunk, self.bank = model, config, draft, chunk, bank
        self.replies: list[Request] = []
        self.cache: KVCache | None = None
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # inference_mode takes a tenth off each operation; weights that FSDP gathers in it could not be trained afterwards
        self._without_gradients: Any = torch.no_grad if is_sharded(model) else torch.inference_mode

    def add(self, replies: list[Request]) -> None:
        """Let further replies join: their prompts are read, together, in one forward for each chunk of tokens.

        Raises:
            UserError: a prompt is empty, or leaves no room in the model's context.
        """
        for reply in replies:
            check_prompt(reply.prompt, self.config.max_positions)
        if self.draft is not None:
            _check_draft([*self.replies, *replies])
        for reply in replies:
            reply.room = min(reply.room, self.config.max_positions - len(reply.prompt))
            reply.generator = torch.Generator(self.device)
            seed = reply.sampling.seed
            reply.generator.seed() if seed is None else reply.generator.manual_seed(seed)
        capacity = max(len(r.prompt) + r.room for r in replies)
        cache = KVCache(self.config, len(replies), capacity, self.dtype, self.device, self.chunk)
        longest = max(len(r.prompt) for r in replies)
        tokens = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for r in replies], device=self.device)
        lengths = torch.tensor([[len(r.prompt)] for r in replies], device=self.device)  # (B, 1)
        positions = torch.arange(longest, device=self.device) - (longest - lengths)  # (B, T), below 0: padding
        rows = [(cache, i, len(r.prompt) - 1) for i, r in enumerate(replies)]
        with self._without_gradients():
            with self._adapters(replies):
                prefill(self.model, tokens[:, :-1], positions[:, :-1], cache)
            self._gather(self._rows() + rows, [*self.replies, *replies])
        if self.draft is not None:
            self.draft.begin(capacity)

    def step(self) -> None:
        """The next token of every reply (with a draft: one or more); those that end leave the batch."""
        with self._without_gradients():
            if self.draft is not None:
                self._step_drafted(self.draft, self.replies[0])
            else:
                tokens = torch.tensor([r.tokens[-1:] for r in self.replies], device=self.device)  # (B, 1)
                positions = torch.tensor([[len(r.tokens) - 1] for r in self.replies], device=self.device)
                with one_row_kernels(tokens, self.dtype), self._adapters(self.replies):
                    logits = self.model(tokens, positions, cache=self.cache)[:, -1].float()  # (B, vocab)
                for reply, row in zip(self.replies, logits, strict=True):
                    reply.choose(row)
        self.drop()

    def _step_drafted(self, draft: Draft, reply: Request) -> None:
        """Read the last token and the drafted ones in one forward; keep those that would have been chosen anyway."""
        left = reply.room - len(reply.tokens) + len(reply.prompt)
        drafted = draft.propose(reply.tokens, left - 1)
        start = len(reply.tokens) - 1
        tokens = torch.tensor([[reply.tokens[-1], *drafted]], device=self.device)  # (1, T)
        positions = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
        with one_row_kernels(tokens, self.dtype), self._adapters([reply]):
            logits = self.model(tokens, positions, cache=self.cache)[0].float()  # (T, vocab)
        for row, guess in zip(logits, [*drafted, None], strict=True):
            if reply.choose(row) != guess or reply.finish:
                break  # what was read beyond it is read again: the cache takes an earlier position

    def drop(self) -> None:
        """Let replies that have ended leave."""
        going = [(row, r) for row, r in zip(self._rows(), self.replies, strict=True) if r.finish is None]
        if len(going) < len(self.replies):
            with self._without_gradients():
                self._gather([row for row, _ in going], [r for _, r in going])

    def _adapters(self, replies: list[Request]) -> contextlib.AbstractContextManager[None]:
        """Each row goes through the adapter that its reply names."""
        return contextlib.nullcontext() if self.bank is None else self.bank.use([r.adapter for r in replies])

    def _rows(self) -> list[tuple[KVCache, int, int]]:
        return [(self.cache, i, len(r.tokens) - 1) for i, r in enumerate(self.replies)] if self.cache else []

    def _gather(self, rows: list[tuple[KVCache, int, int]], replies: list[Request]) -> None:
        capacity = max((len(r.prompt) + r.room for r in replies), default=0)
        if rows and all(cache is rows[0][0] for cache, _, _ in rows) and len(rows) == rows[0][0].batch:
            self.cache = rows[0][0]  # nothing to rearrange
        else:
            self.cache = KVCache.gather(self.config, rows, capacity) if rows else None
        self.replies = replies


def check_prompt(prompt: list[int], context: int) -> None:
    """Raise a `UserError` for a prompt that is empty, or leaves no room for an answer in a context of so many tokens."""
    if not prompt:
        raise UserError("the prompt is empty.")
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context {context}: no room for an answer.")


def _check_draft(replies: list[Request]) -> None:
    first = replies[0].sampling
    if len(replies) > 1 or first.temperature or first.repetition_penalty != 1.0:
        raise UserError("a draft is for one prompt at a time, with temperature 0 and without repetition penalty.")


def prefill(model: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache) -> None:
    """Read tokens (B, T) at positions (B, T) into the cache, in parts. No label is a target, so no logits are computed."""
    for part, where in zip(tokens.split(cache.chunk, 1), positions.split(cache.chunk, 1), strict=True):
        if part.numel():
            model(part, where, cache=cache, labels=torch.full_like(part, IGNORE))


@contextlib.contextmanager
def one_row_kernels(tokens: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """For one token in bf16 on the CPU, torch's own matrix-vector product is up to twice as fast as oneDNN's."""
    if tokens.numel() > 1 or dtype != torch.bfloat16 or tokens.device.type != "cpu":
        yield
        return
    before = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        yield
    finally:
        torch.backends.mkldnn.enabled = before
