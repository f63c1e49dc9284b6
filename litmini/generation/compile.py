"""torch.compile for decoding on the CPU, where a token costs as much in launching operations as in reading the weights.

One call of what is compiled costs about as much as the work that it saves in one block, so a graph takes several. They
all have the same code: one compilation serves them, and it is kept on disk.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.compiler import check_compiler
from litmini.distributed.fsdp import blocks
from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer
from litmini.ops.uncompiled import allow_forms

LARGEST_GROUP = 5
"""Most blocks of a graph. Compiling takes as long as they are many, and 5 of SmolLM2-135M take most of what can be had."""


class GEMVLinear(nn.Linear):
    """A linear whose product with one vector the compiler writes out: it reads bf16 faster than torch's own GEMV on CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        """Share the parameters of `linear`, in whose place it is put."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu" or not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        x32 = x.reshape(-1).float()
        # Four rows of the weight in one loop: a single one waits for its own sum instead of for memory.
        y = torch.cat([(x32 * rows.float()).sum(-1) for rows in self.weight.chunk(4)])  # (out_features,) fp32
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def compile_decoding(model: nn.Module) -> None:
    """Let `model`, in 16 or 32 bits, read single tokens through compiled blocks; the first ones take a minute or so more.

    Prompts, whose lengths all differ, are read as without it. One thread at a time may use the model.

    Raises:
        UserError: there is no compiler, or it is a model that cannot be compiled.
    """
    check_compiler(model, next(model.parameters()).dtype)
    _swap_linears(model)
    allow_forms()
    _CompiledGroups(blocks(model)).install()
    for module in _heads(model):
        _CompiledGroups([module]).install()


def _heads(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.children() if isinstance(module, nn.Linear)]


def _swap_linears(model: nn.Module) -> None:
    """Put a `GEMVLinear` in the place of each plain linear of the blocks and the head."""
    # An adapter that is summed with its base reads the base's weight, and knows a plain linear only
    summed = {module.base for module in model.modules() if isinstance(module, AdapterLayer) and module.additive}
    compiled = {module for part in [*blocks(model), *_heads(model)] for module in part.modules()} - summed
    swapped: dict[nn.Module, GEMVLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Linear and module in compiled:
            if module not in swapped:
                swapped[module] = GEMVLinear(module)
            model.set_submodule(name, swapped[module])


class _Deferred:
    """The output of a block that waits for the last one of its group: nothing can be done with it but to hand it on."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise UserError(
            "this model uses what each of its blocks gives, and not only the next block: leave --compile out."
        )

    __getattr__ = __torch_function__


class _CompiledGroups:
    """Modules one after the other, run in compiled groups where each takes what the one before gave.

    Whether it does is seen in the first forward, which runs as it is written: a model may do something between two of its
    blocks, or take more from them than x, and then each block is a graph of its own.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.plain = [module.forward for module in modules]
        on_cpu = next(modules[0].parameters()).device.type == "cpu"
        options: dict[str, Any] = {"cpp_wrapper": on_cpu, "size_asserts": False}  # from Python, kernels start later
        self.compiled = torch.compile(_run, dynamic=True, options=options)  # the number of keys grows with every token
        self.size = 0  # modules of a group; not known before the first forward
        self.chained, self.last, self.next = True, None, 0  # in it: so far; what the module before gave; who comes now
        self.x: Any = None
        self.others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # what the modules of a group got beside x
        self.deferred = _Deferred()

    def install(self) -> None:
        for i, module in enumerate(self.modules):
            module.forward = functools.partial(self.run, i)  # type: ignore[method-assign]

    def run(self, i: int, x: Any, /, *args: Any, **named: Any) -> Any:
        """Module i's forward."""
        if not self.size:
            return self.learn(i, x, *args, **named)
        position = i % self.size
        single = x is self.deferred if position else x.shape[1] == 1
        if not single:
            return self.plain[i](x, *args, **named)
        if not position:
            self.x, self.others = x, []
        if len(self.others) != position:
            raise UserError("this model runs its blocks in another order than before: leave --compile out.")
        self.others.append((args, named))
        if position < self.size - 1:
            return self.deferred
        x, others, self.x, self.others = self.x, self.others, None, []  # a cache may be large
        return self.compiled(self.plain[i - position : i + 1], x, others)

    def learn(self, i: int, x: Any, /, *args: Any, **named: Any) -> Any:
        self.chained &= i == self.next and (not i or x is self.last)
        y = self.last = self.plain[i](x, *args, **named)
        self.next = i + 1
        if i == len(self.modules) - 1:
            fitting = [n for n in range(1, LARGEST_GROUP + 1) if not len(self.modules) % n]
            self.size, self.last = fitting[-1] if self.chained else 1, None
        return y


def _run(forwards: list[Callable[..., Any]], x: Tensor, others: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
    for forward, (args, named) in zip(forwards, others, strict=True):
        x = forward(x, *args, **named)
    return x
