"""The language modelling loss: head and cross entropy fused, in chunks, at target positions only, summed.

The full logits (positions x vocabulary) never exist. The caller divides the sum by the targets of the whole optimizer step.
On a GPU, chunks are larger and one compiled kernel turns logits into their gradient. That has not run on a GPU.
`torch.nn.functional.linear_cross_entropy` is not used: docs/training.md has the reasons.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
CHUNK = 256  # rows of logits in memory at once on a CPU
TRAINED_CHUNK = 1024  # the same if the head is trained: its gradient is summed over chunks
GPU_PART, GPU_ROWS = 64, 8192  # on a GPU: at most this part of its memory, and at most so many rows
VOCAB_CHUNK = 2048  # rows of the head's gradient that are computed at once
UNFUSED = 16  # bytes that a logit takes with its cross entropy and gradient, each operation by itself
CACHED = 8  # rows of logits in one softmax on a CPU: in fp32 they fit into its cache


@dataclass(frozen=True)
class Targets:
    """The labels of a batch with the positions that have one, which the host computes: no kernel waits for the device's."""

    labels: Tensor
    """(B, T) int64, `IGNORE` where there is no target."""
    index: Tensor
    """(n,) int64 positions of the targets among the B * T."""
    gpu_memory: int = 0
    """Bytes of memory of the GPU on which the loss is computed, all of it; 0: on a CPU."""

    @classmethod
    def of(cls, labels: "Tensor | Targets", device: torch.device | None = None) -> "Targets":
        """Return the targets of labels (B, T) for a loss on `device`, or on theirs; on a GPU, this waits for the device."""
        if isinstance(labels, Targets):
            return labels
        index = (labels != IGNORE).flatten().nonzero().flatten()  # CPU-GPU sync point, if on a GPU
        return cls(labels, index, gpu_memory(device or labels.device))

    def map(self, function: Any) -> "Targets":
        """Return the same targets with `function` applied to both tensors, to move them, say."""
        return Targets(function(self.labels), function(self.index), self.gpu_memory)

    def count(self) -> Tensor:
        """Return the number of targets, int64, 0-d."""
        return (self.labels != IGNORE).sum()


@functools.lru_cache
def gpu_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, used or not; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def rows_at_once(head: nn.Module, targets: Targets, dim: int, logit_bytes: int, on_cpu: int) -> int:
    """Return the rows of logits in memory at once: on a GPU by its size, not by what is free, so that runs repeat.

    Args:
        head: its weight has a row of `dim` values for each logit.
        logit_bytes: of a logit, and of what is computed from it.
        on_cpu: the result on a CPU.
    """
    if not targets.gpu_memory:
        return on_cpu
    vocab = max(p.numel() for p in head.parameters()) // dim
    rows = targets.gpu_memory // GPU_PART // (vocab * logit_bytes) // CHUNK * CHUNK  # whole tiles of a matmul
    return min(max(rows, CHUNK), GPU_ROWS)


class OutputHead(nn.Module):
    """A head whose outputs a model with labels returns instead of the summed loss; see `litmini/methods/heads.py`."""

    task_type = "CAUSAL_LM"
    """What PEFT's `adapter_config.json` calls a model with such a head."""

    def __init__(self, original: nn.Module | None = None) -> None:
        """
        Args:
            original: the head that it takes the place of, and whose name in files is that of the place.
        """
        super().__init__()
        self.original: Any = original

    def outputs(self, hidden: Tensor, labels: Tensor | Targets, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Return the outputs at the labelled positions of hidden (B, T, dim), and their number (int64, 0-d)."""
        raise TypeError(f"{type(self).__name__} has no outputs")


@contextmanager
def original_head(model: nn.Module) -> Iterator[None]:
    """Put the original of an `OutputHead` back for as long as this lasts: to save the model, or to generate."""
    heads = {n: m for n, m in model.named_children() if isinstance(m, OutputHead) and m.original is not None}
    for name, head in heads.items():
        setattr(model, name, head.original)
    try:
        yield
    finally:
        for name, head in heads.items():
            setattr(model, name, head)


class ZLossHead(nn.Linear):
    """A head that adds `z_weight * logsumexp(logits)^2` of each target to the loss in training (PaLM, arXiv 2204.02311).

    This keeps logits from drifting. It changes the gradients only: the returned loss is the cross entropy.
    """

    def __init__(self, head: nn.Linear, z_weight: float) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the same parameter, so it stays tied to the embedding
        self.z_weight = z_weight


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor | Targets,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of `head(hidden)` against `labels`, and the number of targets.

    Args:
        hidden: (B, T, dim).
        head: a plain `nn.Linear`, or any module that returns logits, such as an adapter layer; an `OutputHead` returns its
            own outputs.
        labels: (B, T) int64, `IGNORE` where there is no target; or `Targets`.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        chunk: rows of logits in memory at once; None: `rows_at_once`.

    Returns:
        The sum in fp32, an exact zero with a graph if there is no target, and the number of targets (int64), both 0-d.
    """
    if isinstance(head, OutputHead):
        return head.outputs(hidden, labels, softcap)
    targets = Targets.of(labels)
    on_cpu = TRAINED_CHUNK if any(p.requires_grad for p in head.parameters()) else CHUNK
    rows, wanted, index = hidden.flatten(0, 1), targets.labels.flatten(), targets.index
    if len(index) < len(rows):  # in pretraining, every position has a target
        rows, wanted = rows.index_select(0, index), wanted.index_select(0, index)  # (n, dim), (n,)
    if type(head) in (nn.Linear, ZLossHead) and head.bias is None:
        z_weight = head.z_weight if isinstance(head, ZLossHead) else 0.0
        dtype = (
            torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else rows.dtype
        )
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()  # _PlainHead ignores no_grad
        chunk = chunk or rows_at_once(head, targets, rows.shape[-1], dtype.itemsize, on_cpu)
        with torch.autocast(rows.device.type, enabled=False):
            loss = _PlainHead.apply(rows.to(dtype), weight, wanted, softcap, chunk, z_weight, targets.gpu_memory > 0)
        return loss, targets.count()
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    chunk = chunk or rows_at_once(head, targets, rows.shape[-1], UNFUSED, on_cpu)
    for part, want in zip(rows.split(chunk), wanted.split(chunk), strict=True):  # no target: one empty chunk
        total = total + checkpoint(_chunk_loss, part, head, want, softcap, use_reentrant=False)
    return total, targets.count()


def _chunk_loss(rows: Tensor, head: nn.Module, wanted: Tensor, softcap: float | None) -> Tensor:
    logits = head(rows).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, wanted, reduction="sum")


def _gradient_of_logits_(
    logits: Tensor, wanted: Tensor, softcap: float | None, z_weight: float, buffer: Tensor | None
) -> Tensor:
    """Return the summed cross entropy (fp32) of logits (n, vocab) against `wanted` (n, 1); logits become its gradient.

    Args:
        buffer: fp32 memory for at least n rows of logits; None: the logits are in fp32.
    """
    exact = logits if buffer is None else buffer[: len(logits)].copy_(logits)
    capped = None
    if softcap is not None:
        capped = torch.tanh(exact / softcap)
        torch.mul(capped, softcap, out=exact)
    top = exact.amax(-1, keepdim=True)  # (n, 1)
    picked = exact.gather(1, wanted) - top
    total = exact.sub_(top).exp_().sum(-1, keepdim=True)
    scale = 1 + 2 * z_weight * (total.log() + top)
    exact.mul_(scale / total).scatter_add_(1, wanted, torch.full_like(picked, -1.0))
    if capped is not None:
        exact.mul_(1 - capped.square())
    if exact is not logits:
        logits.copy_(exact)
    return (total.log() - picked).sum()


@functools.lru_cache
def _fused_loss(device: torch.device) -> Any:
    """Return `_gradient_of_logits_`, compiled; None: `device` is a CPU, or has no Triton.

    It is compiled for whole chunks, and once more for the rest of a batch, whatever its length.
    """
    if device.type != "cuda":
        return None
    from litmini.ops.fused_loss import gradient_of_logits_, has_triton  # for GPUs only

    return torch.compile(gradient_of_logits_) if has_triton(device) else None


class _PlainHead(torch.autograd.Function):
    """Computes its gradients in the forward pass, while a chunk's logits are in memory, so nothing is computed twice.

    All chunks use the same memory: on a CPU, allocating it for each chunk costs more than the softmax.
    """

    @staticmethod
    def forward(  # type: ignore[override,no-untyped-def]
        ctx,
        rows: Tensor,
        weight: Tensor,
        wanted: Tensor,
        softcap: float | None,
        chunk: int,
        z_weight: float,
        on_gpu: bool,
    ) -> Tensor:
        need_rows, need_weight = ctx.needs_input_grad[:2]
        cast = weight.to(rows.dtype)
        buffer = rows.new_empty(min(chunk, len(rows)), len(weight))  # (c, vocab)
        fused = _fused_loss(rows.device) if on_gpu else None
        n_rows = min(chunk if fused else CACHED if rows.device.type == "cpu" else CHUNK, len(buffer))
        plain = fused or rows.dtype == torch.float32
        exact = None if plain else rows.new_empty(n_rows, len(weight), dtype=torch.float32)
        keeps_fp32 = on_gpu and rows.dtype != torch.float32  # a CPU has no 16-bit matmul with a result in fp32
        d_rows = torch.empty_like(rows) if need_rows else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), chunk):
            part, want = rows[start : start + chunk], wanted[start : start + chunk, None]
            logits = torch.mm(part, cast.T, out=buffer[: len(part)])  # (c, vocab)
            for piece, piece_want in zip(logits.split(n_rows), want.split(n_rows), strict=True):
                total += (fused or _gradient_of_logits_)(piece, piece_want, softcap, z_weight, exact)
            if d_rows is not None:
                torch.mm(logits, cast, out=d_rows[start : start + chunk])
            if d_weight is not None:
                for piece, grad in zip(logits.split(VOCAB_CHUNK, 1), d_weight.split(VOCAB_CHUNK), strict=True):
                    grad += torch.mm(piece.T, part, out_dtype=torch.float32) if keeps_fp32 else piece.T @ part
        ctx.save_for_backward(d_rows, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override,no-untyped-def]
        d_rows, d_weight = ctx.saved_tensors
        return (
            None
            if d_rows is None
            else (d_rows.float() * upstream).to(d_rows.dtype),  # in fp32: 1 / targets is not rounded
            None if d_weight is None else d_weight.mul_(upstream).to(ctx.weight_dtype),  # in place, as it is large
            *[None] * 5,
        )
