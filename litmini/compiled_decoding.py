"""torch.compile for decoding on the CPU, where a token costs as much in single operations as in reading the weights.

One call of what is compiled costs about as much as the work that it saves in one block, so a graph takes several. They
all have the same code: one compilation serves them, and it is kept on disk.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.compiled import check_compiler
from litmini.lora import LoRALinear
from litmini.sharding import blocks

LARGEST_GROUP = 5
"""Most blocks of a graph. Compiling takes as long as they are many, and 5 of SmolLM2-135M take most of what can be had."""

OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,  # what allocates and calls the kernels is C++ as well
    "size_asserts": False,
    # Modules do not change any more, and `_kind` keeps different ones apart.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}


class OneRowLinear(nn.Linear):
    """A linear whose product with one row the compiler writes out: it reads bf16 faster than torch's own does on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu" or not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        x32 = x.reshape(-1).float()
        # Four rows of the weight in one loop: a single one waits for its own sum instead of for memory.
        y = torch.cat([(x32 * rows.float()).sum(-1) for rows in self.weight.chunk(4)])  # (out_features,) fp32
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def compile_decoding(model: nn.Module) -> None:
    """Let `model`, in 16 or 32 bits, read single tokens through compiled blocks; the first ones take a minute or so more.

    Prompts, whose lengths all differ, are read as without it. From here on the modules must stay as they are.

    Raises:
        UserError: there is no C++ compiler, or it is a model that cannot be compiled.
    """
    check_compiler(model, next(model.parameters()).dtype)
    adapted = {id(m.base) for m in model.modules() if isinstance(m, LoRALinear)}  # summed in one operation
    head = [m for m in model.children() if isinstance(m, nn.Linear)]
    for part in [*blocks(model), *head]:
        for module in part.modules():
            if type(module) is nn.Linear and id(module) not in adapted:
                module.__class__ = OneRowLinear
    _Stack(blocks(model)).install()
    for module in head:
        _Stack([module]).install()


class _Later:
    """What blocks give that wait for the last one of their group: nothing can be done with it but to hand it on."""


class _Stack:
    """Modules one after the other, run in compiled groups where each takes what the one before gave.

    Whether it does is seen in the first forward, which runs as it is written: a model may do something between two of its
    blocks, or take more from them than x, and then each block is a graph of its own.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.plain = [module.forward for module in modules]
        self.groups: list[Callable[..., Any]] = []  # none yet: the first forward is still to come
        self.size = 0  # modules of a group
        self.chained, self.last = True, None  # in the first forward: so far; what the module before gave
        self.x: Any = None
        self.others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # what the modules of a group got beside x
        self.later = _Later()

    def install(self) -> None:
        for i, module in enumerate(self.modules):
            module.forward = functools.partial(self.run, i)  # type: ignore[method-assign]

    def run(self, i: int, x: Any, *args: Any, **named: Any) -> Any:
        """Module i's forward."""
        if not self.groups:
            return self.learn(i, x, *args, **named)
        place = i % self.size
        single = x is self.later if place else x.shape[1] == 1
        if not single:
            return self.plain[i](x, *args, **named)
        if not place:
            self.x, self.others = x, []
        self.others.append((args, named))
        return self.groups[i // self.size](self.x, self.others) if place == self.size - 1 else self.later

    def learn(self, i: int, x: Any, *args: Any, **named: Any) -> Any:
        self.chained &= not i or x is self.last
        y = self.last = self.plain[i](x, *args, **named)
        if i == len(self.modules) - 1:
            fitting = [n for n in range(1, LARGEST_GROUP + 1) if not len(self.modules) % n]
            self.size, self.last = fitting[-1] if self.chained else 1, None
            self.groups = _compile_groups(self.modules, self.plain, self.size)
        return y


def _compile_groups(modules: list[nn.Module], plain: list[Callable[..., Any]], size: int) -> list[Callable[..., Any]]:
    """For each `size` modules in turn, a function of x, and of what each gets beside it, that runs them all."""
    kinds: dict[tuple[str, ...], Callable[..., Any]] = {}
    groups: list[Callable[..., Any]] = []
    for i in range(0, len(modules), size):
        kind = tuple(_kind(module) for module in modules[i : i + size])
        if kind not in kinds:  # a code object of its own, to which torch.compile's graphs belong
            run = types.FunctionType(_run.__code__.replace(), _run.__globals__)
            kinds[kind] = torch.compile(run, dynamic=True, options=OPTIONS)  # the number of keys grows with every token
        groups.append(functools.partial(kinds[kind], plain[i : i + size]))
    return groups


def _run(forwards: list[Callable[..., Any]], x: Tensor, others: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
    for forward, (args, named) in zip(forwards, others, strict=True):
        x = forward(x, *args, **named)
    return x


def _kind(module: nn.Module) -> str:
    """All that a graph of `module` depends on: its modules, what they hold, and the form of its weights, not their values."""
    internals = vars(nn.Module()).keys() | {"forward"}
    parts = [
        (name, type(part), sorted((k, v) for k, v in vars(part).items() if k not in internals))
        for name, part in module.named_modules()
    ]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return repr((parts, [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors]))
