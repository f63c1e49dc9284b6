"""torch.compile for training, block by block: blocks have the same code, so all use one compilation, cached on disk.

For GPUs it has been tested with a stand-in of the attention kernel on a CPU only.
"""

import functools
import math
from typing import Any

import torch
from torch import nn

from litmini.compiler import check_compiler, has_cxx
from litmini.distributed.fsdp import blocks

# `auto` compiles if each process computes at least this many FLOPs in the run. On a CPU: 20 minutes of a small model, where
# compiling took a minute and saved a tenth of each step. On a GPU: 10 minutes at 100 TFLOP/s, an estimate.
COMPILE_THRESHOLD = {"cpu": 2.5e14, "cuda": 6e16}
DYNAMIC = "L['mask'].packed.bounds,L['mask'].packed.longest"  # of a block's arguments, what differs in each batch


def is_worth_compiling(flops: float, device: torch.device) -> bool:
    """Return whether `--compile auto` compiles a run of `flops` FLOPs per process: it is long enough, and can be compiled."""
    if device.type == "cpu":
        can_compile = has_cxx()
    elif can_compile := device.type == "cuda":
        from litmini.ops.fused_loss import has_triton

        can_compile = has_triton(device)
    return can_compile and flops >= COMPILE_THRESHOLD.get(device.type, math.inf)


def compile_training(
    model: nn.Module, dtype: torch.dtype, backend: str = "inductor", static: bool | None = None
) -> None:
    """Compile forward and backward of every `Block` in training mode; the first step takes about a minute longer.

    Evaluation and generation stay uncompiled and bit-identical. So the mode selects the `forward`: `nn.Module.compile()`
    would compile evaluation as well, and nothing under activation checkpointing.

    Args:
        dtype: compute dtype.
        static: compile for the size of the first batch, which all packed sequences have, and once more for all sizes
            if another one comes (the last rows of an epoch, or sequences that are not packed); None: on a GPU.

    Raises:
        UserError: there is no compiler, or the model cannot be compiled.
    """
    check_compiler(model, dtype)
    if static is None:
        static = next(model.parameters()).device.type == "cuda"
    if static:
        import torch.compiler.config as compiler

        from litmini.ops.uncompiled import allow_forms

        compiler.dynamic_sources = compiler.dynamic_sources or DYNAMIC
        allow_forms()

    def choose(module: nn.Module, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training else plain)(*args, **kwargs)

    for module in blocks(model):
        compiled = torch.compile(module.forward, dynamic=None if static else True, backend=backend)
        module.forward = functools.partial(choose, module, module.forward, compiled)  # type: ignore[method-assign]
