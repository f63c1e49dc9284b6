"""The elementwise part of the language modelling loss as one function for torch.compile, for GPUs. It has not run on a GPU.

Uncompiled, it makes ten passes over the logits and several tensors as large in fp32; compiled, it reads them twice or three
times and writes their gradient over them. `cross_entropy.py` has the form for CPUs.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def has_triton(device: torch.device) -> bool:
    """Return whether torch.compile can make kernels for a GPU: Triton is installed, and supports compute capability 7.0 on.

    When it first runs, Triton compiles a module of Python in C; images of containers often lack what that takes.
    """
    has_c = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for it
    has_headers = (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").is_file()
    has_package = importlib.util.find_spec("triton") is not None
    return has_package and has_c and has_headers and torch.cuda.get_device_capability(device) >= (7, 0)


def gradient_of_logits_(
    logits: Tensor, wanted: Tensor, softcap: float | None, z_weight: float, buffer: None = None
) -> Tensor:
    """Compute `cross_entropy._gradient_of_logits_` without a buffer: the summed loss (fp32); logits become its gradient."""
    x = logits.float()  # (n, vocab)
    slope = None
    if softcap is not None:
        capped = torch.tanh(x / softcap)
        x, slope = softcap * capped, 1 - capped.square()
    top = x.amax(-1, keepdim=True)
    picked = x.gather(1, wanted) - top
    log_total = (x - top).exp().sum(-1, keepdim=True).log()
    is_wanted = torch.arange(x.shape[1], device=x.device) == wanted
    scale = 1 + 2 * z_weight * (log_total + top)
    gradient = (x - top - log_total).exp() * scale - is_wanted.float()  # `exp` again: kept, it would be written in fp32
    logits.copy_(gradient if slope is None else gradient * slope)
    return (log_total - picked).sum()
