"""RMS norm and gated activations that keep only their inputs for the backward pass.

Autograd would keep every intermediate tensor: a fifth of the activations of a Llama block. They are cheap to recompute.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, rounded to x's dtype (arXiv 1910.07467).

    Under autocast, the result of an fp32 x is in autocast's dtype: otherwise each of the matmuls after it would cast it.

    Args:
        x: (..., dim).
        weight: (dim,).
    """
    return _norm(x, weight, eps, False)


def rms_norm_llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm`, but rounded to x's dtype before the multiplication with the weight, in their promoted dtype."""
    return _norm(x, weight, eps, True)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv 2002.05202) in gate's dtype, which up mostly has; all have the same shape."""
    return _gated(gate, up, F.silu, torch.ops.aten.silu_backward)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up, as `swiglu` does, with gelu's tanh approximation (arXiv 2002.05202)."""
    return _gated(gate, up, _gelu, _gelu_backward)


def _norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    device = "cpu" if x.is_meta else x.device.type
    cast = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else None
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, round_first, dtype)  # type: ignore[no-any-return]
    return _rms_norm(x, weight, eps, round_first, dtype)[0]


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, round_first: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the norm, in `dtype` if that is given, and 1 / rms (..., 1) in fp32."""
    h = x.float()
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * scale
    y = weight * h.to(x.dtype) if round_first else (weight * h).to(x.dtype)
    return y if dtype is None else y.to(dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, round_first, dtype):  # type: ignore[override,no-untyped-def]
        y, scale = _rms_norm(x, weight, eps, round_first, dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.round_first = round_first
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # type: ignore[override,no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        h = x.float() * scale  # (..., dim)
        d_weight = None
        if ctx.needs_input_grad[1]:
            multiplied = h.to(x.dtype) if ctx.round_first else h
            d_weight = (grad * multiplied).reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32).to(weight.dtype)
        d_h = grad * weight.float()  # fp32
        mean = (d_h * h).mean(-1, keepdim=True)
        return d_h.addcmul_(h, mean, value=-1).mul_(scale).to(x.dtype), d_weight, None, None, None


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _gated(gate: Tensor, up: Tensor, function: Any, derivative: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return function(gate).mul_(up)  # type: ignore[no-any-return]
    activated: list[Tensor] = []
    y: Tensor = _Gated.apply(gate, up, function, derivative, activated)
    if not torch.compiler.is_compiling():
        y.gate_factors = GateFactors(function, gate.detach(), up.detach(), activated)  # type: ignore[attr-defined]
    return y


class GateFactors(NamedTuple):
    """What a gated activation y = function(gate) * up is computed from."""

    function: Any
    gate: Tensor
    up: Tensor
    activated: list[Tensor]
    """function(gate), once a linear has computed it in its backward pass: y's takes it from there."""


def gate_factors(y: Tensor) -> GateFactors | None:
    """Return what a gated activation is computed from, which the backward pass keeps anyway. None of other tensors.

    So a linear that needs y in its backward pass may compute it again instead of keeping it.
    """
    return getattr(y, "gate_factors", None)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, function: Any, derivative: Any, activated: list[Tensor]) -> Tensor:  # type: ignore[override,no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.function, ctx.derivative, ctx.activated = function, derivative, activated
        return function(gate).mul_(up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # type: ignore[override,no-untyped-def]
        gate, up = ctx.saved_tensors
        activated = ctx.activated.pop() if ctx.activated else ctx.function(gate)
        return ctx.derivative(grad * up, gate), activated.mul_(grad), None, None, None
