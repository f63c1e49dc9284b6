"""The training state that a run resumes from: progress, trainable parameters and optimizer state, by parameter name."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from litmini.checkpoints.safetensors_io import read_tensors, write_tensors
from litmini.distributed.fsdp import is_sharded
from litmini.errors import UserError
from litmini.files import read_json, write_json
from litmini.training.setup import Progress


def save_state(directory: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write progress, trainable parameters and optimizer state into `directory`; a run has no other state.

    The tensors of a sharded model are in the directory `SHARDS`: see `save_shards`.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars, pointers = {}, set()
    for name, value in named_state(model, optimizer):
        if isinstance(value, torch.Tensor):
            is_shared = value.data_ptr() in pointers  # bitsandbytes shares its quantisation maps between parameters
            tensors[name] = value.clone() if is_shared else value
            pointers.add(value.data_ptr())
        else:
            scalars[name] = value
    saved: dict[str, Any] = {"progress": dataclasses.asdict(progress), "optimizer": scalars}
    if is_sharded(model):
        saved["shares"] = True  # the key of all versions
    else:
        write_tensors(directory / "training_state.safetensors", tensors)
    write_json(directory / "training_state.json", saved)


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore the state that `save_state` wrote, bit-identical.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    try:
        saved = read_json(directory / "training_state.json")
        progress, scalars = Progress(**saved["progress"]), dict(saved["optimizer"])
        in_shards = bool(saved.get("shares"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{directory / 'training_state.json'} is damaged; resume from another step-*.") from None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if in_shards or is_sharded(model):
        tensors = load_shards(directory / SHARDS if in_shards else directory, trainable)
    else:
        tensors = read_tensors([directory / "training_state.safetensors"])
    restored: dict[str, dict[str, Any]] = {name: {} for name in trainable}
    names = set()
    for entry, value in [*tensors, *scalars.items()]:
        key, _, name = entry.partition("/")
        if name not in trainable or (key == "parameter" and value.shape != trainable[name].shape):
            raise UserError(f"{directory} belongs to another model: {name} does not fit.")
        if key == "parameter":
            names.add(name)
            trainable[name].data.copy_(value)
        else:
            restored[name][key] = value
    if missing := sorted(trainable.keys() - names):
        raise UserError(f"{directory} belongs to another model: it lacks {', '.join(missing[:5])}.")
    offloaded = getattr(optimizer, "offload", False)  # what stays on the CPU may be more than a GPU holds
    for name, parameter in trainable.items():
        if restored[name]:
            device = torch.device("cpu") if offloaded else parameter.device
            optimizer.state[parameter] = {
                k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in restored[name].items()
            }
            if getattr(optimizer, "is_paged", False):
                from litmini.training.low_memory import page

                page(optimizer, parameter)
    return progress


SHARDS = "training_state"  # directory in a checkpoint, with one safetensors file per process


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield (`parameter/NAME`, tensor) for each trainable parameter, and (`KEY/NAME`, value) for its optimizer state."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"parameter/{name}", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value


def save_shards(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Begin to write each process's shards of `named_state` into `directory`, as safetensors. All processes call this.

    The state is copied to CPU memory first, so training continues while it is written.

    Returns:
        A function that waits until all processes have written, and raises their errors.
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
    """Return a second process group of the processes of `world`, for checkpoints that are written during training."""
    return dist.new_group(backend="gloo")


def load_shards(directory: Path, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield this process's shard of each tensor named `kind/parameter` in the safetensors files of `directory`.

    The number of processes that wrote them may differ. All processes call this.

    Args:
        like: name -> parameter; a tensor of the parameter's shape is sharded as the parameter is.

    Raises:
        UserError: a file is damaged.
    """
    import torch.distributed.checkpoint as checkpoint

    try:
        reader = checkpoint.HuggingFaceStorageReader(str(directory))
        tensors = {}
        metadata: Any = reader.read_metadata().state_dict_metadata
        for name, entry in metadata.items():
            parameter = like.get(name.partition("/")[2])
            if parameter is not None and entry.size == parameter.shape:
                tensors[name] = torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
            elif "/" in name:
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            checkpoint.load(tensors, storage_reader=reader)
    except (SafetensorError, OSError, ValueError, KeyError, checkpoint.CheckpointException) as error:
        raise UserError(f"{directory} is damaged ({error}); resume from another step-*.") from None
    yield from tensors.items()
