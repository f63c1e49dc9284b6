"""Log-probabilities of tokens under a frozen head: head and softmax fused, in chunks; whole logits never exist.

The gradient of a token's log-probability is a vector times the gradient that comes from above, a number. The vectors are made
in the forward pass, while a chunk's logits are in memory: so nothing is computed twice, and logits are not kept.
"""

import torch
from torch import Tensor

from litmini.ops.cross_entropy import CACHED, CHUNK


def frozen_log_probs(
    rows: Tensor, weight: Tensor, wanted: Tensor, softcap: float | None, chunk: int, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of `wanted` (n,) under the logits `rows @ weight.T`, (n,) fp32.

    Args:
        rows: (n, dim); under autocast in any dtype.
        weight: (vocab, dim), which gets no gradient.
        softcap: logits become softcap * tanh(logits / softcap).
        chunk: rows of logits in memory at once.
        temperature: logits, capped if they are, are divided by it.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    with torch.autocast(device, enabled=False):
        found: Tensor = _FrozenLogProbs.apply(rows.to(dtype), weight, wanted, softcap, chunk, temperature)
    return found


class _FrozenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override,no-untyped-def]
        ctx, rows: Tensor, weight: Tensor, wanted: Tensor, softcap: float | None, chunk: int, temperature: float
    ) -> Tensor:
        cast = weight.detach().to(rows.dtype)
        buffer = rows.new_empty(min(chunk, len(rows)), len(cast))  # (c, vocab)
        n_rows = CACHED if rows.device.type == "cpu" else CHUNK  # in fp32 at once
        vectors = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        found = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(rows[part], cast.T, out=buffer[: len(rows[part])])  # (c, vocab)
            pieces = zip(logits.split(n_rows), wanted[part, None].split(n_rows), strict=True)
            keep = vectors is not None
            found[part] = torch.cat([_log_probs_(one, want, softcap, keep, temperature) for one, want in pieces])
            if vectors is not None:
                torch.mm(logits, cast, out=vectors[part])
        ctx.save_for_backward(vectors)
        return found

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override,no-untyped-def]
        (vectors,) = ctx.saved_tensors
        return (vectors.float() * upstream[:, None]).to(vectors.dtype), None, None, None, None, None


def _log_probs_(
    logits: Tensor, wanted: Tensor, softcap: float | None, wants_gradient: bool, temperature: float
) -> Tensor:
    """Return the log-probability of `wanted` (n, 1) under logits (n, vocab), (n,) fp32; logits become its gradient."""
    exact = logits.float() if logits.dtype != torch.float32 else logits
    capped = None
    if softcap is not None:
        capped = torch.tanh(exact / softcap)
        exact = capped * softcap
    if temperature != 1.0:
        exact = exact / temperature
    top = exact.amax(-1, keepdim=True)  # (n, 1)
    picked = exact.gather(1, wanted) - top
    exact = exact.sub_(top).exp_()
    total = exact.sum(-1, keepdim=True)
    if wants_gradient:
        exact.mul_(-1 / total).scatter_add_(1, wanted, torch.ones_like(picked))
        if capped is not None:
            exact.mul_(1 - capped.square())
        if temperature != 1.0:
            exact.div_(temperature)
        if exact is not logits:
            logits.copy_(exact)
    return (picked - total.log())[:, 0]
