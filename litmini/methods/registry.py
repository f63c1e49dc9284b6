"""The methods whose adapters are read from disk: each class says which `adapter_config.json` is its own."""

from typing import Any

from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer
from litmini.methods.dora import DoRALinear
from litmini.methods.ia3 import IA3Linear
from litmini.methods.lora import LoRALinear

METHODS: tuple[type[AdapterLayer], ...] = (LoRALinear, DoRALinear, IA3Linear)


def method_of(config: dict[str, Any]) -> type[AdapterLayer]:
    """Return the class of an `adapter_config.json`'s layers.

    Raises:
        UserError: there is none.
    """
    for method in METHODS:
        if method.reads(config):
            return method
    known = ", ".join(method.__name__.removesuffix("Linear") for method in METHODS)
    raise UserError(f"peft_type = {config.get('peft_type')!r} is not implemented; there are: {known}")
