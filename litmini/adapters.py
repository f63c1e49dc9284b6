"""Adapters as layer swaps: `LoRALinear(base)` takes the place of a linear in any model, by leaf name.

On disk an adapter is PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.checkpoint import read_tensors, write_tensors
from litmini.config import LoraConfig, UserError
from litmini.files import read_json, write_json

PREFIX = "base_model.model."  # of every name in PEFT's files


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) * B A dropout(x), with the base frozen (LoRA, arXiv 2106.09685).

    A (rank, in) and B (out, rank) are kept in fp32 and multiplied in x's dtype. B starts at zero: so does the change.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype)).flatten(0, -2)  # (tokens, rank)
        up = (self.lora_B * self.scale).to(x.dtype).T  # (rank, out)
        return torch.addmm(y.flatten(0, -2), low, up).view_as(y)  # the sum costs no pass of its own

    def delta(self) -> Tensor:
        """The change of the base weight, (out, in) in fp32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def merge(self) -> nn.Linear:
        """A plain linear that does the same: the change is added in fp32 and rounded once to the base's dtype."""
        base = self.base
        merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        merged.weight = nn.Parameter((base.weight.float() + self.delta()).to(base.weight.dtype), requires_grad=False)
        merged.bias = base.bias
        return merged


def leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every plain linear by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def add_adapters(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze `model` and put a `LoRALinear` over each linear that `config.targets` names; returns their names.

    Raises:
        UserError: a target matches nothing (the message lists the leaf names there), or the rank is impossible.
    """
    there = linears(model)
    inner = {name for name in there if "." in name}  # a linear that hangs on the model itself is its head
    targets = set(config.targets)
    leaves = sorted({leaf(name) for name in there})
    if unmatched := targets - {"all-linear"} - set(leaves):
        raise UserError(
            f"lora.targets {', '.join(sorted(unmatched))} match no linear of this model; there are: {', '.join(leaves)}, "
            f"and all-linear for every one but the head."
        )
    names = [n for n in there if leaf(n) in targets or ("all-linear" in targets and n in inner)]
    if not names:
        raise UserError(f"lora.targets is empty; there are: {', '.join(leaves)}, or all-linear.")
    smallest = min(min(there[n].in_features, there[n].out_features) for n in names)
    if config.rank > smallest:
        raise UserError(f"lora.rank {config.rank} is outside 1..{smallest}, the smallest size of the targeted linears.")
    model.requires_grad_(False)
    for name in names:
        replace_module(model, name, LoRALinear(there[name], config.rank, config.alpha, config.dropout))
    return names


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace every adapter in `model` by its merged linear. A merged head is no longer tied to the embedding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            replace_module(model, name, module.merge())
    return model


def save_adapter(model: nn.Module, directory: Path, config: LoraConfig, base: str) -> None:
    """Write the adapters of `model` in PEFT's format into `directory`, which exists."""
    tensors, targets = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            targets.add(leaf(name))
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
    write_tensors(directory / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    write_json(directory / "adapter_config.json", settings)


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, dict[str, Tensor]]]:
    """An adapter directory as its settings and {linear's name: {"lora_A": ..., "lora_B": ...}}.

    Raises:
        UserError: it is missing, damaged, does nothing, or uses something of PEFT's that is not implemented.
    """
    path = Path(directory)
    if not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is no adapter directory: it has no adapter_config.json. A run's adapter is in out/NAME/final."
        )
    settings = read_json(path / "adapter_config.json")
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "lora_bias": False,
        "alora_invocation_tokens": None,
    }
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{path}/adapter_config.json: init_lora_weights = {settings['init_lora_weights']!r} changes the base itself; "
            f"convert it with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if lacking := [f"{k} = {settings[k]!r}" for k, v in plain.items() if settings.get(k) and settings[k] != v]:
        raise UserError(f"{path}/adapter_config.json uses what litmini does not implement: {', '.join(lacking)}")
    tensors: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in read_tensors([path / "adapter_model.safetensors"]):
        name, dot, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or not dot or kind not in ("lora_A", "lora_B"):
            strange.append(key)
            continue
        tensors.setdefault(name, {})[kind] = tensor.float()
    strange += [f"{name} (lora_A or lora_B is missing)" for name, pair in tensors.items() if len(pair) < 2]
    if strange or not tensors:
        raise UserError(
            f"{path}/adapter_model.safetensors has unexpected tensors: {', '.join(strange[:10]) or 'none at all'}"
        )
    if not any(pair["lora_B"].any() for pair in tensors.values()):
        raise UserError(f"the adapter in {path} does nothing: every lora_B is zero. Was it saved before training?")
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}/adapter_config.json: r or lora_alpha is missing or no number.") from None
    config = LoraConfig(rank, alpha, 0.0, sorted({leaf(n) for n in tensors}))
    return config, tensors


def load_adapter(model: nn.Module, directory: str | Path) -> LoraConfig:
    """Put the adapter of `directory` over the linears of `model`, frozen; returns its settings.

    Raises:
        UserError: it was made for another base; all names and both shapes are listed.
    """
    config, tensors = read_adapter(directory)
    there = linears(model)
    problems = []
    for name, pair in tensors.items():
        if name not in there:
            problems.append(f"{name}: the model has no such linear")
            continue
        expected = {
            "lora_A": (config.rank, there[name].in_features),
            "lora_B": (there[name].out_features, config.rank),
        }
        problems += [
            f"{name}.{kind}: adapter has {tuple(pair[kind].shape)}, the model wants {shape}"
            for kind, shape in expected.items()
            if tuple(pair[kind].shape) != shape
        ]
    if problems:
        more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise UserError(
            f"the adapter in {directory} was made for another base:\n  " + "\n  ".join(problems[:10] + more)
        )
    model.requires_grad_(False)
    for name, pair in tensors.items():
        adapted = LoRALinear(there[name], config.rank, config.alpha).to(there[name].weight.device)
        for kind, tensor in pair.items():
            getattr(adapted, kind).data.copy_(tensor)
        replace_module(model, name, adapted.requires_grad_(False).train(model.training))
    return config
