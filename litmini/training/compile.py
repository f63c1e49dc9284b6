"""torch.compile for training, block by block: they have the same code, so one compilation serves all and is kept on disk."""

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import nn

from litmini.compiler import check_compiler, has_cxx
from litmini.distributed.fsdp import blocks

# FLOPs of each process in a whole run from which on `auto` compiles. On a CPU: 20 minutes of a small model, where a
# minute of compiling and a tenth off each step were measured. On a GPU: 10 minutes at 100 Tflop/s, by judgement alone.
COMPILE_THRESHOLD = {"cpu": 2.5e14, "cuda": 6e16}


def is_worth_compiling(flops: float, device: torch.device) -> bool:
    """Whether `--compile auto` compiles for a run of so many FLOPs in each process: it is long enough, and can be."""
    if device.type == "cpu":
        can_compile = has_cxx()
    else:  # torch.compile needs Triton there, which needs GPUs of this generation
        can_compile = importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (
            7,
            0,
        )
    return can_compile and flops >= COMPILE_THRESHOLD.get(device.type, math.inf)


def compile_training(model: nn.Module, dtype: torch.dtype, backend: str = "inductor") -> None:
    """Let torch.compile make the training forward and backward of every `Block`; the first step takes a minute or so more.

    What is not training (evaluation, generation, with their caches) runs as it is written, to the bit. So `forward` is
    chosen by mode: `nn.Module.compile()` compiles evaluation, too, and nothing at all under activation checkpointing.

    Args:
        dtype: of the matmuls.

    Raises:
        UserError: there is no C++ compiler, or it is a model that cannot be compiled.
    """
    check_compiler(model, dtype)

    def choose(module: nn.Module, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training else plain)(*args, **kwargs)

    for module in blocks(model):
        compiled = torch.compile(module.forward, dynamic=True, backend=backend)
        module.forward = functools.partial(choose, module, module.forward, compiled)  # type: ignore[method-assign]
