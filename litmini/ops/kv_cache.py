"""Keys and values of what a model has seen, so that each new token costs one position.

A token's place follows from its position: position p of a row stands in slot p modulo the number of slots. Layers with a
sliding window have no more slots than their window needs. Rows may be of different lengths, each goes on from its own
position, and to take tokens back one just goes on from an earlier position.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Most tokens of a row in one forward: a longer prompt comes in parts."""


@dataclass
class Slots:
    """What the layers that share a window have in common: which position each slot holds."""

    positions: Tensor
    """(B, n_slots + 1) int64, -1 where there is nothing; the last slot takes what is padding, and is never seen."""
    used: int = 0
    """Slots in use, counted from the left, in the fullest row."""
    at: tuple[slice | Tensor, ...] = field(default=(), repr=False)
    """Index of the new tokens' slots in (B, n_slots + 1, ...)."""

    @property
    def n_slots(self) -> int:
        return self.positions.shape[1] - 1


class LayerCache:
    """Keys and values of one layer, (B, n_kv_heads, n_slots + 1, head_dim) each; they exist from the first update on."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.window: int | None = None
        self.keys = self.values = torch.empty(0)

    def update(self, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """Add (B, n_kv_heads, T, head_dim); returns what `mask`'s queries may see, (B, n_kv_heads, S, head_dim)."""
        slots: Slots = mask.slots
        if not self.keys.numel():
            shape = (*k.shape[:2], slots.n_slots + 1, k.shape[3])
            self.window = mask.window
            self.keys = torch.zeros(shape, dtype=self.dtype, device=k.device)  # zeros: what is masked must be finite
            self.values = torch.zeros(shape, dtype=self.dtype, device=k.device)
        rows, places = slots.at
        if isinstance(places, slice):
            self.keys[:, :, places] = k
            self.values[:, :, places] = v
        else:
            self.keys[rows, :, places] = k.transpose(1, 2).to(self.dtype)
            self.values[rows, :, places] = v.transpose(1, 2).to(self.dtype)
        return self.keys[:, :, : slots.used], self.values[:, :, : slots.used]


class KVCache:
    """One `LayerCache` per layer, and one `Slots` per kind of window.

    Args:
        config: any family's `Config`: n_layers is read.
        batch: rows.
        capacity: positions per row; a forward beyond it is an error. Memory is taken for these, or for a window.
        chunk: most tokens of a row in one forward, where a window is shorter than `capacity`.
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
    ) -> None:
        self.layers = [LayerCache(dtype) for _ in range(config.n_layers)]
        self.batch, self.capacity, self.device, self.chunk = batch, capacity, torch.device(device), chunk
        self.length = 0  # of the longest row
        self.ragged = False  # whether rows differ, or have gaps: then every forward needs a mask
        self._slots: dict[int | None, Slots] = {}
        self._new = torch.empty(0)
        self._start: int | None = None

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def advance(self, positions: Tensor) -> None:
        """Make room for new tokens at `positions` (B, T), rising, below 0 for padding: once a forward, before its masks."""
        T = positions.shape[1]
        firsts, lasts = positions[:, [0, -1]].T.tolist()  # a sync point, only while generating
        stop = max(lasts) + 1
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {stop} are needed")
        even = len(set(firsts)) == 1 and 0 <= firsts[0] <= self.length and set(lasts) == {firsts[0] + T - 1}
        self.ragged = self.ragged or not even
        self.length = max(self.length, stop) if self.ragged else stop
        self._new, self._start = positions, None if self.ragged else firsts[0]
        for slots in self._slots.values():
            slots.at = ()

    def slots(self, window: int | None) -> Slots:
        """The slots of layers with this window, in which the new tokens have their places already."""
        if window not in self._slots:
            n_slots = self.capacity if window is None else min(self.capacity, window + self.chunk - 1)
            empty = torch.full((self.batch, n_slots + 1), -1, device=self.device)
            self._slots[window] = Slots(empty)
        slots = self._slots[window]
        if slots.at:
            return slots
        n, T = slots.n_slots, self._new.shape[1]
        if n < self.capacity and self.chunk < T:
            raise ValueError(f"{T} tokens at once; this cache takes {self.chunk}")
        slots.used = max(1, min(self.length, n))
        if self._start is not None and self._start % n + T <= n:
            slots.at = slice(None), slice(self._start % n, self._start % n + T)
        else:
            rows = torch.arange(len(self._new), device=self.device)[:, None].expand_as(self._new)
            slots.at = rows, torch.where(self._new < 0, n, self._new % n)
        slots.positions[slots.at] = self._new.clamp(min=-1)
        return slots

    @staticmethod
    def gather(config: Any, rows: "list[tuple[KVCache, int, int]]", capacity: int) -> "KVCache":
        """A new cache of the given rows: (cache, its row, how many of that row's tokens to keep) for each."""
        first = max((cache for cache, _, _ in rows), key=lambda cache: len(cache._slots))  # one that was used, if any
        new = KVCache(config, len(rows), capacity, first.layers[0].dtype, first.device, first.chunk)
        lengths = [length for _, _, length in rows]
        new.length = max(lengths)
        new.ragged = len(set(lengths)) > 1
        new._new = torch.tensor(lengths, device=first.device)[:, None] - 1
        for window in first._slots:
            slots, moves = new.slots(window), []
            slots.positions.fill_(-1)
            for i, (cache, row, length) in enumerate(rows):
                if not length:
                    continue
                held = cache._slots[window].positions[row]  # (n_slots + 1,)
                old = ((held >= max(0, length - slots.n_slots)) & (held < length)).nonzero()[:, 0]
                moves.append((i, cache, row, old, held[old] % slots.n_slots))
                slots.positions[i, moves[-1][-1]] = held[old]
            for n, layer in enumerate(new.layers):
                source = first.layers[n]
                if source.window != window or not source.keys.numel():
                    continue
                shape = (len(rows), source.keys.shape[1], slots.n_slots + 1, source.keys.shape[3])
                layer.window = window
                layer.keys, layer.values = source.keys.new_zeros(shape), source.values.new_zeros(shape)
                for i, cache, row, old, places in moves:
                    layer.keys[i, :, places] = cache.layers[n].keys[row, :, old]
                    layer.values[i, :, places] = cache.layers[n].values[row, :, old]
        return new
