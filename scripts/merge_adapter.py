"""Merge an adapter into its base; the result is a checkpoint that needs neither adapter nor PEFT.

    python scripts/merge_adapter.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --adapter_dir out/quickstart/final --out_dir checkpoints/mine/quickstart

Memory: a few tensors to merge, then the model to measure the effect of rounding (--check).
"""

from dataclasses import dataclass
from typing import Literal

from litmini.cli import command


@dataclass
class MergeConfig:
    """Settings of merge_adapter.py."""

    checkpoint_dir: str
    """The base that the adapter was trained on."""
    adapter_dir: str
    """An adapter in PEFT's format, such as out/NAME/final."""
    out_dir: str
    """Directory to write; must not exist."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Dtype of the result; none: that of the base."""
    base: Literal["trained", "original"] = "trained"
    """For a QLoRA adapter: merge into the dequantized weights that it was trained on, or into the original ones."""
    check: bool = True
    """Load both models and measure the difference between merged and unmerged."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""


def main(config: MergeConfig) -> None:
    from litmini.checkpoints.export import export, merge_error
    from litmini.checkpoints.hf import parse_dtype
    from litmini.checkpoints.model_card import resolve, write_card
    from litmini.checkpoints.scores import score_count
    from litmini.files import read_json
    from litmini.models import use_model_file

    dtype = parse_dtype(config.dtype) if config.dtype else None
    use_model_file(config.model_file)
    target = export(config.checkpoint_dir, config.out_dir, config.adapter_dir, dtype, base=config.base)
    write_card(resolve(config.checkpoint_dir, config.adapter_dir), target, target.name, adapter_kept=False)
    print(f"merged: {target}")
    if config.check:
        written = "fp32" if read_json(target / "config.json")["dtype"] == "float32" else "bf16"
        found = merge_error(config.checkpoint_dir, config.adapter_dir, target, written)
        scored = score_count(read_json(target / "config.json")) > 0
        what, top = ("scores", "class") if scored else ("log-probabilities", "token")
        print(
            f"merged and unmerged: {what} differ by at most {found.difference:.3g}, same top-1 {top} {found.same:.1%}"
        )
        rounding = f"rounding the weights to {written} once more makes {found.rounding:.2g}"
        if found.expected:
            print(f"That is as expected: {rounding}.")
        else:
            other = "" if written == "fp32" else "--dtype fp32, or "
            print(f"warning: that is more than expected: {rounding}. Try {other}the adapter over its base.")


if __name__ == "__main__":
    command(main, MergeConfig, __doc__)
