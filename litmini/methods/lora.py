"""The layers of the methods: each takes the place of a linear, whatever the model and whatever the base."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.base_layer import (
    AdapterLayer,
    dense,
    plain,
    plain_layer,
    product,
    rounded_sum,
    shape,
    weight_in,
)


class LoRALinear(AdapterLayer):
    """y = base(x) + (alpha / rank) * B A dropout(x), with the base frozen (LoRA, arXiv 2106.09685).

    A (rank, in) and B (out, rank) are kept in fp32 and multiplied in x's dtype; over a stack of experts there is one pair
    for each. B starts at zero: so does the change. rank_stabilized: alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    def __init__(self, base: Any, rank: int, alpha: float, dropout: float = 0.0, rank_stabilized: bool = False) -> None:
        super().__init__()
        self.base, self.alpha, self.rank_stabilized = base, alpha, rank_stabilized
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = nn.Dropout(dropout)
        stack, device = shape(base)[:-2], base.weight.device  # (n_experts,) or ()
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*stack, base.out_features, rank, dtype=torch.float32, device=device))
        for one in self.lora_A.data.view(-1, rank, base.in_features):
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    def forward(self, x: Tensor, *ends: Tensor) -> Tensor:
        if ends or not plain(self.base):
            return self.base(x, *ends) + self.change(x, *ends)
        if autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base, flat = self.base, x.flatten(0, -2)
        dropped = self.dropout(flat) if self.training and self.dropout.p > 0 else None
        y = _Adapted.apply(flat, dropped, base, base.weight, base.bias, *self.factors(x.dtype), self.gain())
        return y.unflatten(0, x.shape[:-1])

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (..., rank, in), and B with the scale in it (..., out, rank), as they are multiplied."""
        return self.lora_A.to(dtype), (self.lora_B * self.scale).to(dtype)

    def gain(self) -> Tensor | None:
        """What each output is multiplied with, (out,) in fp32: nothing, but in DoRA."""
        return None

    def change(self, x: Tensor, *ends: Tensor) -> Tensor:
        """What is added to base(x). `ends`: of each expert's rows in x, where the base is a stack."""
        down, up = self.factors(x.dtype)
        if ends:  # grouped products want rows of whole 16 bytes
            idle = -down.shape[1] % 8
            down, up = F.pad(down, (0, 0, 0, idle)), F.pad(up, (0, idle))
        low = product(self.dropout(x), down, *ends)  # (..., rank)
        return product(low, up, *ends)

    def delta(self) -> Tensor:
        """The change of the base weight, (..., out, in) in fp32."""
        return (self.lora_B * self.scale) @ self.lora_A

    def merged_weight(self) -> Tensor:
        """(..., out, in) in fp32."""
        return self.delta().add_(dense(self.base))  # in place: no more memory than a conversion may take

    def merge(self, generator: torch.Generator | None = None) -> nn.Module:
        """A plain linear (or stack) that does the same: the change is added in fp32 and rounded once to the base's dtype.

        The merged layer is a new one: putting this one back in its place undoes the merge, bit by bit.
        """
        return plain_layer(self.base, rounded_sum(self.base, self.merged_weight(), generator))

    def saved(self) -> tuple[float, dict[str, Tensor]]:
        """(alpha, tensors) that say the same to whoever puts them over the original base."""
        return self.alpha, {name: full_tensor(p) for name, p in self.named_parameters() if name.startswith("lora_")}


def add_product_(y: Tensor, x: Tensor, dense: Tensor) -> Tensor:
    """y += x @ dense, in place: y (n, out), x (n, in), dense (in, out). `compiled.py` puts its own in this place."""
    return y.addmm_(x, dense)


class _Adapted(torch.autograd.Function):
    """(x W^T + B A x) * gain, with a bias; x (n, in), result (n, out).

    In 16 bits what the adapter adds is often smaller than the spacing of numbers as large as x W^T: added to the rounded
    product, it would be lost, and training would see half of itself. So it comes first, and the product is summed onto it
    in fp32, rounded once. Nor do these sums cost a pass of their own.
    """

    @staticmethod
    def forward(ctx, x, dropped, base, weight, bias, down, up, gain):  # type: ignore[override,no-untyped-def]
        low = (x if dropped is None else dropped) @ down.T  # (n, rank)
        dense = weight_in(x.dtype, base, weight).T  # (in, out)
        y = None
        if gain is None:
            out = add_product_(low @ up.T, x, dense)
        else:
            y = x @ dense
            if x.dtype == torch.float32:
                out = torch.addmm(y, low, up.T).mul_(gain)
            else:
                out = add_product_(rescaled(y, low, up, gain), x, dense)
        if bias is not None:
            out += bias.to(x.dtype)
        keep_x = dropped is None or weight.requires_grad
        ctx.base = base
        ctx.save_for_backward(x if keep_x else None, dropped, weight, low, down, up, gain, y)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        x, dropped, weight, low, down, up, gain, y = ctx.saved_tensors
        wants_x, _, _, wants_weight, wants_bias, _, _, wants_gain = ctx.needs_input_grad
        d_bias = grad.sum(0) if wants_bias else None
        d_up = (low.T @ grad).T  # twice as fast as grad.T @ low on a CPU
        d_gain = None
        if gain is not None:
            if wants_gain:
                d_gain = (grad * y).sum(0, dtype=torch.float32) + (d_up.float() * up).sum(1)
            d_up, up = times(d_up, gain), times(up, gain)
        d_low = grad @ up  # (n, rank)
        d_x = d_dropped = None
        if wants_x:
            d_x, dense = d_low @ down, weight_in(grad.dtype, ctx.base, weight)
            dense = dense if gain is None else times(dense, gain)
            if dropped is None:
                add_product_(d_x, grad, dense)
            else:
                d_x, d_dropped = grad @ dense, d_x
        d_weight = None
        if wants_weight:
            d_weight = grad.T @ x if gain is None else times(grad.T @ x, gain)
        return d_x, d_dropped, None, d_weight, d_bias, d_low.T @ (x if dropped is None else dropped), d_up, d_gain


class PiSSALinear(LoRALinear):
    """LoRA that starts as the `rank` largest singular values of the weight, which the base then lacks (arXiv 2404.02948).

    On disk it is an ordinary adapter of twice the rank over the original base: B A - B0 A0.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: Any, *settings: Any, **options: Any) -> None:
        if not isinstance(base, nn.Linear):
            raise UserError("lora.init pissa needs plain 16-bit linears, not 4-bit or stacked ones.")
        super().__init__(base, *settings, **options)
        weight, rank = dense(base), len(self.lora_A)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same start when a run goes on
            u, s, v = torch.svd_lowrank(weight, q=min(2 * rank + 8, *weight.shape), niter=8)
        root = (s[:rank] / self.scale).sqrt()
        self.lora_A.data, self.lora_B.data = (root[:, None] * v[:, :rank].T).contiguous(), u[:, :rank] * root
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self.base = plain_layer(base, weight - self.delta().detach())

    def saved(self) -> tuple[float, dict[str, Tensor]]:
        a, b = full_tensor(self.lora_A), full_tensor(self.lora_B)
        both = {"lora_A": torch.cat((a, self.start_A)), "lora_B": torch.cat((b, -self.start_B), 1)}
        return self.alpha * (math.sqrt(2) if self.rank_stabilized else 2), both  # the same scale at twice the rank


def rescaled(y: Tensor, low: Tensor, up: Tensor, gain: Tensor) -> Tensor:
    """What y (n, out) lacks to (y + low up^T) * gain."""
    return torch.addcmul(low @ times(up, gain).T, y, (gain - 1).to(y.dtype))


def times(rows: Tensor, gain: Tensor) -> Tensor:
    """Each row of (out, n) times its gain, rounded once."""
    return (rows * gain[:, None]).to(rows.dtype)


def onto(base: Any, x: Tensor, change: Tensor) -> Tensor:
    """base(x) + change, summed as in `_Adapted`; without a backward pass on 4-bit bases."""
    if not plain(base):
        return base(x) + change
    y = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), weight_in(x.dtype, base, base.weight).T).view_as(change)
    return y if base.bias is None else y + base.bias


def autocast(x: Tensor) -> bool:
    """Whether products with x are cast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
