"""Add tokens to the vocabulary of a checkpoint; the result is a checkpoint, too.

    python scripts/extend_vocabulary.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --new_tokens '["<|city|>", "<|river|>"]' --out_dir checkpoints/mine/with-places

Their rows in embedding and head start as the mean of the others. To train an adapter and these rows, give the same tokens
to a finetuning script: --data.new_tokens '["<|city|>", "<|river|>"]'. That adds them to a checkpoint without them, too.
"""

from dataclasses import dataclass

from litmini.cli import command


@dataclass
class ExtendConfig:
    """Settings of extend_vocabulary.py."""

    checkpoint_dir: str
    """The checkpoint to start from."""
    new_tokens: list[str]
    """Texts that become tokens. Those that the chat template writes are special tokens: text that looks like them is text."""
    out_dir: str
    """Directory to write; must not exist."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""


def main(config: ExtendConfig) -> None:
    from litmini.checkpoints.extend import extend_vocabulary
    from litmini.models import use_model_file

    use_model_file(config.model_file)
    ids, known = extend_vocabulary(config.checkpoint_dir, config.out_dir, config.new_tokens)
    for token, i in zip(config.new_tokens, ids, strict=True):
        print(f"{token}  {i}{'  (was there)' if i < known else ''}")
    print(f"written: {config.out_dir}. The rows of new tokens are the mean of the {known:,} before.")


if __name__ == "__main__":
    command(main, ExtendConfig, __doc__)
