"""Decoding of a batch whose requests stay the same: on a GPU, several tokens before the host looks at them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from litmini.generation.request import Request
from litmini.generation.sampling import Sampler
from litmini.ops.kv_cache import KVCache

AHEAD = 8
"""Most tokens that a GPU decodes before the host looks for the ends of requests. A request that ends early wastes the rest."""


def is_gpu(device: torch.device) -> bool:
    """Return whether kernels are launched without waiting for their results."""
    return device.type == "cuda"


class Decoding:
    """Last tokens, positions and sampler of a batch, on its device, until requests join or leave it.

    Args:
        cache: static, if `graph`.
        graph: capture the forward pass in a CUDA graph, so that its kernels cost the host one launch. It must launch the same
            ones each time, on the same tensors.
    """

    def __init__(self, model: nn.Module, cache: KVCache, requests: list[Request], graph: bool) -> None:
        self.model, self.cache = model, cache
        self._tokens = torch.tensor([r.tokens[-1:] for r in requests], device=cache.device)  # (B, 1)
        self._positions = torch.tensor([[len(r.tokens) - 1] for r in requests], device=cache.device)
        settings, generators = [r.sampling for r in requests], [r.generator for r in requests]
        self._sampler = Sampler(settings, [r.tokens for r in requests], generators, cache.device)
        self._forward: Callable[[], Tensor] = self._logits
        if graph:
            self._capture()

    def run(self, count: int) -> tuple[list[list[int]], Tensor]:
        """Decode `count` tokens of each request.

        Returns:
            For each request its token ids, -1 where logits were not finite; the logits (B, vocab) fp32 of the last ones.
        """
        chosen = []
        for _ in range(count):
            logits = self._forward()
            chosen.append(finite_tokens(self._sampler.choose(logits), logits))
            self._tokens.copy_(chosen[-1][:, None].clamp(min=0))
            self._positions.add_(1)
        return torch.stack(chosen, 1).tolist(), logits  # CPU-GPU sync point

    def _logits(self) -> Tensor:
        """Return the logits (B, vocab) fp32 of the next tokens."""
        logits: Any = self.model(self._tokens, self._positions, cache=self.cache)
        return logits[:, -1].float()  # type: ignore[no-any-return]

    def _capture(self) -> None:
        try:
            self._forward = capture(self._logits)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"decoding without a CUDA graph, which this model does not allow: {reason}", stacklevel=2)


def finite_tokens(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return tokens (B,), with -1 where logits (B, vocab) are not finite: the maximum of NaN and others is NaN."""
    return torch.where(logits.amax(-1).isfinite(), tokens, -1)


def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that launches the kernels of `function` again, as one CUDA graph, and returns the same tensor.

    Args:
        function: reads and writes the same tensors each time, and never waits for the GPU. It is called twice.

    Raises:
        RuntimeError: it does something that cannot be captured.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is made in a first call is not captured
        graph.capture_begin(capture_error_mode="thread_local")  # other threads of a server may use the GPU meanwhile
        try:
            output = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
