"""What torch.compile leaves as it is written. Its decorator imports torch._dynamo, which takes a second: hence a file."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, run as it is written; whatever is compiled around it breaks its graph here."""
    return function(*args)
