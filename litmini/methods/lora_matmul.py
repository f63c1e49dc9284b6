"""The low-rank matmuls of LoRA and DoRA beside the base's, forward and backward, summed where 16 bits lose nothing."""

from typing import Any

import torch
from torch import Tensor, library

from litmini.methods.base_layer import is_plain_linear, weight_in


@library.custom_op("litmini::add_product_", mutates_args=("y",))
def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Opaque to torch.compile, whose own `addmm` copies all of y first: 3.5% of a step of LoRA on a CPU."""
    y.addmm_(x, weight)


def add_product_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x @ weight to y in place: y (n, out), x (n, in), weight (in, out)."""
    if not torch.compiler.is_compiling():
        return y.addmm_(x, weight)
    _add_product(y, x, weight)
    return y


class LoRAMatmul(torch.autograd.Function):
    """(x W^T + B A x) * magnitude_scale, with a bias; x (n, in), result (n, out).

    In 16 bits the delta is often smaller than the ULP of x W^T: added to the rounded product, it would be lost, and
    training would see half of itself. So it comes first, and the product is summed onto it in fp32, rounded once. Nor do
    these sums cost a pass of their own.

    Args:
        x: (n, in).
        dropped: (n, in), x after dropout, which the adapter reads; None: x.
        base: the linear, plain or in 4 bits.
        weight: how it stores its weight.
        bias: (out,), or None.
        lora_a, lora_b: A (rank, in) and B (out, rank).
        scale: LoRA's, of B.
        casts: their `cast_factors` in x's dtype, or None.
        magnitude_scale: (out,) fp32 of DoRA, or None.
        gated: x's `gate_factors`: it is computed again in the backward pass, not kept; or None.
    """

    @staticmethod
    def forward(ctx, x, dropped, base, weight, bias, lora_a, lora_b, scale, casts, magnitude_scale, gated):  # type: ignore[override,no-untyped-def]
        a, b = casts or cast_factors(lora_a, lora_b, scale, x.dtype)
        xa = (x if dropped is None else dropped) @ a.T  # (n, rank)
        w = weight_in(x.dtype, base, weight).T  # (in, out)
        y = None
        if magnitude_scale is None:
            out = add_product_(xa @ b.T, x, w)
        else:
            y = x @ w
            if x.dtype == torch.float32:
                out = torch.addmm(y, xa, b.T).mul_(magnitude_scale)
            else:
                out = add_product_(scaled_delta(y, xa, b, magnitude_scale), x, w)
        if bias is not None:
            out += bias.to(x.dtype)
        needs_x = dropped is None or weight.requires_grad
        ctx.base, ctx.scale, ctx.casts = base, scale, casts
        ctx.gate_function, gate, up, ctx.activated = gated if needs_x and gated else (None, None, None, None)
        kept = x if needs_x and gated is None else None
        ctx.save_for_backward(kept, dropped, weight, xa, lora_a, lora_b, magnitude_scale, y, gate, up)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        x, dropped, weight, xa, lora_a, lora_b, magnitude_scale, y, gate, up = ctx.saved_tensors
        a, b = ctx.casts or cast_factors(lora_a, lora_b, ctx.scale, grad.dtype)
        wants_x, _, _, wants_weight, wants_bias, _, _, _, _, wants_scale, _ = ctx.needs_input_grad
        if ctx.gate_function is not None:
            activated = ctx.gate_function(gate)
            x = (activated * up).to(grad.dtype).flatten(0, -2)
            if wants_x:
                ctx.activated[:] = [activated]
        d_bias = grad.sum(0) if wants_bias else None
        d_b = (xa.T @ grad).T  # twice as fast as grad.T @ xa on a CPU
        d_scale = None
        if magnitude_scale is not None:
            if wants_scale:
                d_scale = (grad * y).sum(0, dtype=torch.float32) + (d_b.float() * b).sum(1)
            d_b, b = scale_rows(d_b, magnitude_scale), scale_rows(b, magnitude_scale)
        d_xa = grad @ b  # (n, rank)
        d_x = d_dropped = None
        if wants_x:
            d_x, w = d_xa @ a, weight_in(grad.dtype, ctx.base, weight)
            w = w if magnitude_scale is None else scale_rows(w, magnitude_scale)
            if dropped is None:
                add_product_(d_x, grad, w)
            else:
                d_x, d_dropped = grad @ w, d_x
        d_weight = None
        if wants_weight:
            d_weight = grad.T @ x if magnitude_scale is None else scale_rows(grad.T @ x, magnitude_scale)
        d_a = d_xa.T @ (x if dropped is None else dropped)
        d_a, d_b = d_a.to(lora_a.dtype), d_b.to(lora_b.dtype) * ctx.scale
        return d_x, d_dropped, None, d_weight, d_bias, d_a, d_b, None, None, d_scale, None


def cast_factors(lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (..., rank, in), and B with LoRA's scale in it (..., out, rank), in the dtype of their matmuls."""
    return lora_a.to(dtype), (lora_b * scale).to(dtype)


def scaled_delta(y: Tensor, xa: Tensor, b: Tensor, magnitude_scale: Tensor) -> Tensor:
    """Return what y (n, out) lacks to (y + xa b^T) * magnitude_scale; xa (n, rank), b (out, rank)."""
    return torch.addcmul(xa @ scale_rows(b, magnitude_scale).T, y, (magnitude_scale - 1).to(y.dtype))


def scale_rows(matrix: Tensor, magnitude_scale: Tensor) -> Tensor:
    """Return each row of (out, n) times its scale, rounded once."""
    return (matrix * magnitude_scale[:, None]).to(matrix.dtype)


def add_to_base(base: Any, x: Tensor, delta: Tensor) -> Tensor:
    """Return base(x) + delta, summed as in `LoRAMatmul`; without a backward pass on 4-bit bases."""
    if not is_plain_linear(base):
        return base(x) + delta
    y = torch.addmm(delta.flatten(0, -2), x.flatten(0, -2), weight_in(x.dtype, base, base.weight).T).view_as(delta)
    return y if base.bias is None else y + base.bias


def is_autocast(x: Tensor) -> bool:
    """Whether autocast gives matmuls of x another dtype."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
