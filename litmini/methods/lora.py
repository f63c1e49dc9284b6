"""LoRA: a frozen linear, and the product of two small trained matrices beside it."""

import math
import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer, dense, is_plain_linear, matmul, module_name, shape
from litmini.methods.lora_matmul import LoRAMatmul, cast_factors, is_autocast
from litmini.ops.norms import gate_factors
from litmini.system import time_limit

NEUTRAL: dict[str, Any] = {  # PEFT's settings that are implemented for this value only, and unset
    "bias": "none",
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
}
LEAVES_BASE = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that do not change the base


class LoRALinear(AdapterLayer):
    """y = base(x) + (alpha / rank) * B A dropout(x), with the base frozen (LoRA, arXiv 2106.09685).

    A (rank, in) and B (out, rank) are kept in fp32 and multiplied in x's dtype; over grouped experts there is one pair for
    each. B starts at zero: so does the delta. rank_stabilized: alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    additive = True
    peft_keys: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base: Any, rank: int, alpha: float, dropout: float = 0.0, rank_stabilized: bool = False) -> None:
        super().__init__()
        self.base, self.alpha, self.rank_stabilized = base, alpha, rank_stabilized
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = nn.Dropout(dropout)
        experts, device = shape(base)[:-2], base.weight.device  # (n_experts,) or ()
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, base.out_features, rank, dtype=torch.float32, device=device))
        self.casts: dict[torch.dtype, tuple[Tensor, Tensor]] | None = None  # see `keep_casts`
        for matrix in self.lora_A.data.view(-1, rank, base.in_features):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """(..., in) -> (..., out). `offsets`: over grouped experts, where the tokens of each end in x (n, in)."""
        if offsets or not is_plain_linear(self.base):
            return self.base(x, *offsets) + self.output_delta(x, *offsets)
        if is_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base, flat = self.base, x.flatten(0, -2)
        dropped = self.dropout(flat) if self.training and self.dropout.p > 0 else None
        factors = self.lora_A, self.lora_B, self.scale, self._kept_casts(x.dtype), self.magnitude_scale()
        y = LoRAMatmul.apply(flat, dropped, base, base.weight, base.bias, *factors, gate_factors(x))
        return y.unflatten(0, x.shape[:-1])

    def _kept_casts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return the factors in the dtype of their matmuls, where they are kept until the next optimizer step."""
        if self.casts is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if dtype not in self.casts:
            self.casts[dtype] = cast_factors(self.lora_A.detach(), self.lora_B.detach(), self.scale, dtype)
        return self.casts[dtype]

    def magnitude_scale(self) -> Tensor | None:
        """Return what each output is multiplied with, (out,) in fp32: nothing, but in DoRA."""
        return None

    def output_delta(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """Return what is added to base(x, *offsets)."""
        a, b = cast_factors(self.lora_A, self.lora_B, self.scale, x.dtype)
        if offsets:  # grouped matmuls want rows of whole 16 bytes
            padding = -a.shape[1] % 8
            a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
        return matmul(matmul(self.dropout(x), a, *offsets), b, *offsets)

    def delta(self) -> Tensor:
        """Return the delta of the base's weight, (..., out, in) in fp32."""
        return (self.lora_B * self.scale) @ self.lora_A

    def merged_weight(self) -> Tensor:
        """Return the sum of the base's weight and the delta, (..., out, in) in fp32."""
        return self.delta().add_(dense(self.base))  # in place: no more memory than a conversion may take

    # PEFT's format

    def peft_tensors(self) -> dict[str, Tensor]:
        """{"lora_A.weight": (rank, in), "lora_B.weight": (out, rank)}; of experts (n * rank, in) and (out, rank * n)."""
        a, b = full_tensor(self.lora_A), full_tensor(self.lora_B)
        if a.dim() == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        return {"lora_A.weight": a, "lora_B.weight": b}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if self.lora_A.dim() == 3:
            n_experts, rank, _ = self.lora_A.shape
            a, b = a.view(self.lora_A.shape), b.view(-1, rank, n_experts).permute(2, 0, 1)
        self.lora_A.data.copy_(a)
        self.lora_B.data.copy_(b)

    def peft_rank_and_alpha(self) -> tuple[int, float]:
        """Return `r` and `lora_alpha` of `peft_tensors()`."""
        return self.lora_A.shape[-2], self.alpha

    @classmethod
    def from_peft(cls, base: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterLayer:
        as_parameter = f"{name}.weight".endswith(tuple(f".{one}" for one in config.get("target_parameters") or ()))
        key = f"{name}.weight" if as_parameter else name  # which PEFT's patterns mean
        rank = pattern_value(config.get("rank_pattern") or {}, key, config["r"])
        alpha = pattern_value(config.get("alpha_pattern") or {}, key, config["lora_alpha"])
        return cls(base, rank, float(alpha), rank_stabilized=bool(config.get("use_rslora")))

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        parameters: dict[str, str] = {}  # of layers that PEFT names by their parameter
        if "expert_linears" in vars(model) or any(layer.lora_A.dim() == 3 for layer in layers.values()):
            from litmini.methods.experts_in_peft import parameters_in_peft

            parameters = parameters_in_peft(layers, vars(model).get("expert_linears", ()))
        names = [parameters.get(name, name) for name in layers]
        ranks, alphas = zip(*(layer.peft_rank_and_alpha() for layer in layers.values()), strict=True)
        rank, rank_pattern = _pattern(dict(zip(names, ranks, strict=True)))
        alpha, alpha_pattern = _pattern(dict(zip(names, alphas, strict=True)))
        first = next(iter(layers.values()))
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_dropout": 0.0 if parameters else first.dropout.p,  # which PEFT refuses over parameters
            "target_modules": sorted({module_name(name) for name in layers.keys() - parameters.keys()}),
            "target_parameters": sorted({".".join(name.split(".")[-2:]) for name in parameters.values()}) or None,
            "use_dora": False,
            "use_rslora": first.rank_stabilized,
        }

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type", "LORA") == "LORA" and not config.get("use_dora")

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> list[str]:
        problems = [
            f"{key} = {config[key]!r} is not implemented"
            for key, value in NEUTRAL.items()
            if config.get(key) and config[key] != value
        ]
        if (start := config.get("init_lora_weights", True)) not in LEAVES_BASE:
            problems.append(
                f"init_lora_weights = {start!r} changes the base itself; convert it with PEFT first "
                f"(save_pretrained with path_initial_model_for_weight_conversion)"
            )
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
        if not all(type(n) is int and n > 0 for n in ranks) or not all(
            type(n) in (int, float) and 0 < n < math.inf for n in alphas
        ):
            problems.append("r or lora_alpha is missing or no number above 0")
        return problems

    @classmethod
    def ineffective(cls, layers: list[dict[str, Tensor]]) -> str:
        return "" if any(tensors["lora_B.weight"].any() for tensors in layers) else "every lora_B is zero"

    @classmethod
    def names_in_peft(cls, layers: dict[str, Any]) -> dict[str, str]:
        if not any(layer.lora_A.dim() == 3 for layer in layers.values()):
            return {}
        from litmini.methods.experts_in_peft import names_in_peft

        return names_in_peft(layers)

    @classmethod
    def names_in_model(cls, names: list[str], config: dict[str, Any], model: nn.Module) -> dict[str, str]:
        if not config.get("target_parameters"):
            return {}
        from litmini.methods.experts_in_peft import names_in_model

        return names_in_model(names, config, model)


def matches(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` means the module `name`: the end of it, from a dot on, as a regular expression.

    Raises:
        UserError: it is none, or matching it does not end.
    """
    try:
        with time_limit(1, f"the pattern {pattern!r} takes more than a second on {name}; expected a simpler one."):
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}.") from None


def pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and a pattern of the others: by module name where all of that name agree."""
    usual = Counter(values.values()).most_common(1)[0][0]
    by_module_name: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_module_name.setdefault(module_name(name), set()).add(value)
    others = {name: value for name, value in values.items() if value != usual}
    return usual, {module_name(n) if len(by_module_name[module_name(n)]) == 1 else n: v for n, v in others.items()}
