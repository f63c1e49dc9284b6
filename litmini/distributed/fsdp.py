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


def shard(model: nn.Module, mesh: "DeviceMesh", mixed: bool = False) -> nn.Module:
    """Shard each `Block`, then the rest of `model`, over the mesh's second dimension; replicate over the first one.

    Rank 0 has the values; on other ranks parameters may be on the meta device. So every other rank needs, beside its shard,
    memory for one block. A block's parameters are gathered before its forward and its backward, and freed after it.

    Args:
        mixed: with `bf16-mixed`, gather the matrices of blocks in bf16, in which autocast computes, and sum gradients over
            ranks in fp32. Norms, embedding and head are gathered in fp32: autocast computes with all of their bits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    if mesh.ndim == 2 and mesh.size(0) == 1:  # no replicas
        mesh = mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        _broadcast(block, device)
        vectors = _vector_modules(block)
        if in_bf16 := mixed and _is_rounded_by_autocast(block, vectors):
            fully_shard(vectors, mesh=mesh)  # a group of its own, as a policy is for all parameters of a group
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=bf16 if in_bf16 else MixedPrecisionPolicy())
    _broadcast(model, device)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _vector_modules(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that have vectors only: its norms."""
    every = [(module, list(module.parameters(recurse=False))) for module in block.modules()]
    return [module for module, own in every if own and all(p.dim() < 2 for p in own)]


def _is_rounded_by_autocast(block: nn.Module, vectors: list[nn.Module]) -> bool:
    """Return whether all parameters of a block but `vectors` are fp32 matrices and their biases.

    4-bit weights must not be rounded, nor the vectors of DoRA and IA3, with which autocast computes in fp32.
    """
    kept = {p for module in vectors for p in module.parameters()}
    rest = [(name, p) for name, p in block.named_parameters() if p not in kept]
    return all(p.dtype == torch.float32 and (p.dim() > 1 or name.endswith(".bias")) for name, p in rest)


def gathered_bytes(block: nn.Module, mixed: bool) -> int:
    """Return the bytes of a block's parameters as `shard` gathers them."""
    vectors = _vector_modules(block)
    kept = {p for module in vectors for p in module.parameters()}
    in_bf16 = mixed and _is_rounded_by_autocast(block, vectors)
    return sum(p.numel() * (2 if in_bf16 and p not in kept else p.element_size()) for p in block.parameters())


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
