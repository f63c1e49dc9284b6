"""Processes, devices and precision: the one place that makes a Fabric."""

from __future__ import annotations

import ctypes
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from litmini.config.training import RunConfig
from litmini.distributed.fsdp import shard
from litmini.distributed.processes import join
from litmini.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(config: RunConfig) -> Fabric:
    """A launched and seeded Fabric. Weights have the dtype that the script loads them in; Fabric only autocasts.

    With `bf16-mixed` products run in bf16 under autocast. With `bf16-true` and `32-true` nothing is cast: adapters are in
    fp32 over frozen weights in bf16 or fp32.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    count = config.devices * config.num_nodes
    if config.strategy == "auto" and count > 1:
        raise UserError(
            f"{config.devices} x {config.num_nodes} devices need --strategy ddp, or fsdp if the model is too large for one."
        )
    if config.precision == "16-mixed" and not torch.cuda.is_available():
        raise UserError(
            "precision 16-mixed needs a GPU: on a CPU, products in fp16 take thousands of times as long as in bf16. "
            "Use --precision bf16-mixed."
        )
    strategy: Any = config.strategy
    if strategy in ("fsdp", "hsdp"):
        if config.precision == "16-mixed":
            raise UserError(f"precision 16-mixed does not go with --strategy {strategy}. Use --precision bf16-mixed.")
        if strategy == "hsdp" and min(config.devices, config.num_nodes) < 2:
            raise UserError(
                f"--strategy hsdp shares a model inside of each node and copies it across nodes: it needs 2 or more of each, "
                f"found {config.devices} devices on {config.num_nodes} nodes. Use --strategy fsdp."
            )
        copies = config.num_nodes if strategy == "hsdp" else 1  # Fabric has names of its own for the mesh's dimensions
        strategy = ModelParallelStrategy(shard, data_parallel_size=copies, tensor_parallel_size=count // copies)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # each process would introduce itself
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torchrun.*|.*srun.*")
        fabric = Fabric(
            accelerator="auto",
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision={"bf16-mixed": "bf16-mixed", "16-mixed": None}.get(config.precision, "32-true"),  # type: ignore[arg-type]
            plugins=loss_scaling("cuda") if config.precision == "16-mixed" else None,
        )
        fabric.launch()
    join(fabric)
    if fabric.device.type == "cpu":
        keep_memory()
    torch.manual_seed(config.seed)  # initial adapter weights, the same on every rank
    return fabric


def keep_memory() -> None:
    """Let glibc keep what is freed for the next step; other allocators are left alone.

    Given back, the system clears each page anew: 6% of a step of full finetuning of a small model, 2% of one of LoRA.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is outside of it


def loss_scaling(device: str) -> Any:
    """Lightning's 16-mixed, which can also clip for the fused optimizers: they take the scale themselves."""
    from lightning_fabric.plugins import MixedPrecision

    class LossScaling(MixedPrecision):
        def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
            assert self.scaler is not None
            self.scaler.unscale_(optimizer)

    return LossScaling("16-mixed", device)


def load_device(fabric: Fabric) -> str:
    """Where a process loads the weights: with fsdp only rank 0 reads them, and the others get their shares from it."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return "meta" if isinstance(fabric.strategy, ModelParallelStrategy) and fabric.global_rank > 0 else "cpu"


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype in which a checkpoint's weights are loaded."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype in which weights are multiplied."""
    return {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision.split("-")[0]]
