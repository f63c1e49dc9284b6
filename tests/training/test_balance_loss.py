"""The balance loss is the one term that depends on micro-batches: as documented, and by no more than documented."""

import dataclasses

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from litmini.models import mixtral, qwen3_moe
from litmini.ops.cross_entropy import IGNORE


def gradients(family, coefficient: float, size: int) -> tuple[float, Tensor]:
    """Return loss and gradients of a step over 8 sequences, each with a vocabulary of its own, `size` at a time."""
    model = family.Model(dataclasses.replace(family.PRESETS["tiny"], balance_coef=coefficient)).train()
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            parameter.data *= 20  # a router that prefers experts
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 500, (8, 64), generator=generator) for _ in range(2))
    for i in range(8):
        tokens[i] %= 20 * (i + 1)
        labels[i, 8 * (i + 1) :] = IGNORE
    total, targets = 0.0, 0
    for first in range(0, 8, size):
        loss, count = model(tokens[first : first + size], labels=labels[first : first + size])
        loss.backward()
        total, targets = total + loss.item(), targets + int(count)
    flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total / targets, torch.cat(flat) / targets


@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
def test_the_balance_loss_depends_on_the_split_as_documented(family) -> None:
    (plain, one), (_, eight) = gradients(family, 0.0, 1), gradients(family, 0.0, 8)
    assert_close(one, eight)
    for coefficient, most in ((0.001, 0.01), (0.02, 0.2)):
        (split, one), (whole, eight) = gradients(family, coefficient, 1), gradients(family, coefficient, 8)
        assert plain < whole < split  # each micro-batch is asked to be balanced by itself
        assert 0 < (one - eight).norm() / eight.norm() < most
