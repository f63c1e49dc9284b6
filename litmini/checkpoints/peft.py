"""Adapters from disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`; `peft_save.py` writes them."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.safetensors_io import read_tensors, write_tensors
from litmini.config.finetune import QuantizeConfig
from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.files import read_json, write_json
from litmini.methods.adapters import adapters, experts, leaf, linears, pattern_value, replace_module
from litmini.methods.base_layer import ModulesToSaveLayer, shape
from litmini.methods.dora import DoRALinear
from litmini.methods.ia3 import IA3Linear
from litmini.methods.lora import LoRALinear

PREFIX = "base_model.model."  # of every name in PEFT's files
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector", "ia3_l")
STACKS = ("gate_up_proj", "down_proj")  # of experts, in the order in which PEFT wraps them
BASE_FILE = "base_quantization.json"  # ours: in what form the base was when the adapter was trained


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read: tensors and how they are scaled; not yet over any base."""

    directory: Path
    layers: dict[str, dict[str, Tensor]]
    """Linear's full name -> {"lora_A": (rank, in), "lora_B": (out, rank), "lora_magnitude_vector": (out,)}, fp32.

    Over stacked experts, as PEFT has them: (n_experts * rank, in) and (out, rank * n_experts).
    Of IA3: {"ia3_l": (out, 1), or (1, in) where the input is scaled}.
    """
    full: dict[str, dict[str, Tensor]]
    """Name of a module that was trained in full -> its parameters."""
    settings: dict[str, Any]
    """adapter_config.json."""
    quantize: QuantizeConfig
    """Of the base that it was trained on."""
    dtype: torch.dtype
    """That the base was quantised from."""

    def over(self, name: str, base: Any) -> nn.Module:
        """The adapter, frozen, of the layer `name`, over that layer of a model."""
        s, tensors = self.settings, {k: t.to(base.weight.device) for k, t in self._of(name).items()}
        if name in self.full:
            layer: nn.Module = ModulesToSaveLayer(base)
            for kind, tensor in tensors.items():
                layer.full.get_parameter(kind).data.copy_(tensor)  # type: ignore[union-attr]
            return layer.requires_grad_(False)
        if "ia3_l" in tensors:
            layer = IA3Linear(base, feedforward=len(tensors["ia3_l"]) == 1)
            layer.ia3_l.data.copy_(tensors["ia3_l"].flatten())  # type: ignore[union-attr]
            return layer.requires_grad_(False)
        if len(stack := shape(base)) == 3:
            tensors["lora_A"] = tensors["lora_A"].view(stack[0], -1, stack[2])
            tensors["lora_B"] = tensors["lora_B"].view(stack[1], -1, stack[0]).permute(2, 0, 1)
        rank = tensors["lora_A"].shape[-2]
        alpha = pattern_value(s.get("alpha_pattern") or {}, name, s["lora_alpha"])
        make = DoRALinear if "lora_magnitude_vector" in tensors else LoRALinear
        layer = make(base, rank, float(alpha), rank_stabilized=bool(s.get("use_rslora")))
        for kind, tensor in tensors.items():
            getattr(layer, kind).data.copy_(tensor)
        return layer.requires_grad_(False)

    def merged_bias(self, name: str, bias: Tensor) -> Tensor:
        """The bias (out,) of the layer `name` after the merge: IA3 scales it, where it scales outputs."""
        factors = self.layers.get(name, {}).get("ia3_l")
        return bias if factors is None or len(factors) == 1 else bias * factors.flatten()

    def _of(self, name: str) -> dict[str, Tensor]:
        return self.layers[name] if name in self.layers else self.full[name]

    def shapes(self, name: str, base: Any) -> dict[str, tuple[int, ...]]:
        """The shape that each of its tensors for the layer `name` must have over `base`."""
        if name in self.full:
            return {kind: tuple(p.shape) for kind, p in base.named_parameters()}
        s = self.settings
        if "ia3_l" in self.layers[name]:
            before = len(self.layers[name]["ia3_l"]) == 1
            return {"ia3_l": (1, shape(base)[1]) if before else (shape(base)[0], 1)}
        rank = pattern_value(s.get("rank_pattern") or {}, name, s["r"])
        *stack, rows, columns = shape(base)
        rank *= stack[0] if stack else 1
        expected = {"lora_A": (rank, columns), "lora_B": (rows, rank), "lora_magnitude_vector": (rows,)}
        return {kind: expected[kind] for kind in self.layers[name]}


def read_adapter(directory: str | Path) -> Adapter:
    """An adapter directory.

    Raises:
        UserError: it is missing, damaged, does nothing, or uses something of PEFT's that is not implemented.
    """
    path = Path(directory)
    if not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is no adapter directory: it has no adapter_config.json. A run's adapter is in out/NAME/final."
        )
    settings = read_json(path / "adapter_config.json")
    ia3 = settings.get("peft_type") == "IA3"
    if not ia3:
        _refuse(path, settings)
    saved_in_full = tuple(settings.get("modules_to_save") or ())  # PEFT means every module whose name ends so
    layers: dict[str, dict[str, Tensor]] = {}
    full: dict[str, dict[str, Tensor]] = {}
    stacked = [kind for kind in STACKS if kind in {leaf(name) for name in settings.get("target_parameters") or ()}]
    strange = []
    for key, tensor in read_tensors([path / "adapter_model.safetensors"]):
        name, dot, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        owner, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if key.endswith(".base_layer.weight"):
            continue  # PEFT adds the frozen base of an adapted head
        if key.startswith(PREFIX) and dot and kind in KINDS:
            above = name.removesuffix(".base_layer")
            if stacked and (above != name or leaf(above) == "experts"):
                name = f"{above}.{stacked[0] if above != name else stacked[-1]}"
            layers.setdefault(name, {})[kind] = tensor.float()
        elif key.startswith(PREFIX) and owner.endswith(saved_in_full):
            full.setdefault(owner, {})[parameter] = tensor.float()
        else:
            strange.append(key)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.get("use_dora") else set())
    wanted = {"ia3_l"} if ia3 else wanted
    strange += [
        f"{name} ({' or '.join(sorted(wanted))} is missing)"
        for name, pair in layers.items()
        if not wanted >= pair.keys() >= wanted
    ]
    if strange or not layers:
        raise UserError(
            f"{path}/adapter_model.safetensors has unexpected tensors: {', '.join(strange[:10]) or 'none at all'}"
        )
    if ia3:
        check_ia3(path, layers)
    elif not any(pair["lora_B"].any() for pair in layers.values()):
        raise UserError(f"the adapter in {path} does nothing: every lora_B is zero. Was it saved before training?")
    quantize, dtype = QuantizeConfig(), torch.bfloat16
    if (path / BASE_FILE).is_file():
        note = read_json(path / BASE_FILE)
        try:
            quantize, dtype = QuantizeConfig(note["bits"], note["double"]), getattr(torch, note["dtype"])
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{path / BASE_FILE} is damaged: expected bits, double and dtype, found {note}.") from None
    return Adapter(path, layers, full, settings, quantize, dtype)


def _refuse(path: Path, settings: dict[str, Any]) -> None:
    """What PEFT can and litmini cannot, and settings that are no numbers."""
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "trainable_token_indices": None,
        "lora_bias": False,
        "alora_invocation_tokens": None,
        "layer_replication": None,
        "use_qalora": False,
    }
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(
            f"{path}/adapter_config.json: init_lora_weights = {settings['init_lora_weights']!r} changes the base itself; "
            f"convert it with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if lacking := [f"{k} = {settings[k]!r}" for k, v in plain.items() if settings.get(k) and settings[k] != v]:
        raise UserError(f"{path}/adapter_config.json uses what litmini does not implement: {', '.join(lacking)}")
    numbers = [settings.get("r"), settings.get("lora_alpha")]
    for pattern in ("rank_pattern", "alpha_pattern"):
        numbers += list((settings.get(pattern) or {}).values())
    if not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise UserError(f"{path}/adapter_config.json: r or lora_alpha is missing or no number above 0.")


def load_adapter(model: nn.Module, directory: str | Path) -> Adapter:
    """Put the adapter of `directory` over the layers of `model`, frozen.

    Raises:
        UserError: it was made for another base; all names and both shapes are listed.
    """
    adapter = read_adapter(directory)
    there = check_adapter(model, adapter)
    model.requires_grad_(False)
    for name, base in there.items():
        replace_module(model, name, adapter.over(name, base).train(model.training))
    return adapter


def _above(name: str) -> tuple[str, str]:
    """The block that holds a stack of experts, and the stack's own name: `model.layers.0`, `experts.down_proj`."""
    parts = name.split(".")
    return ".".join(parts[:-3]), ".".join(parts[-2:])


def check_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The layers of `model` that `adapter` covers, by name.

    Raises:
        UserError: it was made for another base; all names and both shapes are listed.
    """
    stacks = experts(model)
    there = linears(model) | stacks
    for name in [n for n in adapter.layers if n not in there]:  # transformers 5 gave the module above another name
        if same := [n for n in stacks if _above(n) == _above(name)]:
            adapter.layers[same[0]] = adapter.layers.pop(name)
    modules = dict(model.named_modules())
    covered: dict[str, Any] = {}
    problems = []
    for name in [*adapter.layers, *adapter.full]:
        base = there.get(name) if name in adapter.layers else modules.get(name)
        if base is None:
            problems.append(f"{name}: the model has no such linear")
            continue
        covered[name] = base
        expected, tensors = adapter.shapes(name, base), adapter._of(name)
        problems += [
            f"{name}.{kind}: adapter has {tuple(tensors[kind].shape)}, the model wants {expected.get(kind)}"
            for kind in tensors
            if tuple(tensors[kind].shape) != expected.get(kind)
        ]
    if problems:
        more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise UserError(
            f"the adapter in {adapter.directory} was made for another base:\n  " + "\n  ".join(problems[:10] + more)
        )
    return covered


def ia3_settings(layers: dict[str, IA3Linear], base: str) -> dict[str, Any]:
    """`adapter_config.json` of these layers, by full name, over the checkpoint `base`."""
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted({leaf(name) for name in layers}),
        "feedforward_modules": sorted({leaf(name) for name, layer in layers.items() if layer.feedforward}),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def check_ia3(path: Path, layers: dict[str, dict[str, Tensor]]) -> None:
    """Refuse an IA3 adapter that does nothing.

    Raises:
        UserError: it does.
    """
    if all(bool((tensors["ia3_l"] == 1).all()) for tensors in layers.values()):
        raise UserError(f"the adapter in {path} does nothing: every ia3_l is one. Was it saved before training?")


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
        if isinstance(module, ModulesToSaveLayer):
            full.add(name)
            tensors |= {f"{PREFIX}{name}.{kind}": full_tensor(p) for kind, p in module.full.named_parameters()}
            continue
        if isinstance(module, IA3Linear):
            scaled[name] = module
            tensors[f"{PREFIX}{name}.ia3_l"] = full_tensor(module.ia3_l).unsqueeze(0 if module.feedforward else 1)
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
