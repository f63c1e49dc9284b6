"""Load a checkpoint directory, in 16 bits or 4, with an adapter or without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from litmini.checkpoints.config import empty_model
from litmini.checkpoints.hf import check_checkpoint_dir, load_model, parse_dtype
from litmini.checkpoints.peft import load_adapter, read_adapter
from litmini.checkpoints.scores import give_scores_of_adapter
from litmini.config.finetune import QuantizeConfig
from litmini.errors import UserError, counted
from litmini.methods.nf4 import NF4Linear, convert, quantizable
from litmini.tokenizer import Tokenizer


def load_quantized(
    directory: str | Path,
    config: QuantizeConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    on: torch.device | None = None,
) -> nn.Module:
    """`load_model`, each linear quantised from `dtype` as soon as its weight is read: never all of them in 16 bits.

    Args:
        on: the device that quantises, one weight at a time; None: `device`. A GPU takes seconds where a CPU takes minutes.
    """
    if config.bits == 16:
        return load_model(directory, dtype, device)
    names = quantizable(empty_model(check_checkpoint_dir(directory))[1])
    return load_model(directory, dtype, device, swap=lambda n, m: NF4Linear(m, config.double, on) if n in names else m)


def load(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path | None = None,
    dtype: str = "bf16",
    device: str = "cpu",
    bits: Literal[4, 16] = 16,
    check_finite: bool = False,
) -> tuple[nn.Module, Tokenizer]:
    """The model of a checkpoint directory, with an adapter if given, and its tokenizer.

    Of a classifier or a reward model it gives scores in place of logits; see `litmini.methods.heads.ScoreHead`.

    Args:
        dtype: "bf16" or "fp32".
        bits: 4 puts the linears of the base into NF4 while they are loaded, as for QLoRA.
        check_finite: read all weights, and raise if any is NaN or infinite.

    Raises:
        litmini.errors.UserError: a directory is missing, incomplete or damaged, or the adapter is of another base.
    """
    wanted = stored = parse_dtype(dtype)
    config = QuantizeConfig(bits)
    if adapter_dir is not None:
        adapter = read_adapter(adapter_dir)
        if adapter.quantize.bits == bits == 4:
            config, stored = adapter.quantize, adapter.dtype  # the 4-bit weights that it was trained on
        elif adapter.quantize.bits == 4:
            print(f"note: {adapter_dir} was trained over a 4-bit base; --bits 4 gives it that.", file=sys.stderr)
    model = load_quantized(checkpoint_dir, config, stored, device)
    if stored != wanted:
        convert(model, wanted)
    if adapter_dir is not None:
        give_scores_of_adapter(model, adapter)
        load_adapter(model, adapter_dir)
    if check_finite and (wrong := [n for n, t in model.state_dict().items() if not t.isfinite().all()]):
        raise UserError(
            f"NaN or infinite values in {counted(len(wrong), 'tensor')} of {checkpoint_dir}"
            f"{f' with {adapter_dir}' * (adapter_dir is not None)}: "
            f"{', '.join(wrong[:5])}{', ...' * (len(wrong) > 5)}; fetch or train it again."
        )
    if adapter_dir is not None and (Path(adapter_dir) / "tokenizer.json").is_file():  # the template of its training
        return model, Tokenizer(adapter_dir)
    return model, Tokenizer(checkpoint_dir)
