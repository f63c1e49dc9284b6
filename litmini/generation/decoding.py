"""Decoding of a batch whose requests stay the same: on a GPU, several tokens before the host looks at them."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from litmini.generation.request import Request
from litmini.generation.sampling import Sampler
from litmini.ops.kv_cache import KVCache

AHEAD = 8
"""Most tokens that a GPU decodes before the host looks for the ends of requests. A request that ends early wastes the rest."""
_refused: WeakSet[nn.Module] = WeakSet()
"""Models that cannot be captured. None is tried again: a capture that fails costs a forward pass, and its memory."""


def is_gpu(device: torch.device) -> bool:
    """Return whether kernels are launched without waiting for their results."""
    return device.type == "cuda"


class Decoding:
    """Last tokens, positions and sampler of a batch, on its device, until requests join or leave it.

    Args:
        cache: static, if `graph`.
        graph: capture the forward pass in a CUDA graph, so that its kernels cost the host one launch. It must launch the same
            ones each time, on the same tensors.
        before: a graph whose memory the new one takes again.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        requests: list[Request],
        graph: bool,
        before: Captured | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        self._tokens = torch.tensor([r.tokens[-1:] for r in requests], device=cache.device)  # (B, 1)
        self._positions = torch.tensor([[len(r.tokens) - 1] for r in requests], device=cache.device)
        settings, generators = [r.sampling for r in requests], [r.generator for r in requests]
        self._sampler = Sampler(settings, [r.tokens for r in requests], generators, cache.device)
        self.graph: Captured | None = None
        if graph and model not in _refused:
            self._capture(before)

    def run(self, count: int) -> tuple[list[list[int]], Tensor]:
        """Decode `count` tokens of each request.

        Returns:
            For each request its token ids, -1 where logits were not finite; the logits (B, vocab) fp32 of the last ones.
        """
        chosen = []
        for _ in range(count):
            # `_logits` is no attribute: in a cycle, the cache of a batch that is no more would wait for the garbage collector
            logits = self._logits() if self.graph is None else self.graph()
            chosen.append(finite_tokens(self._sampler.choose(logits), logits))
            self._tokens.copy_(chosen[-1][:, None].clamp(min=0))
            self._positions.add_(1)
        return torch.stack(chosen, 1).tolist(), logits  # CPU-GPU sync point

    def _logits(self) -> Tensor:
        """Return the logits (B, vocab) fp32 of the next tokens."""
        logits: Any = self.model(self._tokens, self._positions, cache=self.cache)
        return logits[:, -1].float()  # type: ignore[no-any-return]

    def _capture(self, before: Captured | None) -> None:
        try:
            self.graph = capture(self._logits, self.cache.device, before)
        except torch.OutOfMemoryError:  # the next batch may be smaller
            warnings.warn("decoding without a CUDA graph, for which memory does not suffice", stacklevel=2)
        except RuntimeError as error:
            _refused.add(self.model)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"decoding without a CUDA graph, which this model does not allow: {reason}", stacklevel=2)


def finite_tokens(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return tokens (B,), with -1 where logits (B, vocab) are not finite: the maximum of NaN and others is NaN."""
    return torch.where(logits.amax(-1).isfinite(), tokens, -1)


class Captured:
    """Kernels that a CUDA graph launches again, and the tensor that they write."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self.graph, self._output = graph, output

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self._output


def capture(function: Callable[[], Tensor], device: torch.device, before: Captured | None = None) -> Captured:
    """Return what launches the kernels of `function` again, as one CUDA graph, and returns the same tensor.

    Args:
        function: reads and writes the same tensors each time, and never waits for the GPU. It is called twice.
        device: of these tensors; the thread's current one may be another.
        before: is not called any more, and gives its memory. Else torch would keep that of every graph there was.

    Raises:
        RuntimeError: it does something that cannot be captured.
    """
    stream, current = _side_stream(device, threading.get_ident()), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):  # and on its device
            function()  # what is made in a first call is not captured
            graph = torch.cuda.CUDAGraph()
            pool = None if before is None else before.graph.pool()
            graph.capture_begin(pool, "thread_local")  # other threads of a server may use the GPU meanwhile
            try:
                output = function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it only says that there was an error
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:  # the first call has written to the tensors, whatever became of the second
        current.wait_stream(stream)
    return Captured(graph, output)


@functools.lru_cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """Return a stream to capture on: with a new one each time, memory would be kept for each of torch's 32."""
    return torch.cuda.Stream(device)
