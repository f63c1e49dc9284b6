"""What a run goes on from: progress, trainable parameters and optimizer state, by parameter name, written and read."""

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
    """Trainable parameters and optimizer state, by parameter name; nothing else of a run has state.

    Of a sharded model, the tensors are in `SHARDS`: see `litmini.runs.training_state.save_shards`.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars, pointers = {}, set()
    for name, value in named_state(model, optimizer):
        if isinstance(value, torch.Tensor):
            seen = value.data_ptr() in pointers  # bitsandbytes shares its quantisation maps: one copy each
            tensors[name] = value.clone() if seen else value
            pointers.add(value.data_ptr())
        else:
            scalars[name] = value
    saved: dict[str, Any] = {"progress": dataclasses.asdict(progress), "optimizer": scalars}
    if is_sharded(model):
        saved["shares"] = True
    else:
        write_tensors(directory / "training_state.safetensors", tensors)
    write_json(directory / "training_state.json", saved)


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore what `save_state` wrote, bit by bit.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    try:
        saved = read_json(directory / "training_state.json")
        progress, numbers = Progress(**saved["progress"]), dict(saved["optimizer"])
        shares = bool(saved.get("shares"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{directory / 'training_state.json'} is damaged; resume from another step-*.") from None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if shares or is_sharded(model):
        tensors = load_shards(directory / SHARDS if shares else directory, trainable)
    else:
        tensors = read_tensors([directory / "training_state.safetensors"])
    restored: dict[str, dict[str, Any]] = {name: {} for name in trainable}
    found = set()
    for entry, value in [*tensors, *numbers.items()]:
        key, _, name = entry.partition("/")
        if name not in trainable or (key == "parameter" and value.shape != trainable[name].shape):
            raise UserError(f"{directory} is of another model: {name} does not fit.")
        if key == "parameter":
            found.add(name)
            trainable[name].data.copy_(value)
        else:
            restored[name][key] = value
    if missing := sorted(trainable.keys() - found):
        raise UserError(f"{directory} is of another model: it lacks {', '.join(missing[:5])}.")
    for name, parameter in trainable.items():
        if restored[name]:
            optimizer.state[parameter] = {
                k: v.to(parameter.device) if isinstance(v, torch.Tensor) else v for k, v in restored[name].items()
            }
    return progress


SHARDS = "training_state"  # directory in a checkpoint: a safetensors file of each process


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """(`parameter/NAME`, tensor) of every trainable parameter, and what the optimizer keeps for it, as (`KEY/NAME`, value)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"parameter/{name}", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value


def save_shards(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
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


def load_shards(directory: Path, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
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
