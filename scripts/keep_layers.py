"""Make a shallower model of some layers of a checkpoint, to start a student of scripts/finetune_distill.py from.

    python scripts/keep_layers.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --layers '[0, 6, 12, 18, 24, 29]' --out_dir checkpoints/mine/SmolLM2-6-layers

Embedding, last norm and head stay. The result is a checkpoint that has forgotten most of what the model knew, until it is
trained.
"""

from dataclasses import dataclass

from litmini.cli import command


@dataclass
class KeepLayersConfig:
    """Settings of keep_layers.py."""

    checkpoint_dir: str
    """The checkpoint to take layers from."""
    layers: list[int]
    """Numbers of the layers to keep, from 0, in their new order."""
    out_dir: str
    """Directory to write; must not exist."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""


def main(config: KeepLayersConfig) -> None:
    from litmini.checkpoints.keep_layers import keep_layers
    from litmini.models import use_model_file

    use_model_file(config.model_file)
    after, before = keep_layers(config.checkpoint_dir, config.out_dir, config.layers)
    print(f"written: {config.out_dir}, {after:,} of {before:,} parameters.")


if __name__ == "__main__":
    command(main, KeepLayersConfig, __doc__)
