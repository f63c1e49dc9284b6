"""torch.compile, block by block: blocks have the same code, so one compilation serves all, and it is kept on disk.

For training; and for decoding on the CPU, where a token costs as much in single operations as in reading the weights.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini import attention
from litmini.config import UserError
from litmini.lora import LoRALinear
from litmini.sharding import blocks

# Operations of each process in a whole run from which on `auto` compiles. On a CPU: 20 minutes of a small model, where a
# minute of compiling and a tenth off each step were measured. On a GPU: 10 minutes at 100 Tflop/s, by judgement alone.
WORTH = {"cpu": 2.5e14, "cuda": 6e16}


def pays(flops: float, device: torch.device) -> bool:
    """Whether `--compile auto` compiles for a run of so many operations in each process: it is long enough, and can be."""
    if device.type == "cpu":
        there = shutil.which(_compiler()) is not None
    else:  # torch.compile needs Triton there, which needs cards of this generation
        there = importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return there and flops >= WORTH.get(device.type, math.inf)


def compile_training(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch.compile make the training forward and backward of every `Block`; the first step takes a minute or so more.

    What is not training (evaluation, answers, with their caches) runs as it is written.

    Raises:
        UserError: there is no C++ compiler.
    """
    _check_compiler(model)
    # its loop over documents is another one in each batch, and all its time is in large operations
    attention._document_by_document = torch.compiler.disable(attention._document_by_document)

    def choose(module: nn.Module, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training else plain)(*args, **kwargs)

    for module in blocks(model):
        compiled = torch.compile(module.forward, dynamic=True, backend=backend)
        module.forward = functools.partial(choose, module, module.forward, compiled)  # type: ignore[method-assign]


def _check_compiler(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "cpu" and shutil.which(_compiler()) is None:
        raise UserError(f"--compile needs a C++ compiler, and {_compiler()} is not there; install g++, or set CXX.")


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


class OneRowLinear(nn.Linear):
    """A linear whose product with one row the compiler writes out: it reads bf16 faster than torch's own does on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu" or not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        y = (x.reshape(1, -1).float() * self.weight.float()).sum(-1)  # (out_features,) fp32
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def compile_decoding(model: nn.Module) -> None:
    """Let `model`, in 16 or 32 bits, read single tokens through compiled blocks; the first one takes some seconds more.

    Prompts, whose lengths all differ, are read as without it.

    Raises:
        UserError: there is no C++ compiler.
    """
    _check_compiler(model)
    adapted = {id(m.base) for m in model.modules() if isinstance(m, LoRALinear)}  # summed in one operation
    parts = [*blocks(model), *(m for m in model.children() if isinstance(m, nn.Linear))]  # and the head
    for part in parts:
        for module in part.modules():
            if type(module) is nn.Linear and id(module) not in adapted:
                module.__class__ = OneRowLinear
        part.forward = _for_single_tokens(part.forward)  # type: ignore[method-assign]


def _for_single_tokens(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=True)  # the number of keys grows with every token

    def forward(x: Tensor, *others: Any) -> Any:
        return (compiled if x.shape[1] == 1 else eager)(x, *others)

    return forward
