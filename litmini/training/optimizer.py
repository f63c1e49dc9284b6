"""Optimizers by name, their parameter groups, and the learning rate schedule."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from litmini.config.training import OptimConfig
from litmini.distributed.fsdp import is_dtensor
from litmini.errors import UserError
from litmini.ops.cross_entropy import OutputHead


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps`.

    Linear warm-up to `config.lr`, above zero from the first step; then decay to `config.min_lr`, or constant, or constant
    with a decay in the last `config.decay_fraction` of all steps ("wsd": warm-up, stable, decay).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "wsd": min(1.0, (total_steps - step) / (config.decay_fraction * total_steps)),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * factor


class MuonAdamW(torch.optim.Optimizer):
    """Muon for `matrices` and AdamW for all other parameters, as one optimizer with one learning rate.

    Muon's updates are scaled to the RMS of AdamW's (Muon is Scalable for LLM Training, arXiv 2502.16982), so both use the
    same learning rate and weight decay.

    Args:
        groups: parameter groups, as for AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: set[nn.Parameter], config: OptimConfig) -> None:
        sides: list[list[dict[str, Any]]] = [[], []]
        for group in groups:
            for inside in (False, True):
                if params := [p for p in group["params"] if (p in matrices) == inside]:
                    sides[inside].append({**group, "params": params})
        self.parts: list[torch.optim.Optimizer] = []
        if sides[True]:
            self.parts.append(torch.optim.Muon(sides[True], config.lr, adjust_lr_fn="match_rms_adamw"))
        if sides[False]:
            self.parts.append(torch.optim.AdamW(sides[False], config.lr, config.betas, fused=True))
        super().__init__(groups, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state  # one state for both, as checkpoints save it by parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def block_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return all matrices but embeddings and the head, which is a direct child of the model."""
    heads = [module for module in model.children() if isinstance(module, OutputHead)]
    outside = {parameter for head in heads for parameter in head.parameters()} | {
        parameter
        for owner, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding) or "." not in owner
    }
    return {p for p in model.parameters() if p.dim() == 2} - outside


def make_optimizer(
    model: nn.Module, config: OptimConfig, ratios: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer of the trainable parameters, with weight decay for matrices (embeddings included) only.

    Args:
        ratios: parameter name -> its learning rate divided by the schedule's; 1 by default. Each group has it as
            `lr_ratio`.

    Raises:
        UserError: no parameter is trainable, or the optimizer needs a GPU, or does not support sharded parameters.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter.dim() >= 2, (ratios or {}).get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise UserError("this model has no trainable parameter.")
    named = [
        {"params": params, "weight_decay": config.weight_decay * decays, "lr": config.lr * ratio, "lr_ratio": ratio}
        for (decays, ratio), params in sorted(groups.items(), reverse=True, key=lambda item: item[0])
    ]
    low_memory = config.stochastic_rounding or config.in_backward or config.offload
    if config.name == "muon":
        if low_memory:
            raise UserError("optim.stochastic_rounding, in_backward and offload do not go with --optim.name muon.")
        return MuonAdamW(named, block_matrices(model), config)
    if low_memory:
        from litmini.training.low_memory import PerParameter

        if config.stochastic_rounding and config.name != "adamw":
            raise UserError(f"optim.stochastic_rounding goes with --optim.name adamw, found {config.name}.")
        make = functools.partial(_make, config)
        return PerParameter(named, make, config.stochastic_rounding, config.in_backward, config.offload)
    return _make(config, named)


def _make(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    if config.name == "paged_adamw8bit" and not torch.cuda.is_available():
        raise UserError("optim.name paged_adamw8bit needs a GPU; --optim.name adamw8bit runs here.")
    if any(is_dtensor(parameter) for group in groups for parameter in group["params"]):
        raise UserError(
            f"optim.name {config.name} does not go with --strategy fsdp: bitsandbytes takes whole tensors, not shards "
            f"(DTensor), and its 8-bit state could not be saved by shard. Use --optim.name adamw, whose state is sharded, or "
            f"--strategy ddp."
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hide warnings about optional kernels on CPUs
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if config.name == "adamw8bit" else PagedAdamW8bit)(groups, lr=config.lr, betas=config.betas)
