"""Optimizers by name, their parameter groups, and the learning rate as a pure function of the step."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from litmini.config import OptimConfig, UserError


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`.

    Linear warm-up, above zero from the first step, to `config.lr`; then down to `config.min_lr`, or constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    falling = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * falling


def make_optimizer(
    model: nn.Module, config: OptimConfig, ratios: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters: matrices decay, vectors do not.

    Args:
        ratios: parameter name -> its learning rate relative to the schedule's; 1 where it is not named. Each group's is
            in its `lr_ratio`.

    Raises:
        UserError: nothing is trainable, or the optimizer needs a GPU.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter.dim() >= 2, (ratios or {}).get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise UserError("nothing is trainable in this model.")
    named = [
        {"params": params, "weight_decay": config.weight_decay * decays, "lr": config.lr * ratio, "lr_ratio": ratio}
        for (decays, ratio), params in sorted(groups.items(), reverse=True, key=lambda item: item[0])
    ]
    if config.stochastic_rounding or config.in_backward or config.offload:
        from litmini.lean_optim import PerParameter

        if config.stochastic_rounding and config.name != "adamw":
            raise UserError(f"optim.stochastic_rounding goes with --optim.name adamw, found {config.name}.")
        make = functools.partial(_make, config)
        return PerParameter(named, make, config.stochastic_rounding, config.in_backward, config.offload)
    return _make(config, named)


def _make(config: OptimConfig, named: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(named, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(named, lr=config.lr)
    if config.name == "paged_adamw8bit" and not torch.cuda.is_available():
        raise UserError("optim.name paged_adamw8bit needs a GPU; --optim.name adamw8bit runs here.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels on CPUs
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if config.name == "adamw8bit" else PagedAdamW8bit)(named, lr=config.lr, betas=config.betas)
