"""Divergences between the distributions of a student and of its teacher, per token. The gradient is the student's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of each row, (n,) (arXiv 2306.13649, equation 1).

    With t and s the two distributions and m = beta t + (1 - beta) s, it is beta KL(t || m) + (1 - beta) KL(s || m). At the
    ends it is, as in TRL's `generalized_jsd_loss`, KL(t || s) for beta 0 and KL(s || t) for beta 1.

    Args:
        student: logits (n, vocab), fp32.
        teacher: logits (n, vocab), fp32.
        temperature: both are divided by it.
    """
    log_s = F.log_softmax(student / temperature, -1)
    log_t = F.log_softmax(teacher / temperature, -1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    weight = torch.tensor(beta, dtype=log_s.dtype, device=log_s.device)
    log_m = torch.logaddexp(log_s + torch.log1p(-weight), log_t + weight.log())
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top_k_log_probs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the ids of the k most probable tokens, (n, k) int64, and log-probabilities, (n, k + 1) fp32.

    The last of these is that of all other tokens together, -inf where there are none.

    Args:
        logits: (n, vocab), k of them at least.
        temperature: they are divided by it.
    """
    logits = logits.float() / temperature
    top, ids = logits.topk(k, -1)
    return ids, _with_rest(logits, ids, top)


def _with_rest(logits: Tensor, ids: Tensor, picked: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens `ids`, and of all others together, (n, k + 1)."""
    if ids.shape[1] == logits.shape[1]:  # the gradient of a logsumexp over nothing would be NaN
        rest = torch.full_like(picked[:, :1], -torch.inf)
    else:
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([picked, rest], 1) - logits.logsumexp(-1, keepdim=True)


def top_k_divergence(student: Tensor, ids: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of each row over k tokens and the rest as one, (n,).

    It is never more than the divergence over all tokens, and equal to it where k is the vocabulary.

    Args:
        student: logits (n, vocab), fp32.
        ids: of the teacher's k most probable tokens, (n, k) int64.
        teacher: their log-probabilities at `temperature` and that of all others, (n, k + 1); they are normalised here.
        temperature: the student's logits are divided by it.
    """
    log_t = teacher.float().log_softmax(-1)
    logits = student / temperature
    log_s = _with_rest(logits, ids, logits.gather(1, ids))
    known = log_t > -torch.inf  # 0 log 0 is 0
    difference = torch.where(known, log_t, 0.0) - torch.where(known, log_s, 0.0)
    return (log_t.exp() * difference).sum(-1)
