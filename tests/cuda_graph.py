"""A stand-in for CUDA graphs on the CPU: operators are recorded once, and replayed on the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "unique2")
"""Operators whose results a host waits for."""
graphs: list["Graph"] = []
"""Those that were captured."""


class NoWaits(TorchDispatchMode):
    """Let an operator that waits for the device raise, and a tensor that the host makes of a list, which is copied there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in WAITS or (name == "lift_fresh" and args[0].dim()):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


class Graph(NoWaits):
    """What a CUDA graph holds: kernels with the addresses and the numbers of the time at which they were captured."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # a view has its base's memory
                    old.copy_(new)


def capture(function: Callable[[], Tensor], device: torch.device, before: Any = None) -> Callable[[], Tensor]:
    """Do what `litmini.generation.decoding.capture` does."""
    function()
    graph = Graph()
    with graph:
        output = function()
    graphs.append(graph)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
