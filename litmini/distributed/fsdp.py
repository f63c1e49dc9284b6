"""Shards a model's parameters over processes (FSDP2).

Every parameter becomes a DTensor, sharded along its first dimension. All processes take part in each forward and in
`full_tensor`.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from litmini.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return every `Block` of a model.

    Raises:
        UserError: the model has none.
    """
    found = [m for m in model.modules() if any(kind.__name__ == "Block" for kind in type(m).__mro__)]  # FSDP derives
    if not found:
        raise UserError(
            "this model has no class named Block; --strategy fsdp and train.checkpoint_activations work on blocks."
        )
    return found


def shard(model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Shard each `Block`, then the rest of `model`, over the mesh's second dimension; replicate over the first one.

    Rank 0 has the values; on other ranks parameters may be on the meta device. So every other rank needs, beside its shard,
    memory for one block. A block's parameters are gathered before its forward and its backward, and freed after it.
    """
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    if mesh.ndim == 2 and mesh.size(0) == 1:  # no replicas
        mesh = mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    for part in [*blocks(model), model]:
        _broadcast(part, device)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


def _broadcast(part: nn.Module, device: torch.device) -> None:
    """Send the parameters and buffers that are not sharded yet from rank 0 to all processes. Tied parameters stay tied."""
    new: dict[Tensor, Tensor] = {}
    for _, module in sorted(part.named_modules(), key=lambda item: item[0]):  # the same order on all ranks
        for tensors in (module._parameters, module._buffers):
            for name, tensor in sorted(tensors.items()):
                if tensor is None or is_dtensor(tensor):
                    continue
                if tensor not in new:
                    if tensor.is_meta:
                        data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    else:
                        data = tensor.detach().to(device).contiguous()
                    dist.broadcast(data, src=0)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    new[tensor] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
                tensors[name] = new[tensor]  # type: ignore[assignment]


def is_dtensor(tensor: Any) -> TypeGuard["DTensor"]:
    """Return whether a tensor is sharded over processes."""
    if not dist.is_initialized():
        return False  # importing DTensor takes a second, which generation saves
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    return any(is_dtensor(parameter) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from the shards of all processes; all of them must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's parameters: (in this process, in total)."""
    parameters = list(model.parameters())
    local = [p.to_local() if is_dtensor(p) else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local), sum(p.numel() * p.element_size() for p in parameters)
