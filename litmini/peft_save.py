"""Adapters out, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from litmini.adapters import adapters, leaf
from litmini.files import write_json
from litmini.finetune_config import QuantizeConfig
from litmini.lora import DoRALinear, FullLayer
from litmini.peft_format import BASE_FILE, KINDS, PREFIX
from litmini.rescaling import IA3Linear, ia3_settings
from litmini.sharding import whole
from litmini.tensors import write_tensors


def save_adapter(
    model: nn.Module, directory: Path | None, base: str, dropout: float = 0.0, quantize: QuantizeConfig | None = None
) -> None:
    """Write the adapters of `model` in PEFT's format into `directory`, which exists.

    Ranks that have no `directory` hand over their shares of a sharded model.

    Args:
        base: the checkpoint directory, or hub id, that they belong to.
        dropout: used in training; noted only.
        quantize: of the base while they were trained.
    """
    tensors: dict[str, Tensor] = {}
    ranks, alphas, full = {}, {}, set()
    scaled: dict[str, IA3Linear] = {}
    stacks: list[str] = []
    one: Any = None
    for name, module in adapters(model).items():
        if isinstance(module, FullLayer):
            full.add(name)
            tensors |= {f"{PREFIX}{name}.{kind}": whole(p) for kind, p in module.full.named_parameters()}
            continue
        if isinstance(module, IA3Linear):
            scaled[name] = module
            tensors[f"{PREFIX}{name}.ia3_l"] = whole(module.ia3_l).unsqueeze(0 if module.feedforward else 1)
            continue
        one, (alphas[name], saved) = module, module.saved()
        ranks[name] = saved["lora_A"].shape[-2]
        if saved["lora_A"].dim() == 3:
            stacks.append(name)
            saved = {"lora_A": saved["lora_A"].flatten(0, 1), "lora_B": saved["lora_B"].permute(1, 2, 0).flatten(1)}
        tensors |= {f"{PREFIX}{name}.{k}{'' if k == KINDS[2] else '.weight'}": t for k, t in saved.items()}
    for name in stacks:  # PEFT wraps the module that holds them, once for each: the last one is outermost
        above = name.rpartition(".")[0]
        depth = sum(other.rpartition(".")[0] == above for other in stacks[stacks.index(name) + 1 :])
        for kind in ("lora_A.weight", "lora_B.weight"):
            tensors[f"{PREFIX}{above}{'.base_layer' * depth}.{kind}"] = tensors.pop(f"{PREFIX}{name}.{kind}")
    if directory is None:
        return
    write_tensors(directory / "adapter_model.safetensors", tensors)
    settings = ia3_settings(scaled, base) if scaled else _lora_settings(ranks, alphas, base)
    if not scaled:
        settings |= {
            "lora_dropout": dropout,
            "target_modules": sorted({leaf(name) for name in ranks.keys() - set(stacks)}),
            "target_parameters": sorted({".".join(name.split(".")[-2:]) for name in stacks}) or None,
            "use_dora": isinstance(one, DoRALinear),
            "use_rslora": one.rank_stabilized,
            "modules_to_save": _endings(full, model),
        }
    write_json(directory / "adapter_config.json", settings)
    if quantize is not None and quantize.bits == 4:
        packed = next(m for m in model.modules() if type(m).__name__ == "NF4Linear")
        dtype = str(packed.dtype).removeprefix("torch.")
        write_json(directory / BASE_FILE, {"type": "nf4", "dtype": dtype, **asdict(quantize)})


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by name: by leaf name where all of that leaf agree."""
    usual = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(leaf(name), set()).add(value)
    others = {name: value for name, value in values.items() if value != usual}
    return usual, {leaf(n) if len(by_leaf[leaf(n)]) == 1 else n: value for n, value in others.items()}


def _lora_settings(ranks: dict[str, int], alphas: dict[str, float], base: str) -> dict[str, Any]:
    """`adapter_config.json` as far as it is the same for every kind of LoRA."""
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _endings(full: set[str], model: nn.Module) -> list[str] | None:
    """Ends of names by which PEFT finds these modules, and no others: leaf names, where they do."""
    others = [name for name, _ in model.named_modules() if name not in full]
    return sorted({name if any(o.endswith(leaf(name)) for o in others) else leaf(name) for name in full}) or None
