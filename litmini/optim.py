"""Optimizers by name, their parameter groups, and the learning rate as a pure function of the step."""

import logging
import math

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


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters: matrices decay, vectors do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("nothing is trainable in this model.")
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "adamw8bit":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels on CPUs
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr)
