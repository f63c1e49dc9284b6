"""Write a checkpoint for other tools: dtype and shards as wanted, an adapter merged in.

    python scripts/convert_to_hf.py checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --out_dir out/for-vllm \\
        --adapter out/quickstart/final

A checkpoint of litmini is a Hugging Face directory already: without an adapter this changes dtype and shards only.
"""

from dataclasses import dataclass
from typing import Literal

from litmini.cli import command


@dataclass
class ConvertConfig:
    """Settings of convert_to_hf.py."""

    checkpoint: str
    """Checkpoint directory, or the final/ of a full finetuning run."""
    out_dir: str
    """Where to write; must not exist."""
    adapter: str | None = None
    """Adapter directory to merge in."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Of the result; none: as it is."""
    max_shard_size: str = "5GB"
    """Largest weight file, such as 500MB or 5GB."""


def main(config: ConvertConfig) -> None:
    from litmini.checkpoint import parse_dtype
    from litmini.export import export, parse_size
    from litmini.models import use_model_file

    dtype = parse_dtype(config.dtype) if config.dtype else None
    own = use_model_file(config.model_file)
    target = export(config.checkpoint, config.out_dir, config.adapter, dtype, parse_size(config.max_shard_size))
    if own:
        print(
            f"written: {target}. transformers knows none of its tensors: its model_type is that of {config.model_file}."
        )
    else:
        print(f"written: {target}. transformers, vLLM and PEFT load it as it is.")


if __name__ == "__main__":
    command(main, ConvertConfig, __doc__, positional=("checkpoint",))
