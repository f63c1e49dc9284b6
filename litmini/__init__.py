"""litmini: finetune language models whose every part one can read. Importing this imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from litmini.tokenizer import Tokenizer

__version__ = "0.1.0"


def load(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path | None = None,
    dtype: str = "bf16",
    device: str = "cpu",
    bits: Literal[4, 16] = 16,
) -> tuple[nn.Module, Tokenizer]:
    """The model of a checkpoint directory, with an adapter if given, and its tokenizer.

    Args:
        dtype: "bf16" or "fp32".
        bits: 4 puts the linears of the base into NF4 while they are loaded, as for QLoRA.

    Raises:
        litmini.config.UserError: a directory is missing, incomplete or damaged, or the adapter is of another base.
    """
    from litmini.checkpoint import parse_dtype
    from litmini.config import QuantizeConfig
    from litmini.peft_format import load_adapter, read_adapter
    from litmini.quantize import convert, load_quantized
    from litmini.tokenizer import Tokenizer

    wanted = stored = parse_dtype(dtype)
    config = QuantizeConfig(bits)
    if adapter_dir is not None and (adapter := read_adapter(adapter_dir)).quantize.bits == bits == 4:
        config, stored = adapter.quantize, adapter.dtype  # the 4-bit weights that it was trained on
    model = load_quantized(checkpoint_dir, config, stored, device)
    if stored != wanted:
        convert(model, wanted)
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
        if (Path(adapter_dir) / "tokenizer.json").is_file():  # the template of its training
            return model, Tokenizer(adapter_dir)
    return model, Tokenizer(checkpoint_dir)


def generate(*args: Any, **options: Any) -> str | list[int]:
    """See `litmini.generation.generate`."""
    from litmini.generation import generate

    return generate(*args, **options)
