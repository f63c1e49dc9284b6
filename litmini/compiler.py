"""What torch.compile needs, for training and for generation: a compiler, and matmuls that it knows."""

import os
import shutil

import torch
from torch import nn

from litmini.distributed.fsdp import blocks
from litmini.errors import UserError


def check_compiler(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse `--compile` where it cannot work.

    Args:
        dtype: of the matmuls.

    Raises:
        UserError: there is no compiler, or it is a model that cannot be compiled.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        from litmini.ops.fused_loss import has_triton

        if not has_triton(device):
            raise UserError(
                "--compile needs a GPU of compute capability 7.0 or more, Triton, a C compiler and Python's headers, and not "
                "all of them are there; install gcc and python3-dev, or leave --compile out."
            )
    if device.type == "cpu" and not has_cxx():
        raise UserError(f"--compile needs a C++ compiler, and {_cxx()} is not there; install g++, or set CXX.")
    if not compilable(model, dtype):
        found = "fp32" if dtype == torch.float32 else "fp16"
        raise UserError(f"--compile: torch.compile knows the matmuls of grouped experts in bf16, but not in {found}.")


def compilable(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether torch.compile knows all of the model's matmuls, in `dtype`: grouped ones have no fp32, nor fp16 on every GPU."""
    modules = (module for block in blocks(model) for module in block.modules() if not isinstance(module, nn.Conv1d))
    return dtype == torch.bfloat16 or all(p.ndim < 3 for module in modules for p in module.parameters(recurse=False))


def has_cxx() -> bool:
    """Whether the C++ compiler that torch.compile calls exists."""
    return shutil.which(_cxx()) is not None


def _cxx() -> str:
    return os.environ.get("CXX", "g++")
