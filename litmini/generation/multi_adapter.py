"""Multi-LoRA: several adapters over one base in memory, one base model for many customers, side by side in one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.peft import check_adapter, read_adapter
from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer
from litmini.methods.lora_matmul import add_to_base


class MultiLoRA:
    """Adapters of one `model`, of any method, added and removed while it serves.

        multi_lora = MultiLoRA(model)
        multi_lora.add("law", "out/law/final")
        multi_lora.add("cooking", "out/cooking/final")
        with multi_lora.use(["law", "cooking", None]):  # a name for each sequence of the batch; None: the bare base
            model(tokens)

    The base is computed once for all sequences; each adapter changes its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.names: list[str] = []
        self._layers: dict[str, _Layer] = {}
        self._assignment = _Assignment()

    def add(self, name: str, directory: str | Path) -> None:
        """Load the adapter of `directory` as `name`, in the place of one that has this name already.

        Raises:
            UserError: it is damaged or of another base; what was there stays.
        """
        adapter = read_adapter(directory)
        with self._bare():
            new = {n: adapter.load(n, layer).eval() for n, layer in check_adapter(self.model, adapter).items()}
        if name in self.names:
            self.remove(name)
        self.names.append(name)
        for module, layer in new.items():
            if module not in self._layers:
                self._layers[module] = _Layer(layer.base, self._assignment)
                self.model.set_submodule(module, self._layers[module])
            self._layers[module].adapters[name] = layer

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no adapter covers are the base's again."""
        self._check([name])
        self.names.remove(name)
        for module, layer in list(self._layers.items()):
            layer.adapters.pop(name, None)
            if not layer.adapters:
                self.model.set_submodule(module, layer.base)
                del self._layers[module]

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, sequence i of every batch goes through the adapter `names[i]`, or the bare base where it is None."""
        self._check([name for name in names if name is not None])
        device = next(self.model.parameters()).device
        before = vars(self._assignment).copy()
        self._assignment.batch_size, self._assignment.sequences = len(names), {}
        for name in dict.fromkeys(name for name in names if name is not None):
            chosen = [i for i, other in enumerate(names) if other == name]
            self._assignment.sequences[name] = torch.tensor(chosen, device=device)
        try:
            yield
        finally:
            vars(self._assignment).update(before)

    def _check(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(names) - set(self.names)):
            raise UserError(f"no adapter {', '.join(unknown)}; there are: {', '.join(self.names) or 'none'}.")

    @contextmanager
    def _bare(self) -> Iterator[None]:
        for module, layer in self._layers.items():
            self.model.set_submodule(module, layer.base)
        try:
            yield
        finally:
            for module, layer in self._layers.items():
                self.model.set_submodule(module, layer)


class _Assignment:
    """Which sequences of the batch go through which adapter; shared by all layers of a model."""

    def __init__(self) -> None:
        self.batch_size = 0
        self.sequences: dict[str, Tensor] = {}  # name of an adapter -> indices in the batch


class _Layer(nn.Module):
    """A layer of the base, and the adapters over it, each for its sequences."""

    def __init__(self, base: nn.Module, assignment: _Assignment) -> None:
        super().__init__()
        self.base = base
        self.adapters: dict[str, AdapterLayer] = {}
        self.assignment = assignment

    def forward(self, x: Tensor, *offsets: Any) -> Tensor:
        if not x.numel():  # the head, while a prompt is read: at no position logits are needed
            return self.base(x, *offsets)
        delta, others = None, []
        for name, indices in self.assignment.sequences.items():
            if name not in self.adapters:
                continue
            if offsets:
                raise UserError("adapters over experts serve alone: their tokens are sorted by expert.")
            if len(x) != self.assignment.batch_size or (
                x.is_floating_point() and x.dim() != 3
            ):  # tokens, not sequences
                raise UserError(
                    f"{self.assignment.batch_size} names of adapters for a batch of {len(x)} sequences, expected one for "
                    f"each."
                )
            layer: Any = self.adapters[name]
            if not layer.additive:
                others.append((indices, layer))
                continue
            if delta is None:
                delta = x.new_zeros(*x.shape[:-1], layer.base.out_features)
            delta[indices] = layer.output_delta(x[indices])
        y = self.base(x, *offsets) if delta is None else add_to_base(self.base, x, delta)
        for indices, layer in others:
            y = y.index_copy(0, indices, layer(x[indices]).to(y.dtype))
        return y
