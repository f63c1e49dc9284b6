"""Adapters from disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`; `peft_save.py` writes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litmini.adapters import experts, leaf, linears, pattern_value, replace_module
from litmini.bases import shape
from litmini.config import UserError
from litmini.files import read_json
from litmini.finetune_config import QuantizeConfig
from litmini.lora import DoRALinear, FullLayer, LoRALinear
from litmini.rescaling import IA3Linear, check_ia3
from litmini.tensors import read_tensors

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
            layer: nn.Module = FullLayer(base)
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
