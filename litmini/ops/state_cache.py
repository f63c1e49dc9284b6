"""The state cache of a recurrent layer: what it knows of the tokens so far, of a size that does not grow with them.

A state cannot be cut as keys and values can: to drop its last tokens, a sequence continues from where the last forward
began, or from its first token. Anything else is refused.
"""

import torch
from torch import Tensor


class StateCache:
    """Tensors (B, ...) of one layer after the tokens so far, and as they were before the last forward.

    Where it continues, each sequence says with the position of its first new token: after all tokens, or where the last
    forward began, or at 0, where states are 0.

    Args:
        static: tensors keep their places, as a CUDA graph needs them, and the host never waits for positions. A sequence that
            continues elsewhere then gets NaN.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.now: list[Tensor] = []
        self.before: list[Tensor] = []
        self.counts = torch.empty(0)
        """(2, B) int64: the tokens in `now` and in `before`."""

    def read(self, positions: Tensor, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Return the tensors before the tokens at `positions` (B, T), below 0 for padding, which stands on the left.

        Args:
            shapes: of one sequence, and dtypes, for the first forward.

        Raises:
            ValueError: a sequence continues where no state is known.
        """
        B = len(positions)
        if not self.now:
            self.now, self.before = (
                [torch.zeros(B, *shape, dtype=dtype, device=positions.device) for shape, dtype in shapes] for _ in "ab"
            )
            self.counts = torch.zeros(2, B, dtype=torch.int64, device=positions.device)
        n_new = (positions >= 0).sum(1)  # (B,)
        starts = torch.where(n_new > 0, positions[:, -1] + 1 - n_new, self.counts[0])
        is_now, is_before, is_new = self.counts[0] == starts, self.counts[1] == starts, starts == 0
        if not self.static and not bool((is_now | is_before | is_new).all()):  # CPU-GPU sync point, only in generation
            raise ValueError(f"states of {self.counts.tolist()} tokens cannot continue at {starts.tolist()}")
        found = []
        for now, before in zip(self.now, self.before, strict=True):
            at = (slice(None), *[None] * (now.dim() - 1))
            other = torch.where(is_before[at], before, torch.full_like(now, float("nan")))
            found.append(torch.where(is_new[at], torch.zeros_like(now), torch.where(is_now[at], now, other)))
        self._starts, self._stops = starts, starts + n_new
        return found

    def write(self, old: list[Tensor], new: list[Tensor]) -> None:
        """Keep what `read` returned, and what it has become."""
        counts = torch.stack((self._stops, self._starts))
        if not self.static:
            self.now, self.before, self.counts = new, old, counts
            return
        for targets, values in ((self.before, old), (self.now, new), ([self.counts], [counts])):
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

    def resume(self, length: int) -> int:
        """Return the last position, at most `length`, from which a single sequence can continue."""
        known = self.counts[:, 0].tolist() if self.now else []  # CPU-GPU sync point, only with drafts
        return max((count for count in known if count <= length), default=0)

    @staticmethod
    def gather(rows: "list[tuple[StateCache | None, int]]", static: bool) -> "StateCache":
        """Return a new cache of the given sequences, each as (cache, row of that cache); None: it has no tokens."""
        new = StateCache(static)
        first = next((cache for cache, _ in rows if cache is not None and cache.now), None)
        if first is None:
            return new

        def stack(select: str) -> list[Tensor]:
            parts = [getattr(cache, select) if cache is not None else [] for cache, _ in rows]
            zeros = [torch.zeros_like(like[0]) for like in first.now]
            return [
                torch.stack([part[i][row] if part else zero for part, (_, row) in zip(parts, rows, strict=True)])
                for i, zero in enumerate(zeros)
            ]

        new.now, new.before = stack("now"), stack("before")
        none = torch.zeros_like(first.counts[:, 0])
        counts = [cache.counts[:, row] if cache is not None and cache.now else none for cache, row in rows]
        new.counts = torch.stack(counts, 1)
        return new
