"""Convert a checkpoint of another format to litmini's: a Hugging Face directory with safetensors.

    python scripts/convert_to_litmini.py model.Q4_K_M.gguf --out_dir checkpoints/ORG/NAME
    python scripts/convert_to_litmini.py DIRECTORY --out_dir checkpoints/ORG/NAME --dtype bf16

A directory holds safetensors or pytorch_model*.bin with config.json, Meta's consolidated.*.pth with params.json, or the
model.pth of `litgpt convert_from_litgpt` with config.json. Safetensors may be quantised (FP8, MXFP4, bitsandbytes in 4 bits):
they are dequantised. Memory: 0.3 GB for the interpreter and a few times the largest
tensor, independent of the model's size.
"""

from dataclasses import dataclass
from typing import Literal

from litmini.cli import command


@dataclass
class ConvertConfig:
    """Settings of convert_to_litmini.py."""

    source: str
    """GGUF file, or directory of the checkpoint."""
    out_dir: str
    """Directory to write; must not exist."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Dtype of the result; none: unchanged, and bf16 for a GGUF file and quantised weights."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file, such as 500MB or 5GB."""


def main(config: ConvertConfig) -> None:
    from litmini.checkpoints.export import parse_size
    from litmini.checkpoints.hf import parse_dtype
    from litmini.importers.convert import convert

    dtype = parse_dtype(config.dtype) if config.dtype else None
    target = convert(config.source, config.out_dir, dtype, parse_size(config.max_shard_size))
    print(f"checkpoint in {target}. To check it: python scripts/verify.py {target}")


if __name__ == "__main__":
    command(main, ConvertConfig, __doc__, positional=("source",))
