"""What torch.compile leaves uncompiled, and what it must not. Import it only to compile: it imports torch._dynamo (1 s)."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

FORMS = 64
"""Compilations of one function: sizes, windows, with adapters and gradients or without, in any combination."""


@torch.compiler.disable
def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, run uncompiled; the graph of compiled code around it breaks here."""
    return function(*args)


def allow_forms() -> None:
    """Let torch.compile compile a function up to `FORMS` times. Beyond its usual 8, it would run the function uncompiled."""
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
