"""torch.compile for decoding on the CPU, where a token costs as much in single operations as in reading the weights.

Blocks are compiled one by one: they have the same code, so one compilation serves all, and it is kept on disk. Prompts, whose
lengths all differ, are read as without it.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.config import UserError
from litmini.sharding import blocks


class OneRowLinear(nn.Linear):
    """A linear whose product with one row the compiler writes out: it reads bf16 faster than torch's own does on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu" or not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        y = (x.reshape(1, -1).float() * self.weight.float()).sum(-1)  # (out_features,) fp32
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def compile_decoding(model: nn.Module) -> None:
    """Let `model`, in 16 or 32 bits, read single tokens through compiled blocks; the first one takes some seconds more.

    Raises:
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(model.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler, and {compiler} is not there; install g++, or set CXX.")
    parts = [*blocks(model), *(m for m in model.children() if isinstance(m, nn.Linear))]  # and the head
    for part in parts:
        for module in part.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneRowLinear
        part.forward = _for_single_tokens(part.forward)  # type: ignore[method-assign]


def _for_single_tokens(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=True)  # the number of keys grows with every token

    def forward(x: Tensor, *others: Any) -> Any:
        return (compiled if x.shape[1] == 1 else eager)(x, *others)

    return forward
