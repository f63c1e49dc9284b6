"""An adapter as it was read, not yet over any base."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litmini.config.finetune import QuantizeConfig
from litmini.methods.base_layer import AdapterLayer, ModulesToSaveLayer


@dataclass
class Adapter:
    """An adapter as it was read; not yet over any base."""

    directory: Path
    config: dict[str, Any]
    """adapter_config.json."""
    method: type[AdapterLayer]
    layers: dict[str, dict[str, Tensor]]
    """Full name of a linear -> the tensors of the method's layer over it, fp32, with its `peft_keys`."""
    full: dict[str, dict[str, Tensor]]
    """Full name of a module that was trained in full -> its parameters, fp32."""
    quantize: QuantizeConfig
    """Of the base that it was trained on."""
    dtype: torch.dtype
    """That the base was quantised from."""
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Full name of an embedding or a head -> the rows of single tokens in it, fp32."""
    vocabulary: dict[str, Tensor] = field(default_factory=dict)
    """Full name of an embedding or a head that has grown -> its whole frozen weight, which PEFT adds."""

    in_whole_model: str = ""
    """Of the text part of a multimodal model: how names of modules begin in the whole model; else empty."""

    def layer(self, name: str, base: Any) -> AdapterLayer:
        """Return the adapter layer, frozen, over `base`, the module `name` of a model. Its values are not loaded."""
        kind = ModulesToSaveLayer if name in self.full else self.method
        return kind.from_peft(base, self.whole_name(name), self.config, self._tensors(name)).requires_grad_(False)

    def whole_name(self, name: str) -> str:
        """Return the name of a module in the whole model, which the settings mean."""
        if not self.in_whole_model:
            return name
        from litmini.checkpoints.text_part import in_wrapper

        return in_wrapper(name, self.in_whole_model)

    def load(self, name: str, layer: AdapterLayer) -> AdapterLayer:
        """Give `layer` its values, and return it."""
        layer.load_peft(self._tensors(name))
        return layer

    def problems(self, name: str, layer: AdapterLayer) -> list[str]:
        """Return how the tensors of the module `name` differ from those of `layer`: both shapes, a line each."""
        shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors(name).items()}
        expected = {key: tuple(tensor.shape) for key, tensor in layer.peft_tensors().items()}
        return [
            f"{name}.{key.removesuffix('.weight')}: adapter has {shapes.get(key)}, the model wants {expected.get(key)}"
            for key in shapes | expected
            if shapes.get(key) != expected.get(key)
        ]

    def merged_bias(self, name: str, bias: Tensor) -> Tensor:
        """Return the bias (out,) of the module `name` after the merge."""
        return self.method.merged_bias(bias, self.layers[name]) if name in self.layers else bias

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return next((kind[name] for kind in (self.full, self.layers, self.tokens) if name in kind), {})
