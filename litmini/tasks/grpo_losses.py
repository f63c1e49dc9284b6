"""The mathematics of policy optimization: advantages of completions, and the loss of each completion's tokens.

Symbols: r is the reward of a completion, A its advantage; l is the log-probability of a token at the sampling temperature,
l_old that of the model that sampled it, l_ref that of the model at the start. The ratio is exp(l - l_old).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from litmini.config.grpo import GrpoConfig

LEAST_STD = 1e-4  # added to standard deviations, as in TRL


def advantages(rewards: Tensor, config: GrpoConfig) -> Tensor:
    """Return the advantages of completions, (groups, n) fp32.

    With a group's mean as the baseline they are r - mean, divided by the standard deviation (unbiased) of the group or of all
    rewards (`scale_rewards`), plus 1e-4; with rloo r minus the mean of the group's other rewards (arXiv 2402.14740).

    Args:
        rewards: (groups, n) fp32, NaN of completions that are left out. Their advantage is 0, as it is in a group of one.
    """
    known = ~rewards.isnan()
    counts = known.sum(1, keepdim=True)
    total = rewards.nansum(1, keepdim=True)
    if config.loss_type == "rloo":
        found = rewards - (total - rewards) / (counts - 1)
    else:
        found = rewards - total / counts
        if config.scale_rewards == "group":
            found = found / (nanstd(rewards) + LEAST_STD)
        elif config.scale_rewards == "batch":
            found = found / (nanstd(rewards.flatten()[None]) + LEAST_STD)
    return found.masked_fill(~known | (counts < 2), 0.0)


def nanstd(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each row but for its NaN, (rows, 1)."""
    counts = (~values.isnan()).sum(1, keepdim=True)
    deviations = values - values.nansum(1, keepdim=True) / counts
    return (deviations.square().nansum(1, keepdim=True) / (counts - 1)).sqrt()


def equal_groups(rewards: Tensor) -> Tensor:
    """Return which groups have equal rewards, and so nothing to compare, (groups,) bool.

    Args:
        rewards: (groups, n), NaN of completions that are left out.
    """
    low = rewards.masked_fill(rewards.isnan(), torch.inf).amin(1)
    high = rewards.masked_fill(rewards.isnan(), -torch.inf).amax(1)
    return high - low <= 1e-8  # in a group without rewards the difference is -inf


@dataclass(frozen=True)
class TokenLoss:
    """What a loss is made of; each is summed over the completions of a micro-batch."""

    loss: Tensor
    """0-d, with its gradient."""
    clipped: Tensor
    """Tokens whose ratio is clipped, 0-d."""
    divergence: Tensor
    """k3 of all tokens, 0-d; 0 without a reference."""


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    config: GrpoConfig,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> TokenLoss:
    """Return the clipped loss (arXiv 2402.03300, equation 3), summed over completions as `loss_type` asks for.

    Of a token it is -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta k3, where k3 = exp(l_ref - l) -
    (l_ref - l) - 1. The ratio of gspo is exp(mean of l - l_old) over a completion's tokens (arXiv 2507.18071), that of rloo
    exp(sum). The sums are, with `units` as what they are divided by,

        dapo, bnpo    of all tokens
        dr_grpo       of all tokens
        grpo, gspo    of each completion's mean over its tokens
        rloo          of completions

    Args:
        log_probs: l, (n, T) fp32, 0 where there is no token of a completion.
        old: l_old, (n, T).
        mask: (n, T) bool, where the tokens of completions are.
        advantage: (n,) fp32.
        reference: l_ref, (n, T); needed if `beta` is above 0, but for rloo, which has its KL divergence in the rewards.
        weights: what the loss of each token is multiplied with, (n, T), for rloo that of each completion with their mean;
            None: 1.
    """
    inside, A = mask.float(), advantage[:, None]
    counts = inside.sum(1, keepdim=True).clamp(min=1)  # (n, 1)
    log_ratio = (log_probs - old) * inside
    if config.loss_type == "rloo":
        log_ratio = log_ratio.sum(1, keepdim=True)
    elif config.loss_type == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / counts
    ratio = log_ratio.exp()  # (n, T) or (n, 1)
    each = -torch.min(ratio * A, ratio.clamp(1 - config.epsilon, 1 + config.high) * A)
    clipped = ((ratio < 1 - config.epsilon) & (A < 0)) | ((ratio > 1 + config.high) & (A > 0))
    if config.loss_type == "rloo":
        some = (inside.sum(1, keepdim=True) > 0).float()
        if weights is not None:
            some = (weights * inside).sum(1, keepdim=True) / counts
        return TokenLoss((each * some).sum(), (clipped * inside).sum(), inside.new_zeros(()))
    if weights is not None:
        each = each * weights
    divergence = inside.new_zeros(())
    if reference is not None:
        difference = (reference - log_probs) * inside
        k3 = difference.exp() - difference - 1
        each, divergence = each + config.beta * k3, k3.detach().sum()
    loss = (each * inside).sum(1, keepdim=True)
    if config.loss_type in ("grpo", "gspo"):
        loss = loss / counts
    return TokenLoss(loss.sum(), (clipped * inside).sum(), divergence)


def units(completions: int, tokens: int, config: GrpoConfig) -> int:
    """Return what the sum of `policy_loss` over so many completions, with so many tokens in all, is divided by.

    The loop adds them up over all micro-batches and ranks of an optimizer step.
    """
    if config.loss_type in ("dapo", "bnpo"):
        return tokens
    return completions * (config.max_completion_length if config.loss_type == "dr_grpo" else 1)
