"""Keys and values of what a model has seen, so that each new token costs one position."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer: (B, n_kv_heads, capacity, head_dim), filled from the left."""

    def __init__(self, owner: "KVCache", shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.owner = owner
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, n_kv_heads, T, head_dim); returns all so far, (B, n_kv_heads, S, head_dim)."""
        start, stop = self.owner.length - k.shape[2], self.owner.length
        self.keys[:, :, start:stop] = k
        self.values[:, :, start:stop] = v
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """One `LayerCache` per layer, and the positions that their slots hold.

    Args:
        config: any family's `Config`: n_layers, n_kv_heads and head_dim are read.
        batch: rows.
        capacity: slots per row; a forward beyond it is an error.
    """

    def __init__(self, config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"):  # type: ignore[no-untyped-def]
        device = torch.device(device)
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        self.layers = [LayerCache(self, shape, dtype, device) for _ in range(config.n_layers)]
        self.positions = torch.full((batch, capacity), -1, device=device)  # (B, capacity)
        self.capacity = capacity
        self.length = 0  # slots in use, the same for every row
        self.padded = False  # whether some slot in use holds padding

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def advance(self, positions: Tensor) -> None:
        """Make room for new tokens at `positions` (B, T), below 0 for padding: once a forward, before its masks."""
        start, stop = self.length, self.length + positions.shape[1]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {stop} are needed")
        self.positions[:, start:stop] = positions
        self.padded = self.padded or bool((positions < 0).any())  # a sync point, only while generating
        self.length = stop
