"""torch.compile for training, block by block: they have the same code, so one compilation serves all and is kept on disk."""

import functools
import importlib.util
import math
import os
import shutil
from typing import Any

import torch
from torch import Tensor, library, nn

from litmini.distributed.fsdp import blocks
from litmini.errors import UserError
from litmini.methods import lora
from litmini.ops import attention

# Operations of each process in a whole run from which on `auto` compiles. On a CPU: 20 minutes of a small model, where a
# minute of compiling and a tenth off each step were measured. On a GPU: 10 minutes at 100 Tflop/s, by judgement alone.
COMPILE_THRESHOLD = {"cpu": 2.5e14, "cuda": 6e16}


def is_worth_compiling(flops: float, device: torch.device) -> bool:
    """Whether `--compile auto` compiles for a run of so many operations in each process: it is long enough, and can be."""
    if device.type == "cpu":
        there = shutil.which(_compiler()) is not None
    else:  # torch.compile needs Triton there, which needs cards of this generation
        there = importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return there and flops >= COMPILE_THRESHOLD.get(device.type, math.inf)


def compile_training(model: nn.Module, dtype: torch.dtype, backend: str = "inductor") -> None:
    """Let torch.compile make the training forward and backward of every `Block`; the first step takes a minute or so more.

    What is not training (evaluation, answers, with their caches) runs as it is written.

    Args:
        dtype: of the products.

    Raises:
        UserError: there is no C++ compiler, or it is a model that cannot be compiled.
    """
    check_compiler(model, dtype)
    # its loop over documents is another one in each batch, and all its time is in large operations
    attention._document_by_document = torch.compiler.disable(attention._document_by_document)
    lora.add_product_ = _add_product_

    def choose(module: nn.Module, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training else plain)(*args, **kwargs)

    for module in blocks(model):
        compiled = torch.compile(module.forward, dynamic=True, backend=backend)
        module.forward = functools.partial(choose, module, module.forward, compiled)  # type: ignore[method-assign]


@library.custom_op("litmini::add_product_", mutates_args=("y",))
def _add_product(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """Opaque to the compiler, whose own `addmm` copies all of y first: 3.5% of a step of LoRA on a CPU."""
    y.addmm_(x, dense)


def _add_product_(y: Tensor, x: Tensor, dense: Tensor) -> Tensor:
    _add_product(y, x, dense)
    return y


def check_compiler(model: nn.Module, dtype: torch.dtype) -> None:
    if next(model.parameters()).device.type == "cpu" and shutil.which(_compiler()) is None:
        raise UserError(f"--compile needs a C++ compiler, and {_compiler()} is not there; install g++, or set CXX.")
    if not compilable(model, dtype):
        raise UserError("--compile: torch.compile knows the products of stacked experts in bf16, but not in fp32.")


def compilable(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether torch.compile knows all of the model's products, in `dtype`: grouped ones have no fp32 in torch 2.13."""
    return dtype != torch.float32 or all(p.ndim < 3 for block in blocks(model) for p in block.parameters())


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
