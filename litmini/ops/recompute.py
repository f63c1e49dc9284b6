"""Functions that keep only their inputs for the backward pass, and compute all else again there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Return `function(*inputs)`, a tensor or a tuple of them; what it computes must not depend on autocast or chance.

    Compiled code decides itself what it keeps.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Recomputed.apply(function, *inputs)
    return function(*inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        ctx.function = function
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [
                tensor.detach().requires_grad_() if is_needed else tensor
                for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used, grads = zip(*(pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad), strict=True)
        wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(used, wanted, grads, allow_unused=True))
        return None, *(next(found) if is_needed else None for is_needed in needed)
