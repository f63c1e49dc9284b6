"""Several adapters over one base in memory: one base model, many customers, side by side in one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.peft import check_adapter, read_adapter
from litmini.errors import UserError
from litmini.methods.adapters import replace_module
from litmini.methods.lora import LoRALinear, onto


class MultiLoRA:
    """Adapters of one `model`, added and removed while it serves.

        bank = MultiLoRA(model)
        bank.add("law", "out/law/final")
        bank.add("cooking", "out/cooking/final")
        with bank.use(["law", "cooking", None]):  # one name for each row of the batch; None: the bare base
            model(tokens)

    The base is computed once for all rows; each adapter changes its own rows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.names: list[str] = []
        self._layers: dict[str, _Layer] = {}
        self._rows = _Rows()

    def add(self, name: str, directory: str | Path) -> None:
        """Load the adapter of `directory` as `name`, in the place of one that has this name already.

        Raises:
            UserError: it is damaged or of another base; what was there stays.
        """
        adapter = read_adapter(directory)
        with self._bare():
            covered = check_adapter(self.model, adapter)
            made = {full: adapter.over(full, base).eval() for full, base in covered.items()}
        if name in self.names:
            self.remove(name)
        self.names.append(name)
        for full, layer in made.items():
            if full not in self._layers:
                self._layers[full] = _Layer(covered[full], self._rows)
                replace_module(self.model, full, self._layers[full])
            self._layers[full].adapters[name] = layer

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no adapter covers are the base's again."""
        self._check([name])
        self.names.remove(name)
        for full, layer in list(self._layers.items()):
            layer.adapters.pop(name, None)
            if not layer.adapters:
                replace_module(self.model, full, layer.base)
                del self._layers[full]

    @contextmanager
    def use(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch goes through the adapter `rows[i]`, or through the bare base where it is None."""
        self._check([name for name in rows if name is not None])
        device = next(self.model.parameters()).device
        before = vars(self._rows).copy()
        self._rows.count, self._rows.of = len(rows), {}
        for name in dict.fromkeys(name for name in rows if name is not None):
            self._rows.of[name] = torch.tensor([i for i, row in enumerate(rows) if row == name], device=device)
        try:
            yield
        finally:
            vars(self._rows).update(before)

    def _check(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(names) - set(self.names)):
            raise UserError(f"no adapter {', '.join(unknown)}; there are: {', '.join(self.names) or 'none'}.")

    @contextmanager
    def _bare(self) -> Iterator[None]:
        for full, layer in self._layers.items():
            replace_module(self.model, full, layer.base)
        try:
            yield
        finally:
            for full, layer in self._layers.items():
                replace_module(self.model, full, layer)


class _Rows:
    """Which rows of the batch go through which adapter, and how many rows there are."""

    def __init__(self) -> None:
        self.count = 0
        self.of: dict[str, Tensor] = {}


class _Layer(nn.Module):
    """A layer of the base, and the adapters over it, each for its rows."""

    def __init__(self, base: nn.Module, rows: _Rows) -> None:
        super().__init__()
        self.base = base
        self.adapters: dict[str, nn.Module] = {}
        self.rows = rows  # of the bank

    def forward(self, x: Tensor, *ends: Any) -> Tensor:
        change, others = None, []
        for name, rows in self.rows.of.items():
            if name not in self.adapters:
                continue
            if ends:
                raise UserError("adapters over experts serve alone: their rows are sorted by expert.")
            if len(x) != self.rows.count:
                raise UserError(
                    f"{self.rows.count} names of adapters for a batch of {len(x)} rows, expected one for each."
                )
            layer: Any = self.adapters[name]
            if not isinstance(layer, LoRALinear):
                others.append((rows, layer))
                continue
            if change is None:
                change = x.new_zeros(*x.shape[:-1], layer.base.out_features)
            change[rows] = layer.change(x[rows])
        y = self.base(x, *ends) if change is None else onto(self.base, x, change)
        for rows, layer in others:
            y = y.index_copy(0, rows, layer(x[rows]).to(y.dtype))
        return y
