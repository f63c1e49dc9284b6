"""The losses of preference learning: each a function of the log-probabilities of completions, a value for each pair.

Symbols: l is the sum of the log-probabilities of a completion's tokens, its end token included, L their mean; c is the chosen
completion, r the rejected one; ' is the reference, the model at the start; D = (lc - lc') - (lr - lr').
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.config.preference import PreferenceConfig


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs, (n,) fp32 each, summed over the tokens of a completion."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    """Zeros where the loss has no reference."""
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """lc - lc'."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """lr - lr'."""
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """Lc."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Lr."""
        return self.rejected / self.rejected_tokens


def smoothed(x: Tensor, epsilon: float) -> Tensor:
    """Return -(1 - e) log sigmoid(x) - e log sigmoid(-x): the preference is the other way round with probability e."""
    return -(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)


def sigmoid(p: Pairs, config: PreferenceConfig) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta D); with label smoothing cDPO (ericmitchell.ai/cdpo.pdf)."""
    return smoothed(config.beta * (p.chosen_ratio - p.rejected_ratio), config.label_smoothing)


def robust(p: Pairs, config: PreferenceConfig) -> Tensor:
    """Robust DPO (arXiv 2403.00409, equation 12): [-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e)."""
    x, e = config.beta * (p.chosen_ratio - p.rejected_ratio), config.label_smoothing
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def hinge(p: Pairs, config: PreferenceConfig) -> Tensor:
    """The hinge loss of SLiC (arXiv 2309.06657): relu(1 - beta D)."""
    return torch.relu(1 - config.beta * (p.chosen_ratio - p.rejected_ratio))


def ipo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17), with log-ratios per token, as TRL has it: (d - 1 / (2 beta))^2,
    d = (lc - lc') / |c| - (lr - lr') / |r|.
    """
    d = p.chosen_ratio / p.chosen_tokens - p.rejected_ratio / p.rejected_tokens
    return (d - 1 / (2 * config.beta)).square()


def apo_zero(p: Pairs, config: PreferenceConfig) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): 1 - sigmoid(beta (lc - lc')) + sigmoid(beta (lr - lr')).

    For chosen completions that are better than the model's own.
    """
    return 1 - torch.sigmoid(config.beta * p.chosen_ratio) + torch.sigmoid(config.beta * p.rejected_ratio)


def apo_down(p: Pairs, config: PreferenceConfig) -> Tensor:
    """APO-down (arXiv 2408.06266, equation 8): sigmoid(beta (lc - lc')) + 1 - sigmoid(beta D).

    For chosen completions that are worse than the model's own.
    """
    chosen, difference = config.beta * p.chosen_ratio, config.beta * (p.chosen_ratio - p.rejected_ratio)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(difference)


def simpo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta (Lc - Lr) - gamma), with label smoothing as in TRL."""
    return smoothed(config.beta * (p.chosen_mean - p.rejected_mean) - config.gamma, config.label_smoothing)


def orpo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """ORPO (arXiv 2403.07691, equations 6 and 7): -Lc - beta log sigmoid(log odds ratio), odds of exp(L).

    The negative log-likelihood is that of the completion's tokens, as in the paper; TRL's is that of the prompt's as well.
    """
    chosen, rejected = p.chosen_mean, p.rejected_mean
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - config.beta * F.logsigmoid(log_odds)


def cpo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """CPO (arXiv 2401.08417, equation 5): -log sigmoid(beta (lc - lr)) - alpha Lc, with label smoothing as in TRL."""
    return smoothed(config.beta * (p.chosen - p.rejected), config.label_smoothing) - config.alpha * p.chosen_mean


def kto(ratio: Tensor, z: Tensor, desirable: Tensor, config: PreferenceConfig) -> Tensor:
    """KTO (arXiv 2402.01306, equation 8), of single completions: w (1 - sigmoid(beta (l - l' - z))) of desirable ones,
    w (1 - sigmoid(beta (z - (l - l')))) of others.

    Args:
        ratio: l - l', (n,) fp32.
        z: estimate of the KL divergence to the reference, 0-d, without a gradient.
        desirable: (n,) bool.
    """
    x = config.beta * (ratio - z)
    good, bad = config.desirable_weight * (1 - torch.sigmoid(x)), config.undesirable_weight * (1 - torch.sigmoid(-x))
    return torch.where(desirable, good, bad)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, without cancellation."""
    return torch.where(x < -0.6931, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


LOSSES: dict[str, Callable[[Pairs, PreferenceConfig], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
}
"""The losses of pairs, by `preference.loss`; `kto` is that of single completions."""
