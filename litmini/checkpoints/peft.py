"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

What stands in these files of a method, its layers write and read (`methods/base_layer.py`); here is what all have in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.safetensors_io import read_tensors, write_tensors
from litmini.config.finetune import QuantizeConfig
from litmini.errors import UserError
from litmini.files import read_json, write_json
from litmini.methods.adapters import adapters
from litmini.methods.base_layer import PREFIX, AdapterLayer, QuantizedLayer, grouped_experts, linears
from litmini.models.hf_config import read_value
from litmini.ops.cross_entropy import OutputHead, original_head

if TYPE_CHECKING:
    from litmini.checkpoints.adapter import Adapter

BASE_FILE = "base_quantization.json"  # ours: in what form the base was when the adapter was trained
MOST_SHOWN = 10  # problems in one message


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter directory.

    Raises:
        UserError: it is missing, damaged, does nothing, or uses something of PEFT's that is not implemented.
    """
    from litmini.checkpoints.adapter import Adapter
    from litmini.checkpoints.peft_config import check_types  # a run that writes adapters needs neither this ...
    from litmini.methods.registry import method_of  # ... nor other methods

    path = Path(directory)
    config_file, tensor_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not config_file.is_file():
        raise UserError(
            f"{path} is no adapter directory: it has no adapter_config.json. A run's adapter is in out/NAME/final."
        )
    config = read_json(config_file)
    try:
        check_types(config)
        method = method_of(config)
    except (UserError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from None
    if problems := method.unsupported(config):
        raise UserError(f"{config_file}: {'; '.join(problems)}.")
    layers, full, others, unexpected = _by_module(
        read_tensors([tensor_file]), method.peft_keys, tuple(config.get("modules_to_save") or ())
    )
    tokens: dict[str, dict[str, Tensor]] = {}
    vocabulary: dict[str, Tensor] = {}
    if others:
        from litmini.checkpoints.peft_tokens import read_tokens

        tokens, vocabulary = read_tokens(others, full, config)
    unexpected += [
        f"{name} ({' or '.join(key.removesuffix('.weight') for key in method.peft_keys)} is missing)"
        for name, tensors in layers.items()
        if tensors.keys() != set(method.peft_keys)
    ] + list(others)
    if unexpected or not layers:
        raise UserError(f"{tensor_file} has unexpected tensors: {', '.join(unexpected[:MOST_SHOWN]) or 'none at all'}")
    in_modules = {
        f"{name}.{key}": t for tensors in (layers, full, tokens) for name in tensors for key, t in tensors[name].items()
    }
    if nonfinite := [name for name, tensor in in_modules.items() if not tensor.isfinite().all()]:
        raise UserError(f"{tensor_file} has NaN or infinite values: {', '.join(nonfinite[:MOST_SHOWN])}")
    if not tokens and (reason := method.ineffective(list(layers.values()))):
        raise UserError(f"the adapter in {path} does nothing: {reason}. Was it saved before training?")
    return Adapter(path, config, method, layers, full, *_read_base(path / BASE_FILE), tokens, vocabulary)


def _by_module(
    tensors: Iterable[tuple[str, Tensor]], peft_keys: tuple[str, ...], modules_to_save: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Return the tensors of a file in fp32: of adapter layers, of modules in full, others by key; and keys of no floats."""
    layers: dict[str, dict[str, Tensor]] = {}
    full: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    unexpected = []
    kinds = {key.removesuffix(".weight"): key for key in peft_keys}
    for key, tensor in tensors:
        if key.count(".") == PREFIX.count(".") + 2 and key.endswith(".base_layer.weight"):
            continue  # PEFT adds the frozen base of an adapted head
        name, dot, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        owner, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if not tensor.is_floating_point():
            unexpected.append(f"{key} of {str(tensor.dtype).removeprefix('torch.')}")
        elif key.startswith(PREFIX) and dot and kind in kinds:
            layers.setdefault(name, {})[kinds[kind]] = tensor.float()
        elif key.startswith(PREFIX) and owner.endswith(modules_to_save):  # PEFT means every module whose name ends so
            full.setdefault(owner, {})[parameter] = tensor.float()
        else:
            others[key] = tensor.float()
    return layers, full, others, unexpected


def _read_base(file: Path) -> tuple[QuantizeConfig, torch.dtype]:
    """Return how the base was quantised, and from which dtype."""
    if not file.is_file():
        return QuantizeConfig(), torch.bfloat16
    note = read_json(file)
    try:
        if isinstance(dtype := getattr(torch, note["dtype"]), torch.dtype) and dtype.is_floating_point:
            return QuantizeConfig(note["bits"], read_value(note, "double", bool)), dtype
        raise ValueError(note["dtype"])
    except (KeyError, AttributeError, TypeError, ValueError):
        raise UserError(f"{file} is damaged: expected bits, double and dtype, found {note}.") from None


def load_adapter(model: nn.Module, directory: str | Path) -> Adapter:
    """Put the adapter of `directory` over the layers of `model`, frozen.

    Raises:
        UserError: it was made for another base; all names and both shapes are listed.
    """
    adapter = read_adapter(directory)
    grow_for(model, adapter)
    layers = check_adapter(model, adapter)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, adapter.load(name, layer).train(model.training))
    return adapter


def grow_for(model: nn.Module, adapter: Adapter) -> None:
    """Give `model` the rows of tokens that the adapter's base had in training."""
    name_as_in(model, adapter)
    from litmini.checkpoints.peft_tokens import grow_for, has_vocabulary

    if has_vocabulary(model, adapter):
        grow_for(model, adapter)


def name_as_in(model: nn.Module, adapter: Adapter) -> None:
    """Give the tensors of `adapter` the names that modules have in `model`, where it is a part of another one."""
    if whole := vars(model).get("in_whole_model"):
        from litmini.checkpoints.text_part import to_own_names

        to_own_names(adapter, whole)


def check_adapter(model: nn.Module, adapter: Adapter) -> dict[str, AdapterLayer]:
    """Return an adapter layer for each module of `model` that `adapter` covers, by full name. Values are not loaded.

    What has another name in PEFT's file gets the model's in `adapter.layers`.

    Raises:
        UserError: it was made for another base; all names and both shapes are listed.
    """
    from litmini.checkpoints.peft_config import named_modules

    name_as_in(model, adapter)
    for name, own in adapter.method.names_in_model(list(adapter.layers), adapter.config, model).items():
        adapter.layers[own] = adapter.layers.pop(name)
    bases, experts, modules = linears(model), grouped_experts(model), dict(model.named_modules())
    named = named_modules(bases, experts, modules, adapter.config, adapter.whole_name)
    bases |= experts
    layers: dict[str, AdapterLayer] = {}
    problems = []
    for name in [*adapter.layers, *adapter.full]:
        base = bases.get(name) if name in adapter.layers else modules.get(name)
        if base is None:
            problems.append(f"{name}: the model has no such {'linear' if name in adapter.layers else 'module'}")
            continue
        layers[name] = adapter.layer(name, base)
        problems += adapter.problems(name, layers[name])
    in_full = tuple(f"{name}." for name in adapter.full)
    if adapter.config.get("target_modules"):  # without, PEFT has a default for each family
        problems += [
            f"{name}: the adapter has tensors for it, and its settings do not name it"
            for name in layers
            if name not in named and name not in experts
        ]
    problems += [
        f"{name}: the adapter has no tensors for it, and its {setting} names it"
        for name, setting in named.items()
        if name not in layers and not name.startswith(in_full)
    ]
    if adapter.config.get("trainable_token_indices") or adapter.vocabulary:
        from litmini.checkpoints.peft_tokens import check_tokens

        token_layers, token_problems = check_tokens(model, adapter)
        layers, problems = layers | token_layers, problems + token_problems
    if problems:
        more = [f"... and {len(problems) - MOST_SHOWN} more"] * (len(problems) > MOST_SHOWN)
        raise UserError(
            f"the adapter in {adapter.directory} was made for another base:\n  "
            + "\n  ".join(problems[:MOST_SHOWN] + more)
        )
    return layers


def _in_peft(model: nn.Module, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the `adapter_config.json` of the adapters in `model`."""
    by_method: dict[type[AdapterLayer], dict[str, AdapterLayer]] = {}
    for name, layer in adapters(model).items():
        by_method.setdefault(type(layer), {})[name] = layer
    methods = [method for method in by_method if not method.is_beside]
    assert len(methods) == 1, f"one method in a model, found {methods}"
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {
        "task_type": next((m.task_type for m in model.children() if isinstance(m, OutputHead)), "CAUSAL_LM"),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
    }
    for method, layers in by_method.items():
        names = method.names_in_peft(layers)
        for name, layer in layers.items():
            tensors |= {f"{PREFIX}{names.get(name, name)}.{key}": t for key, t in layer.peft_tensors().items()}
        config |= method.peft_config(layers, model)
    if whole := vars(model).get("in_whole_model"):
        from litmini.checkpoints.text_part import to_peft

        return to_peft(tensors, config, by_method, whole)
    return tensors, config


def save_adapter(
    model: nn.Module, directory: Path | None, base: str, *, quantize: QuantizeConfig | None = None
) -> None:
    """Write the adapters of `model` in PEFT's format into `directory`, which exists.

    Ranks that have no `directory` take part with their shards of a sharded model.

    Args:
        base: the checkpoint directory, or hub id, that they belong to.
        quantize: of the base while they were trained.
    """
    with original_head(model):
        tensors, config = _in_peft(model, base)
    if directory is None:
        return
    write_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", config)
    if quantize is not None and quantize.bits == 4:
        packed = next(m for m in model.modules() if isinstance(m, QuantizedLayer))
        dtype = str(packed.dtype).removeprefix("torch.")
        write_json(directory / BASE_FILE, {"type": "nf4", "dtype": dtype, **asdict(quantize)})
