"""A model's parameters shared out over processes (FSDP2), and the state of training that each process saves and loads.

Every parameter is then a DTensor cut by its first dimension. All processes take part in each forward, and in `whole`.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from litmini.config import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

SHARES = "training_state"  # directory in a checkpoint: a safetensors file of each process


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
                if tensor is None or is_share(tensor):
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


def is_share(tensor: Any) -> TypeGuard["DTensor"]:
    """Whether a tensor is shared out over processes."""
    if not dist.is_initialized():
        return False  # importing DTensor takes a second, which a command that only talks can save
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    return any(is_share(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes, each of which must ask for it."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's parameters: (in this process, in all)."""
    parameters = list(model.parameters())
    local = [p.to_local() if is_share(p) else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local), sum(p.numel() * p.element_size() for p in parameters)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """(`parameter/NAME`, tensor) of every trainable parameter, and what the optimizer keeps for it, as (`KEY/NAME`, value)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"parameter/{name}", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value


def save_shares(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Begin to write every process's share of `named_state` into `directory`, as safetensors. All processes call this.

    What is written is a copy in the CPU's memory: training goes on meanwhile.

    Returns:
        Waits until all processes have written, and raises what failed.
    """
    import torch.distributed.checkpoint as checkpoint

    tensors = {name: value for name, value in named_state(model, optimizer) if isinstance(value, Tensor)}
    writer = checkpoint.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    written: Any = checkpoint.async_save(tensors, storage_writer=writer, process_group=_beside(dist.group.WORLD))

    def wait() -> None:
        try:
            written.result()
        except checkpoint.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None

    return wait


@functools.cache
def _beside(world: Any) -> Any:
    """The processes of `world` once more, to speak of a checkpoint while training speaks to them."""
    return dist.new_group(backend="gloo")


def load_shares(directory: Path, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Read this process's share of every tensor named `kind/parameter` in the safetensors files of `directory`.

    How many processes wrote them does not matter. All processes call this.

    Args:
        like: the parameters; a tensor of a parameter's shape is shared out as that parameter is.

    Raises:
        UserError: a file is damaged.
    """
    import torch.distributed.checkpoint as checkpoint

    try:
        reader = checkpoint.HuggingFaceStorageReader(str(directory))
        tensors = {}
        there: Any = reader.read_metadata().state_dict_metadata
        for name, found in there.items():
            parameter = like.get(name.partition("/")[2])
            if parameter is not None and found.size == parameter.shape:
                tensors[name] = torch.empty_like(parameter, dtype=found.properties.dtype, requires_grad=False)
            elif "/" in name:
                tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            checkpoint.load(tensors, storage_reader=reader)
    except (SafetensorError, OSError, ValueError, KeyError, checkpoint.CheckpointException) as error:
        raise UserError(f"{directory} is damaged ({error}); resume from another step-*.") from None
    yield from tensors.items()
