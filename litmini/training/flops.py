"""Throughput of training: MFU, from FLOPs counted by shape and a published or measured peak; and peak memory.

    MFU = FLOPs per second that the model needs / peak FLOPs per second of the device

The FLOPs of a step are sums over its tokens; recomputed activations do not count:

    each matrix        2 x its values in forward, 2 x for the gradient of its input, 2 x for its own gradient if it is trained
    the head           the same, for tokens with a target only: other logits are never computed
    experts            the same, for the active experts of a token
    attention          4 x layers x heads x head_dim x keys that a token sees in its document in forward; 8 x in backward
    recurrent layers   instead of attention: a state (`state_size` values) is read, changed and read, each as a matrix
"""

import re
import time
from typing import Any

import torch
from torch import nn

from litmini.system import peak_resident_bytes

Batch = dict[str, torch.Tensor]
PUBLISHED = {  # dense bf16 FLOPs per second from data sheets; the first name that occurs in the device's name is used
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Throughput:
    """Measures the throughput of optimizer steps.

    Args:
        model: with its adapters.
        dtype: compute dtype.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        config: Any = model.config
        self.per_token = self.per_target = 0.0
        for part in model.children():
            sizes = [entry for module in part.modules() for entry in matrices(module, config)]
            flops = sum(size * (6 if is_trained else 4) for size, is_trained in sizes)
            if any(type(module).__name__ == "Block" for module in part.modules()):
                self.per_token += flops
            else:  # the head
                self.per_target += flops
        recurrent = sum("state_size" in vars(module) for module in model.modules())
        self.per_key = 12.0 * (config.n_layers - recurrent) * config.n_heads * config.head_dim
        self.peak, self.source = peak_flops(device, dtype)
        self.done = self.seconds = 0.0

    @property
    def mfu(self) -> float:
        """MFU of all steps so far."""
        return self.done / max(self.seconds, 1e-9) / self.peak

    def flops(self, batches: list[Batch]) -> float:
        """Return the FLOPs of a forward and backward pass over micro-batches."""
        total = 0.0
        for batch in batches:
            tokens = batch["tokens"]
            inside = batch["documents"] > 0 if "documents" in batch else torch.ones_like(tokens, dtype=torch.bool)
            positions = batch.get("positions", torch.arange(tokens.shape[1]).expand_as(tokens))
            keys = int((positions[inside] + 1).sum())
            targets = int((batch["labels"] >= 0).sum())
            total += int(inside.sum()) * self.per_token + targets * self.per_target + keys * self.per_key
        return total

    def __call__(self, batches: list[Batch], seconds: float) -> dict[str, float]:
        """Return the metrics of a step in which this process ran `batches`."""
        flops = self.flops(batches)
        self.done, self.seconds = self.done + flops, self.seconds + seconds
        return {"mfu": flops / seconds / self.peak, "memory_mib": peak_memory_mib(self.device)}


def matrices(module: nn.Module, config: Any) -> list[tuple[float, bool]]:
    """Return (values that a token is multiplied with, whether they are trained) for each matrix of the module itself."""
    if isinstance(module, nn.Embedding):  # a lookup
        return []
    if "in_features" in vars(module):  # for any storage format of its weight
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        active = config.n_active if any(p.dim() == 3 for p in own) else 1  # experts
        size = int(module.in_features) * int(module.out_features) * active  # type: ignore[arg-type]
        return [(size, any(p.requires_grad for p in own))]
    if isinstance(module, nn.Conv1d):  # depthwise
        return [(float(module.weight.numel()), module.weight.requires_grad)]
    entries = [(float(3 * module.state_size), True)] if "state_size" in vars(module) else []  # type: ignore[arg-type, operator]
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2:
            entries.append((float(parameter.numel()), parameter.requires_grad))
        elif parameter.dim() == 3:  # experts
            entries.append((parameter.numel() * config.n_active / config.n_experts, parameter.requires_grad))
    return entries


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOPs per second of a device, and the source of that number."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PUBLISHED.items():
            if re.search(rf"{known}(?!\d)", name):  # neither an L40 for an L4, nor an A1000 for an A100
                return peak, f"published for {known}"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    (a @ a)[0, 0].item()  # loads the kernels, which on a GPU may take longer than all that follows
    best, end = 0.0, time.perf_counter() + 0.1
    while not best or time.perf_counter() < end:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # CPU-GPU sync point
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best, f"measured with a matmul of {n} x {n} in {str(dtype).removeprefix('torch.')}"


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_bytes() / 2**20
