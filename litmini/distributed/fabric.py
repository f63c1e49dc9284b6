"""Processes, devices and precision: the one place that makes a Fabric."""

from __future__ import annotations

import ctypes
import functools
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


def fabric_class() -> Any:
    """Return the class `Fabric`.

    Its import asks torchmetrics for its version, which imports transformers and scipy where they are installed, in 1.5 s, for
    a feature that is not used here.
    """
    imported = "torchmetrics" in sys.modules
    if not imported:
        sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        from lightning_fabric import Fabric
    finally:
        if not imported:
            del sys.modules["torchmetrics"]
    return Fabric


def make_fabric(config: RunConfig) -> Fabric:
    """Return a launched and seeded Fabric. Scripts load weights in their final dtype; Fabric only enables autocast.

    With `bf16-mixed` and `16-mixed`, matmuls run under autocast. With `bf16-true` and `32-true` nothing is cast: adapters
    are in fp32 over frozen weights in bf16 or fp32.

    Raises:
        UserError: devices, precision and strategy do not go together.
    """
    Fabric = fabric_class()
    from lightning_fabric.strategies import ModelParallelStrategy

    count = config.devices * config.num_nodes
    if config.strategy == "auto" and count > 1:
        raise UserError(
            f"{config.devices} x {config.num_nodes} devices need --strategy ddp, or fsdp if the model is too large for one."
        )
    if config.precision == "16-mixed" and not torch.cuda.is_available():
        raise UserError(
            "precision 16-mixed needs a GPU: on a CPU, fp16 matmuls take thousands of times as long as bf16 matmuls. "
            "Use --precision bf16-mixed."
        )
    if config.attention != "auto" and not torch.cuda.is_available():
        raise UserError(
            f"--attention {config.attention} needs a GPU: on a CPU, attention runs document by document. Leave it out."
        )
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    strategy: Any = config.strategy
    if strategy in ("fsdp", "hsdp"):
        if config.precision == "16-mixed":
            raise UserError(f"precision 16-mixed does not go with --strategy {strategy}. Use --precision bf16-mixed.")
        if strategy == "hsdp" and min(config.devices, config.num_nodes) < 2:
            raise UserError(
                f"--strategy hsdp shards a model within each node and replicates it across nodes: it needs 2 or more of each, "
                f"found {config.devices} devices on {config.num_nodes} nodes. Use --strategy fsdp."
            )
        replicas = config.num_nodes if strategy == "hsdp" else 1  # Fabric calls the mesh's dimensions data and tensor
        parallelize: Any = functools.partial(shard, mixed=config.precision == "bf16-mixed")
        strategy = ModelParallelStrategy(
            parallelize, data_parallel_size=replicas, tensor_parallel_size=count // replicas
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else each process logs its rank
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torchrun.*|.*srun.*")
        fabric = Fabric(
            accelerator="auto",
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=None if config.precision.endswith("mixed") else "32-true",
            plugins=mixed_precision(config.precision) if config.precision.endswith("mixed") else None,
        )
        fabric.launch()
    join(fabric)
    if fabric.device.type == "cpu":
        keep_memory()
    torch.manual_seed(config.seed)  # initial adapter weights, the same on every rank
    return fabric


def sum_on_host(fabric: Fabric, *counts: int) -> list[int]:
    """Return the sums of `counts` over all ranks, without waiting for the work that is queued on a GPU."""
    if fabric.world_size == 1:
        return list(counts)
    total = torch.tensor(counts)
    torch.distributed.all_reduce(total, group=host_group())
    return total.tolist()


@functools.lru_cache(1)
def host_group() -> Any:
    """Return a group of all processes whose tensors are on the host. Every rank makes it at the same time."""
    if torch.distributed.get_backend() == "gloo":
        return None
    return torch.distributed.new_group(backend="gloo")


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step. Other allocators stay unchanged.

    The system clears every page that it hands out again: 6% of a step of full finetuning of a small model, 2% with LoRA.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all allocations are in the heap


def mixed_precision(precision: Any, device: str | None = None) -> Any:
    """Return Lightning's plugin, extended to clip gradients with fused optimizers, which unscale by themselves, and to leave
    inputs as they are: it would write into the frozen dataclasses among them.

    Args:
        device: None: the kind that Fabric chooses.
    """
    from lightning_fabric.plugins import MixedPrecision

    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")

    class Autocast(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

        def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)

    return Autocast(precision, device)  # type: ignore[arg-type]


def load_device(fabric: Fabric) -> str:
    """Return the device to load weights on: with fsdp only rank 0 reads them, and sends the other ranks their shards."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return "meta" if isinstance(fabric.strategy, ModelParallelStrategy) and fabric.global_rank > 0 else "cpu"


def weight_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which a checkpoint's weights are loaded."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matmuls."""
    return {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision.split("-")[0]]
