"""IA3: a frozen linear's outputs, or inputs, each times a factor that is trained; some hundredths of LoRA's parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from litmini.config.finetune import Ia3Config
from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer, dense, linears, module_name


class IA3Linear(AdapterLayer):
    """y = l * base(x), or base(l * x) for a feed-forward layer's second linear (IA3, arXiv 2205.05638, section 3.3).

    `ia3_l`, in fp32, is (out,), or (in,) for `feedforward`; it starts at 1, so the output starts as the base's, exactly.
    """

    peft_keys = ("ia3_l",)

    def __init__(self, base: Any, feedforward: bool) -> None:
        super().__init__()
        self.base, self.feedforward = base, feedforward
        size = base.in_features if feedforward else base.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self._scaled(x)) if self.feedforward else self._scaled(self.base(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x * self.ia3_l).to(x.dtype)  # in fp32, rounded once

    def merged_weight(self) -> Tensor:
        """Return the scaled weight, (out, in) in fp32."""
        return dense(self.base) * (self.ia3_l if self.feedforward else self.ia3_l[:, None])

    # PEFT's format

    def peft_tensors(self) -> dict[str, Tensor]:
        """{"ia3_l": (out, 1)}, or (1, in) for `feedforward`."""
        return {"ia3_l": full_tensor(self.ia3_l).unsqueeze(0 if self.feedforward else 1)}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        self.ia3_l.data.copy_(tensors["ia3_l"].flatten())

    @classmethod
    def from_peft(cls, base: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterLayer:
        return cls(base, feedforward=_scales_inputs(tensors))

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            "peft_type": "IA3",
            "target_modules": sorted({module_name(name) for name in layers}),
            "feedforward_modules": sorted({module_name(name) for name, layer in layers.items() if layer.feedforward}),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "IA3"

    @classmethod
    def ineffective(cls, layers: list[dict[str, Tensor]]) -> str:
        return "every ia3_l is one" if all(bool((tensors["ia3_l"] == 1).all()) for tensors in layers) else ""

    @classmethod
    def merged_bias(cls, bias: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return bias if _scales_inputs(tensors) else bias * tensors["ia3_l"].flatten()


def _scales_inputs(tensors: dict[str, Tensor]) -> bool:
    """Whether PEFT's tensors of a layer are those of a `feedforward` one."""
    return len(tensors["ia3_l"]) == 1


def add_ia3(model: nn.Module, config: Ia3Config) -> list[str]:
    """Freeze `model` and put an `IA3Linear` over each linear that `config` names; return their full names.

    Raises:
        UserError: a name matches no linear; lists the module names that exist.
    """
    existing = linears(model)
    wanted, names = {*config.targets, *config.feedforward}, {module_name(name) for name in existing}
    if (missing := wanted - names) or not wanted:
        raise UserError(
            f"ia3.targets, ia3.feedforward: {', '.join(sorted(missing)) or 'empty'}; linears there: "
            f"{', '.join(sorted(names))}."
        )
    targets = [name for name in existing if module_name(name) in wanted]
    model.requires_grad_(False)
    for name in targets:
        model.set_submodule(name, IA3Linear(existing[name], module_name(name) in config.feedforward))
    return targets
