"""Initial weights, for `init_weights` of family files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from litmini.errors import UserError


def initialize(
    model: nn.Module,
    constants: Mapping[str, float],
    generator: torch.Generator | None,
    std: float = 0.02,
    stds: Mapping[str, float] | None = None,
) -> None:
    """Initialize every parameter: by its name to a constant, else matrices named `weight` from a normal distribution.

    Args:
        constants: part of a name -> value; the first that occurs counts.
        stds: part of a name -> its own standard deviation.

    Raises:
        UserError: a parameter is neither: whoever adds one to a family says how it begins, or it would get noise.
    """
    unknown = []
    for name, parameter in model.named_parameters():
        constant = next((value for part, value in constants.items() if part in name), None)
        if constant is not None:
            nn.init.constant_(parameter, constant)
        elif parameter.dim() > 1 and name.endswith(".weight"):
            own = next((value for part, value in (stds or {}).items() if part in name), std)
            nn.init.normal_(parameter, std=own, generator=generator)
        else:
            unknown.append(f"{name} {tuple(parameter.shape)}")
    if unknown:
        more = ", ..." * (len(unknown) > 5)
        raise UserError(
            f"init_weights of the model does not know {', '.join(unknown[:5])}{more}: give a value for its name "
            f'there, such as {{"{unknown[0].split()[0].rpartition(".")[2]}": 1.0}}.'
        )
