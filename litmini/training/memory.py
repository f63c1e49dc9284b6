"""Estimates the peak memory of a training step, by part, without running it.

Forward and backward of the model run on fake tensors, which have shapes but no values, and every storage that is allocated
and freed is counted. Index tensors (tokens, documents, labels) stay real, as models read their values on a CPU. For a GPU,
where they read none, they are fake as well, and attention and loss are those of a GPU; no estimate has been compared with one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from litmini.config.training import OptimConfig
from litmini.errors import UserError
from litmini.ops.attention import ESTIMATE
from litmini.ops.cross_entropy import Targets
from litmini.training.objective import LanguageModeling, Measuring, Objective
from litmini.training.optimizer import block_matrices
from litmini.training.setup import on_device

Batch = dict[str, torch.Tensor]
LANGUAGE_MODELING = LanguageModeling()
FRAGMENTED = 0.6
"""Of what comes and goes in a step, the part that glibc holds beside it once micro-batches of other shapes have run: up to
glibc 2.37 an aligned block does not fit into the gap that one of the same size has left. Measured; see docs/benchmarks.md."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by part."""

    frozen: int
    """Frozen weights."""
    trained: int
    """Adapters, or all weights."""
    optimizer: int
    """Optimizer state."""
    gradients: int
    """The gradients that exist at the peak."""
    activations: int
    """Tensors that the forward pass keeps for the backward pass."""
    loss: int
    """Logits and tensors computed from them, and the gradient of the head while it is summed."""
    temporary: int
    """Temporary tensors of the operation that runs at the peak."""
    process: int = 0
    """Memory of the process without the model: Python, torch, the data; on a GPU, CUDA with its kernels."""
    allocator: int = 0
    """Fragmentation of the allocator. Of a CPU: `FRAGMENTED` of activations, loss and temporary tensors."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(
    model: nn.Module,
    batch: Batch,
    config: OptimConfig,
    precision: str,
    accumulate: bool = False,
    process: int = 0,
    objective: Objective = LANGUAGE_MODELING,
    gpu_memory: int = 0,
) -> Memory:
    """Estimate the memory of the training steps of `model`, which may be on the meta device.

    Args:
        batch: a micro-batch of training, on the CPU.
        precision: as in `RunConfig`.
        accumulate: the gradients of one micro-batch exist while the next one runs.
        process: bytes of the process without the model; 0 on a GPU.
        objective: the loss of which the gradients are computed.
        gpu_memory: bytes of memory of the GPU that will train; 0: a CPU will.

    Raises:
        UserError: the shapes of the model's tensors depend on values, as those of experts do.
    """
    trained = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    matrices = block_matrices(model) if config.name == "muon" else set()
    frozen = {id(p): p for p in [*model.parameters(), *model.buffers()] if not p.requires_grad}.values()
    batch = as_on_gpu(batch, gpu_memory) if gpu_memory else batch
    peak = _peak(model, batch, precision, objective, accumulate, config.in_backward)
    return Memory(
        frozen=sum(map(nbytes, frozen)),
        trained=sum(map(nbytes, trained)),
        optimizer=sum(optimizer_bytes(p, config, p in matrices) for p in trained),
        process=process,
        allocator=int(FRAGMENTED * (sum(peak.values()) - peak["gradients"])) if process else 0,
        **peak,
    )


def as_on_gpu(batch: Batch, gpu_memory: int) -> dict[str, Any]:
    """Return a batch with which a model takes the attention kernel and the loss of a GPU with so many bytes of memory."""
    ready = on_device(batch, torch.device("cpu"), ESTIMATE)
    return {**ready, "labels": replace(ready["labels"], gpu_memory=gpu_memory)}


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(parameter: torch.Tensor, config: OptimConfig, by_muon: bool = False) -> int:
    """Return the bytes of the optimizer state of a parameter. Muon, for the matrices of blocks, has one moment."""
    if config.name == "sgd" or config.offload:
        return 0
    if config.stochastic_rounding:
        return 8 * parameter.numel()
    if "8bit" in config.name and parameter.numel() >= 4096:
        return 2 * parameter.numel() + 8 * (parameter.numel() // 256 + 1)  # with a scale for each block of 256
    return (1 if by_muon else 2) * (4 * parameter.numel() if "8bit" in config.name else nbytes(parameter))


def _peak(
    model: nn.Module,
    batch: dict[str, Any],
    precision: str,
    objective: Objective,
    accumulate: bool = False,
    in_backward: bool = False,
) -> dict[str, int]:
    """Return the bytes that are allocated at the peak of a forward and backward pass, by part."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if isinstance(batch["labels"], Targets):
        as_fake = mode.from_tensor
        batch = {n: as_fake(v) if isinstance(v, torch.Tensor) else v.map(as_fake) for n, v in batch.items()}
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with _faked(model, mode) as fakes:
        ledger = _Ledger(model.config.vocab_size, fakes)  # type: ignore[union-attr,arg-type]
        if in_backward:
            for fake in fakes:
                fake.register_post_accumulate_grad_hook(
                    lambda p: setattr(p, "grad", None)
                ) if fake.requires_grad else None
        try:
            for _ in range(2 if accumulate else 1):
                with _KnownShapes(mode), ledger, torch.autocast("cpu", mixed, enabled=mixed is not None):
                    loss = objective.loss(model, batch)
                    ledger.end_of_forward()
                    loss.backward()
                del loss
        except RuntimeError as error:  # such as torch's DataDependentOutputException
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the memory of this model cannot be estimated: {what}") from error
        if isinstance(objective, Measuring):
            objective.take_sums()  # of fake tensors
        gradients = {fake.grad.untyped_storage()._cdata for fake in fakes if fake.grad is not None}
        return ledger.parts(gradients)


@contextmanager
def _faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[list[torch.Tensor]]:
    """Replace all parameters and buffers by fake tensors, tied ones by one tensor, in training mode; yield the fakes."""
    originals = [(owner, dict(owner)) for m in model.modules() for owner in (m._parameters, m._buffers)]
    training, fakes = model.training, dict[int, torch.Tensor]()
    for owner, tensors in originals:
        for name, real in tensors.items():
            if real is not None and id(real) not in fakes:
                with mode:
                    fake = torch.empty(real.shape, dtype=real.dtype)
                if isinstance(real, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=real.requires_grad)
                fakes[id(real)] = fake
            if real is not None:
                owner[name] = fakes[id(real)]  # type: ignore[assignment]
    try:
        model.train()
        yield list(fakes.values())
    finally:
        model.train(training)
        for owner, tensors in originals:
            owner.update(tensors)  # type: ignore[arg-type]


class _Ledger(TorchDispatchMode):
    """Records every storage that an operation allocates, its size, and when it is freed.

    Args:
        vocab: tensors with a dimension of this size belong to the loss.
        existing: tensors that exist before; views of them are not counted.
    """

    def __init__(self, vocab: int, existing: list[torch.Tensor]) -> None:
        super().__init__()
        self._vocab = vocab
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._alive: dict[int, int] = {}  # address of a storage -> its entry
        self._entries: list[tuple[int, int, bool]] = []  # (bytes, address, whether a dimension is the vocabulary)
        self._events: list[tuple[int, int]] = []  # (entry, +1 allocated or -1 freed)
        self._forward_end = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._record, result)
        return result

    def _record(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive and address not in self._existing:
            entry = len(self._entries)
            self._alive[address] = entry
            self._entries.append((storage.nbytes(), address, self._vocab in tensor.shape))
            self._events.append((entry, 1))
            weakref.finalize(storage, self._free, address, entry)

    def _free(self, address: int, entry: int) -> None:
        self._alive.pop(address, None)
        self._events.append((entry, -1))

    def end_of_forward(self) -> None:
        """Mark the end of the last forward pass."""
        self._forward_end = len(self._entries)

    def parts(self, gradients: set[int]) -> dict[str, int]:
        """Return the bytes at the peak: gradients (those at these addresses), loss, activations and temporary tensors."""
        kinds = []
        for entry, (_, address, vocab) in enumerate(self._entries):
            if self._alive.get(address) == entry and address in gradients:
                kinds.append("gradients")
            else:
                kinds.append("loss" if vocab else "activations" if entry < self._forward_end else "temporary")
        now = dict.fromkeys(("gradients", "loss", "activations", "temporary"), 0)
        peak = dict(now)
        for entry, sign in self._events:
            now[kinds[entry]] += sign * self._entries[entry][0]
            if sum(now.values()) > sum(peak.values()):
                peak = dict(now)
        return peak


class _KnownShapes(TorchFunctionMode):
    """Lets a real mask index fake tensors, and makes large buffers fake."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            if isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
                return func(args[0], args[1].nonzero(as_tuple=True))
        elif func is torch.zeros and kwargs.get("dtype") in (torch.float32, torch.bfloat16, torch.float16):
            with self._mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def full_rows(count: int, length: int, vocab: int) -> Batch:
    """Return the micro-batch that needs most memory: one document fills each sequence, and every token is a target."""
    tokens = torch.arange(count * length).view(count, length) % vocab
    positions = torch.arange(length).expand(count, length).contiguous()
    return {"tokens": tokens, "positions": positions, "documents": torch.ones_like(tokens), "labels": tokens}


def describe(memory: Memory) -> str:
    """Return a line for each part, in MiB."""
    names = {"frozen": "frozen weights", "trained": "trained weights", "process": "process, or CUDA context"}
    parts = {names.get(part, part): size for part, size in vars(memory).items()} | {"peak": memory.total}
    return "\n".join(f"  {name:30}{size / 2**20:12,.0f} MiB" for name, size in parts.items())
