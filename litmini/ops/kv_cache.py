"""KV caches: keys and values of the tokens so far, so that a forward pass computes only those of new tokens.

Position p of a sequence is in slot p modulo the number of slots. Layers with a sliding window have only as many slots as
their window needs. The sequences of a batch may have different lengths: each continues from its own position. To drop its
last tokens, a sequence continues from an earlier position: from any, but for recurrent layers (`StateCache`, `resume`).

On a GPU a cache is static: every forward reads all slots, used or not, and the host never waits for positions. So the kernels
of one step can be captured in a CUDA graph, and replayed for the next.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litmini.ops.state_cache import StateCache

CHUNK = 512
"""Maximum tokens of a sequence in one forward: a longer prompt comes in several."""


@dataclass
class Slots:
    """The position that each slot holds, for all layers with the same window."""

    positions: Tensor
    """(B, n_slots + 1) int64, -1 where a slot is empty; the last slot takes padding, and no query sees it."""
    static: bool = False
    used: int = 0
    """Slots that are read, counted from the left: those in use in the longest sequence; all, if static."""
    at: tuple[slice | Tensor, ...] = field(default=(), repr=False)
    """Index of the new tokens' slots into (B, n_slots + 1, ...)."""

    @property
    def n_slots(self) -> int:
        return self.positions.shape[1] - 1


class LayerCache:
    """Keys and values of one layer, (B, n_kv_heads, n_slots + 1, head_dim) each; the first update allocates them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.window: int | None = None
        self.keys = self.values = torch.empty(0)

    def update(self, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """Add k and v (B, n_kv_heads, T, head_dim), and return all that are in use, (B, n_kv_heads, S, head_dim)."""
        slots: Slots = mask.slots
        if not self.keys.numel():
            self.window = mask.window
            self.allocate(slots, k)
        rows, indices = slots.at
        if isinstance(indices, slice):
            self.keys[:, :, indices] = k
            self.values[:, :, indices] = v
        else:
            self.keys[rows, :, indices] = k.transpose(1, 2).to(self.dtype)
            self.values[rows, :, indices] = v.transpose(1, 2).to(self.dtype)
        return self.keys[:, :, : slots.used], self.values[:, :, : slots.used]

    def allocate(self, slots: Slots, like: Tensor) -> None:
        """Make room for `slots` of keys and values, of as many heads as `like` (B, n_kv_heads, T, head_dim) has."""
        (B, n_slots), (_, n_heads, _, head_dim) = slots.positions.shape, like.shape
        shape = (B, n_slots, n_heads, head_dim) if slots.static else (B, n_heads, n_slots, head_dim)
        # zeros: masked values must be finite
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=like.device) for _ in range(2))
        if slots.static:  # FlashAttention reads the heads of a slot side by side
            self.keys, self.values = self.keys.transpose(1, 2), self.values.transpose(1, 2)


class KVCache:
    """One `LayerCache` per layer, or a `StateCache` where a layer is recurrent, and one `Slots` per window size.

    Args:
        config: any family's `Config`, of which only n_layers is used.
        batch: number of sequences.
        capacity: positions per sequence, one number for all or one each. A forward beyond the largest is an error; memory is
            allocated for it, or for a window.
        chunk: maximum tokens of a sequence in one forward, if a window is shorter than `capacity`.
        static: every forward reads all slots, and nothing waits for the device; None: on a GPU.
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        capacity: int | list[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
        static: bool | None = None,
    ) -> None:
        self.layers = [LayerCache(dtype) for _ in range(config.n_layers)]
        self.states: dict[int, StateCache] = {}  # of recurrent layers
        self.batch, self.device, self.chunk = batch, torch.device(device), chunk
        capacities = [capacity] * batch if isinstance(capacity, int) else capacity
        self.capacity, self._on_host = max(capacities), capacities
        self.capacities = torch.tensor(capacities, device=device)[:, None]  # (B, 1)
        self.static = self.device.type == "cuda" if static is None else static
        self.length = 0  # of the longest sequence; if static and the caller gives positions, at most
        self.ragged = False  # whether sequences differ in length or have gaps: then every forward needs a mask
        self._slots: dict[int | None, Slots] = {}
        self._new = torch.empty(0)
        self._start: int | None = None

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def state(self, layer: int) -> StateCache:
        """Return the state cache of a recurrent layer."""
        return self.states.setdefault(layer, StateCache(self.static))

    def resume(self, length: int) -> int:
        """Return where a single sequence continues to keep its first `length` tokens: there, or before, if states demand it.

        What stands between is read again.
        """
        at = length
        while (first := min((state.resume(at) for state in self.states.values()), default=at)) < at:
            at = first
        return at

    def advance(self, positions: Tensor, start: int | None = None) -> None:
        """Announce new tokens at `positions` (B, T), increasing, below 0 for padding; once a forward, before its masks.

        Args:
            start: the first position, if all sequences begin there and the host knows it. Without it, a static cache cannot
                check that positions are below its capacity: the caller does.
        """
        T = positions.shape[1]
        if self.static:
            stop = T + (self.length if start is None else start)
            if start is not None and stop > self.capacity:
                raise ValueError(f"the cache holds {self.capacity} tokens, {stop} are needed")
            self.length = min(stop, self.capacity)
            self._new, self._start = positions, None
            for slots in self._slots.values():
                slots.at = ()
            return
        firsts, lasts = positions[:, [0, -1]].T.tolist()  # CPU-GPU sync point, only in generation
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
        """Return the slots of layers with this window, the new tokens included."""
        if window not in self._slots:
            n_slots = self.capacity if window is None else min(self.capacity, window + self.chunk - 1)
            empty = torch.full((self.batch, n_slots + 1), -1, device=self.device)
            self._slots[window] = Slots(empty, self.static)
        slots = self._slots[window]
        if slots.at:
            return slots
        n, T = slots.n_slots, self._new.shape[1]
        if n < self.capacity and self.chunk < T:
            raise ValueError(f"{T} tokens at once; this cache takes {self.chunk}")
        slots.used = n + 1 if self.static else max(1, min(self.length, n))
        if self._start is not None and self._start % n + T <= n:
            slots.at = slice(None), slice(self._start % n, self._start % n + T)
        else:
            rows = torch.arange(len(self._new), device=self.device)[:, None].expand_as(self._new)
            slots.at = rows, torch.where(self._new < 0, n, self._new % n)
        slots.positions[slots.at] = self._new.clamp(min=-1)
        return slots

    @staticmethod
    def gather(config: Any, rows: "list[tuple[KVCache, int, int]]") -> "KVCache":
        """Return a new cache of the given sequences, each as (cache, row of that cache, number of tokens to keep)."""
        capacities = [cache._on_host[row] for cache, row, _ in rows]
        first = max((cache for cache, _, _ in rows), key=lambda cache: len(cache._slots))  # one in use, if there is one
        new = KVCache(config, len(rows), capacities, first.layers[0].dtype, first.device, first.chunk, first.static)
        lengths = [length for _, _, length in rows]
        new.length = max(lengths)
        new.ragged = len(set(lengths)) > 1
        for n in {n for cache, _, _ in rows for n in cache.states}:
            new.states[n] = StateCache.gather([(cache.states.get(n), row) for cache, row, _ in rows], new.static)
        new._new = torch.tensor(lengths, device=first.device)[:, None] - 1
        for window in first._slots:
            slots, moves = new.slots(window), []
            slots.positions.fill_(-1)
            for i, (cache, row, length) in enumerate(rows):
                if not length:
                    continue
                positions = cache._slots[window].positions[row]  # (n_slots + 1,)
                old = ((positions >= max(0, length - slots.n_slots)) & (positions < length)).nonzero()[:, 0]
                moves.append((i, cache, row, old, positions[old] % slots.n_slots))
                slots.positions[i, moves[-1][-1]] = positions[old]
            for n, layer in enumerate(new.layers):
                source = first.layers[n]
                if source.window != window or not source.keys.numel():
                    continue
                layer.window = window
                layer.allocate(slots, source.keys)
                for i, cache, row, old, indices in moves:
                    layer.keys[i, :, indices] = cache.layers[n].keys[row, :, old]
                    layer.values[i, :, indices] = cache.layers[n].values[row, :, old]
        return new
