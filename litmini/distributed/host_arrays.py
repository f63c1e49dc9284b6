"""Arrays of the host, summed over all processes or sent to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from litmini.distributed.fabric import host_group

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def sum_array_on_host(fabric: Fabric, array: np.ndarray) -> np.ndarray:
    """Return the sum of an array over all ranks."""
    if fabric.world_size > 1:
        torch.distributed.all_reduce(torch.from_numpy(array), group=host_group())
    return array


def broadcast_on_host(fabric: Fabric, array: np.ndarray) -> np.ndarray:
    """Return the array of rank 0; on other ranks `array` has its shape and dtype."""
    if fabric.world_size > 1:
        torch.distributed.broadcast(torch.from_numpy(array), 0, group=host_group())
    return array


def gather_on_host(fabric: Fabric, text: str) -> list[str]:
    """Return the texts of all ranks, in their order."""
    if fabric.world_size == 1:
        return [text]
    found: list[str] = [""] * fabric.world_size
    torch.distributed.all_gather_object(found, text, group=host_group())
    return found
