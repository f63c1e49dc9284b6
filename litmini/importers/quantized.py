"""Quantised checkpoints as a source of conversion: FP8, MXFP4 and bitsandbytes' 4 bits, dequantised tensor by tensor."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litmini.checkpoints.safetensors_io import read_empty, read_tensors
from litmini.errors import UserError, counted
from litmini.importers.quantized_formats import FORMATS, STATE_DTYPES, Stored, words


class Dequantized:
    """A quantised checkpoint as if it were none: its tensors with the values that they mean.

    Args:
        config_file: its config.json, and `raw` what it holds.
        dtype: of what is dequantised.

    Raises:
        UserError: the format is not known, or a tensor is missing, or has another shape or dtype than the format says.
    """

    def __init__(self, config_file: Path, raw: dict[str, Any], files: Iterable[Path], dtype: torch.dtype) -> None:
        settings = quantization(raw)
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if not isinstance(settings, dict) or not isinstance(method, str) or method not in FORMATS:
            raise UserError(
                f"{config_file}: its weights are quantised by quant_method {str(method)[:50]!r}, which is not read; "
                f"expected one of: {', '.join(FORMATS)}."
            )
        self.dtype, self.stored = dtype, Stored(files)
        if not self.stored.files:
            raise UserError(f"{config_file.parent}: quantised weights are read from safetensors files only.")
        try:
            weights, self.kind = FORMATS[method](self.stored, settings)
        except ValueError as error:
            raise UserError(f"{config_file}: quantization_config of quant_method '{method}': {error}.") from None
        self.weights = {first: weight for first, weight in weights}
        self.parts = {part for weight in self.weights.values() for part in weight.parts}
        problems = self.stored.problems
        for name, like in self.stored.empty.items():
            if name in self.weights.keys() | self.parts or like.dtype in STATE_DTYPES.values():
                continue
            problems.append(f"{name} is {words(like.dtype)}, which nothing beside it gives values")
        if problems:
            more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
            listing = "\n  ".join(problems[:20] + more)
            raise UserError(f"the weights in {config_file.parent} are not those of {self.kind}:\n  {listing}")
        self.config = without_quantization(raw)
        self.kind += f", dequantised to {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        number = counted(len(self.weights), "tensor")
        print(f"note: {config_file.parent}: {number} in {self.kind}.", file=sys.stderr)

    def read(self, meta: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor), one in memory at a time; with `meta`, only shapes and dtypes."""
        others = read_empty if meta else lambda files, only: read_tensors(files, copied=True, only=only)
        for name in self.stored.empty:
            if name in self.parts:
                continue
            if name not in self.weights:
                yield from others([self.stored.file[name]], name.__eq__)
                continue
            weight = self.weights[name]
            values = torch.empty(weight.shape, dtype=self.dtype, device="meta" if meta else None)
            if not meta:
                weight.fill(values)
            yield weight.name, values


def quantization(raw: dict[str, Any]) -> Any:
    """Return `quantization_config` of a config.json, or of its text part; None: the weights are not quantised."""
    text = raw.get("text_config")
    inside = text.get("quantization_config") if isinstance(text, dict) else None
    return inside if raw.get("quantization_config") is None else raw["quantization_config"]


def without_quantization(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without `quantization_config`."""
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return plain
