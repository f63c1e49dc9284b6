"""Sampling from a model in shards: each forward pass gathers them, so every process takes part in every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from litmini.distributed.fabric import host_group
from litmini.distributed.fsdp import is_sharded


@contextmanager
def in_lockstep(model: nn.Module, forward: Callable[[], object]) -> Iterator[None]:
    """Inside, each process may run another number of forward passes of `model`, if that is in shards.

    All processes enter. One that leaves runs `forward`, whose result nobody needs, until the last has left.
    """
    if not is_sharded(model):
        yield
        return
    group = host_group()

    def running(own: int) -> int:
        """Return how many processes are about to run a forward pass of their own."""
        count = torch.tensor(own)
        torch.distributed.all_reduce(count, group=group)
        return int(count)

    hook = model.register_forward_pre_hook(lambda *_: running(1) and None)
    try:
        yield
    finally:
        hook.remove()
    while running(0):
        forward()
