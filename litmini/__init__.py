"""litmini: finetune language models whose every part one can read. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litmini.checkpoints.load import load as load
    from litmini.generation.generate import generate as generate


def __getattr__(name: str) -> Any:
    """Import `load`, `generate` and the version when they are first used."""
    if name == "load":
        from litmini.checkpoints.load import load

        return load
    if name == "generate":
        from litmini.generation.generate import generate

        return generate
    if name == "__version__":
        from importlib.metadata import version

        return version("litmini")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
