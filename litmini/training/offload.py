"""Activation offloading: what a block keeps for its backward pass waits in CPU memory.

Copies run beside the device's own work: those of a block to the CPU while the next block computes, and back while the block
after it computes its backward pass. It has not run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from litmini.distributed.fsdp import blocks, is_dtensor

SMALLEST = 1 << 20  # bytes; smaller tensors stay on the device
CASTS_AND_VIEWS = {
    f"{name}Backward0"
    for name in ("ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "Alias", "Unsqueeze", "Slice", "Select")
}


def offload_activations(model: nn.Module, smallest: int = SMALLEST, queues: tuple[Any, Any] | None = None) -> None:
    """Keep the activations of every `Block` but the last in CPU memory until the backward pass needs them.

    What stays on the device: weights, whether FSDP gathered or autocast rounded them; whatever the block shares with others
    (rotary embedding, mask); integers and masks; tensors of less than `smallest` bytes.

    Args:
        queues: run the copies to the CPU, and back; None: two of `CopyStream`, and without a GPU nothing is done.
    """
    chain = blocks(model)
    if queues is None and next(model.parameters()).device.type != "cuda":
        return
    offload = _Offload(smallest, *(queues or (CopyStream(), CopyStream())))
    for i, block in enumerate(chain):
        run = functools.partial(offload.run, block, i == 0, i == len(chain) - 1)
        block.forward = functools.partial(run, block.forward)  # type: ignore[method-assign]


class CopyStream:
    """A CUDA stream for copies. Each begins after what the device was given to do before it."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy without blocking the host; return the event of its end."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the device's later work begin after `event`; the host does not wait."""
        torch.cuda.current_stream().wait_event(event)


class _Storage:
    """The bytes of one activation: on the device, in CPU memory, or on their way."""

    def __init__(self, source: Tensor) -> None:
        self.device, self.size = source.device, source.numel()
        self.source: Tensor | None = source  # (bytes,) uint8; held until the copy to the CPU has ended
        pinned = source.device.type == "cuda"  # torch keeps what is freed for others of about its size
        self.host: Tensor | None = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        self.event: Any = None
        self.copy: Tensor | None = None  # on the device again


class _Part:
    """What one block keeps."""

    def __init__(self, previous: _Part | None) -> None:
        self.previous = previous
        self.storages: dict[Any, _Storage] = {}
        self.is_released = False


class _Offload:
    def __init__(self, smallest: int, out: Any, back: Any) -> None:
        self._smallest, self._out, self._back = smallest, out, back
        self._last: _Part | None = None

    def run(self, block: nn.Module, is_first: bool, is_last: bool, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Return forward(*args, **kwargs), offloading what it keeps."""
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        previous = None if is_first else self._last
        if is_last:  # its backward pass comes next
            self._last, result = None, forward(*args, **kwargs)
            if previous is not None:  # fetched while the last block computes its backward pass
                next(_tensors(result)).register_hook(lambda _: self._fetch(previous))
        else:
            part = self._last = _Part(previous)
            pack = functools.partial(self._pack, part, _Weights(block), set(map(_address, _tensors(args[1:]))))
            with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
                result = forward(*args, **kwargs)
        if previous is not None:
            self._release(previous)
        return result

    def _pack(self, part: _Part, weights: _Weights, shared: set[int], tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        small = tensor.nbytes < self._smallest or not tensor.is_floating_point()
        if small or storage.data_ptr() in shared or tensor in weights:
            return tensor
        tensor = tensor.detach()
        if storage.nbytes() != tensor.nbytes:  # part of a larger tensor
            tensor = tensor.contiguous().clone()
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        key = (raw.data_ptr(), tensor._version)  # three matmuls of one input keep it once
        if key not in part.storages:
            kept = part.storages[key] = _Storage(raw)
            kept.event = self._out.copy(kept.host, raw)
        return part, part.storages[key], tensor.dtype, tensor.size(), tensor.stride()

    def _release(self, part: _Part) -> None:
        """Let go of what a block computed, after it has been copied."""
        for kept in part.storages.values():
            if kept.source is not None:
                self._out.wait(kept.event)
                kept.source = None
        part.is_released = True

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        part, kept, dtype, size, stride = packed
        for each in (part, part.previous):  # the next one's copies run while this one computes
            if each is not None and each.is_released:
                self._fetch(each)
        if kept.source is not None:
            return kept.source.view(dtype).as_strided(size, stride)  # type: ignore[no-any-return]
        if kept.host is not None:  # the first who needs it
            self._back.wait(kept.event)
            kept.host = None
        return kept.copy.view(dtype).as_strided(size, stride)  # type: ignore[no-any-return]

    def _fetch(self, part: _Part) -> None:
        for kept in part.storages.values():
            if kept.copy is None:
                kept.copy = torch.empty(kept.size, dtype=torch.uint8, device=kept.device)
                kept.event = self._back.copy(kept.copy, kept.host)
        part.storages = {}  # what is left belongs to the graph, which frees it


class _Weights:
    """The weights of a block as they are now: FSDP may just have gathered them."""

    def __init__(self, block: nn.Module) -> None:
        tensors = [t for t in [*block.parameters(), *block.buffers()] if not is_dtensor(t)]
        self._addresses = set(map(_address, tensors))
        self._shapes = {t.shape for t in tensors if t.dim() > 1 and not t.requires_grad}

    def __contains__(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a weight, a view of one, or a weight that autocast has cast."""
        if _address(tensor) in self._addresses:
            return True
        node = tensor.grad_fn
        if node is None and not tensor.requires_grad:  # frozen, and so without a graph: a cast weight has its shape
            return tensor.dim() > 1 and (tensor.shape in self._shapes or tensor.mT.shape in self._shapes)
        while node is not None and node.name() in CASTS_AND_VIEWS:
            node = node.next_functions[0][0]
        return node is None or hasattr(node, "variable")  # a leaf of the graph


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
