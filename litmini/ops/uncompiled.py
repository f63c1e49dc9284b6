"""Calls that torch.compile leaves uncompiled. Import it only while compiling: the decorator imports torch._dynamo (1 s)."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, run uncompiled; the graph of compiled code around it breaks here."""
    return function(*args)
