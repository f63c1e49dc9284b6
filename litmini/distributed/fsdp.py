"""A model's parameters shared out over processes (FSDP2), and the state of training that each process saves and loads.

Every parameter is then a DTensor cut by its first dimension. All processes take part in each forward, and in `full_tensor`.
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
    """Every `Block` of a model.

    Raises:
        UserError: there is none.
    """
    found = [m for m in model.modules() if any(kind.__name__ == "Block" for kind in type(m).__mro__)]  # FSDP derives
    if not found:
        raise UserError(
            "this model has no class named Block; --strategy fsdp and train.checkpoint_activations go by blocks."
        )
    return found


def shard(model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Share each `Block`, then the rest of `model`, out over the mesh's second dimension; the first one holds copies.

    Rank 0 has the values; elsewhere parameters may be on the meta device. So every process but that one needs, beside its
    share, memory for one block. A block's parameters are gathered before its forward and its backward, and freed after.
    """
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    if mesh.ndim == 2 and mesh.size(0) == 1:  # no copies
        mesh = mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    for part in [*blocks(model), model]:
        _spread(part, device)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


def _spread(part: nn.Module, device: torch.device) -> None:
    """Give every process the values that rank 0 has of the parameters and buffers not shared out yet. Ties stay."""
    new: dict[Tensor, Tensor] = {}
    for _, module in sorted(part.named_modules(), key=lambda item: item[0]):  # in one order everywhere
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
    """Whether a tensor is shared out over processes."""
    if not dist.is_initialized():
        return False  # importing DTensor takes a second, which a command that only talks can save
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    return any(is_dtensor(parameter) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes, each of which must ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's parameters: (in this process, in all)."""
    parameters = list(model.parameters())
    local = [p.to_local() if is_dtensor(p) else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local), sum(p.numel() * p.element_size() for p in parameters)
