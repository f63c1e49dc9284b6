"""Export a result for other tools: set dtype and shard size, merge or keep an adapter, write a model card.

    python scripts/convert_to_hf.py out/quickstart --out_dir out/for-vllm

A checkpoint of litmini is already a Hugging Face directory: without an adapter this changes dtype and shards, and drops the
training state. To convert the result to GGUF, use llama.cpp's converter: python convert_hf_to_gguf.py out/for-vllm
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from litmini.cli import command
from litmini.errors import UserError, counted

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class ConvertConfig:
    """Settings of convert_to_hf.py."""

    checkpoint: str
    """Checkpoint directory; a run's directory, its final/ or a step-*; or an adapter whose base is still at its path."""
    out_dir: str
    """Directory to write; must not exist."""
    adapter: str | None = None
    """Adapter directory, if the checkpoint is its base."""
    merge: bool = True
    """Merge the adapter in; false: write the adapter alone, for PEFT."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Dtype of the result; none: unchanged."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file, such as 500MB or 5GB."""
    push_to_hub: str | None = None
    """ORG/NAME on the Hugging Face hub to upload the result to. Nothing is uploaded without this."""
    private: bool = True
    """Whether a repository that --push_to_hub creates is private."""

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(f"push_to_hub is '{self.push_to_hub}'; expected ORG/NAME.")


def main(config: ConvertConfig) -> None:
    from pathlib import Path

    from litmini.checkpoints.export import export, parse_size
    from litmini.checkpoints.hf import parse_dtype
    from litmini.checkpoints.model_card import export_adapter, push, resolve, write_card
    from litmini.models import use_model_file

    own = use_model_file(config.model_file)
    result, out_dir = resolve(config.checkpoint, config.adapter), Path(config.out_dir)
    kept = result.adapter is not None and not config.merge
    if not config.merge and (result.adapter is None or config.dtype):
        raise UserError("--merge false writes an adapter unchanged: it needs an adapter, and excludes --dtype.")
    if kept:
        assert result.adapter is not None
        export_adapter(result.checkpoint, result.adapter, out_dir)
    else:
        dtype = parse_dtype(config.dtype) if config.dtype else None
        export(result.checkpoint, out_dir, result.adapter, dtype, parse_size(config.max_shard_size))
    write_card(result, out_dir, out_dir.name, kept)
    print(
        f"written: {out_dir}, with a model card. {readers(out_dir, config.model_file if own and not kept else None)}."
    )
    if config.push_to_hub:
        print(f"on the hub: {push(out_dir, config.push_to_hub, config.private)}")


def readers(out_dir: "Path", model_file: str | None) -> str:
    """Return what loads an export; of a family in a user's own file, what transformers does not know of it."""
    if model_file is None:
        return "transformers, vLLM and PEFT load it"
    import torch

    from litmini.checkpoints.safetensors_io import read_empty, shards
    from litmini.files import read_json

    raw = read_json(out_dir / "config.json")
    kind = raw.get("model_type")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ImportError:
        return (
            f"transformers, which is not installed here, loads it only if it knows model_type '{kind}' of {model_file}"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"transformers cannot load it: it does not know model_type '{kind}' of {model_file}"
    known = {name for name, _ in model.named_parameters()}  # without further names of tied ones
    written = {name for name, _ in read_empty(shards(out_dir))}
    differ = {"does not know": sorted(written - set(model.state_dict())), "misses": sorted(known - written)}
    words = [
        f"{what} {counted(len(names), 'tensor')}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        for what, names in differ.items()
        if names
    ]
    return f"transformers {'; it '.join(words)}" if words else "transformers, vLLM and PEFT load it"


if __name__ == "__main__":
    command(main, ConvertConfig, __doc__, positional=("checkpoint",))
