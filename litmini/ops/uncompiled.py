"""What torch.compile leaves as it is written. Imported while compiling only: the decorator imports torch._dynamo, a second."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, run as it is written; whatever is compiled around it breaks its graph here."""
    return function(*args)
