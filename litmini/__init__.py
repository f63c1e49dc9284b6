"""litmini: finetune language models whose every part one can read. Importing this imports nothing heavy.

    import litmini

    model, tokenizer = litmini.load("checkpoints/ORG/NAME", adapter_dir=None)
    print(litmini.generate(model, tokenizer, "Hello"))             # also a list of prompts; litmini.stream yields pieces
    litmini.add_adapters(model, rank=8)                            # then train them as you like
    litmini.save_adapter(model, "out/mine", "checkpoints/ORG/NAME")
    results = litmini.finetune(config)                             # a whole run, as the scripts do it

Each has a docstring: help(litmini.generate).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litmini.checkpoints.load import load as load
    from litmini.generation.generate import generate as generate
    from litmini.generation.generate import stream as stream
    from litmini.tasks.from_python import add_adapters as add_adapters
    from litmini.tasks.from_python import finetune as finetune
    from litmini.tasks.from_python import save_adapter as save_adapter

LOCATIONS = {
    "load": "litmini.checkpoints.load",
    "generate": "litmini.generation.generate",
    "stream": "litmini.generation.generate",
    "add_adapters": "litmini.tasks.from_python",
    "save_adapter": "litmini.tasks.from_python",
    "finetune": "litmini.tasks.from_python",
}
"""Public name -> the module that it is imported from when it is first used."""
__all__ = ["add_adapters", "finetune", "generate", "load", "save_adapter", "stream"]


def __getattr__(name: str) -> Any:
    """Import a public name, or read the version, when it is first used."""
    if name in LOCATIONS:
        return getattr(importlib.import_module(LOCATIONS[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("litmini")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *LOCATIONS, "__version__"])
