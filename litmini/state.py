"""What a run goes on from: progress, trainable parameters and optimizer state, by parameter name, written and read."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litmini.config import UserError
from litmini.files import read_json, write_json
from litmini.sharding import SHARES, is_sharded, load_shares, named_state
from litmini.tensors import read_tensors, write_tensors
from litmini.train import Progress


def save_state(directory: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trainable parameters and optimizer state, by parameter name; nothing else of a run has state.

    Of a sharded model, the tensors are in `SHARES`: see `litmini.sharding.save_shares`.
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
        tensors = load_shares(directory / SHARES if shares else directory, trainable)
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
