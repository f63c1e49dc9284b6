"""Names and row orders that differ between layouts of one architecture, for every importer."""

import re

from torch import Tensor


def pattern(name: str) -> str:
    """A tensor's module with * for numbers: `blk.3.attn_q.weight` -> `blk.*.attn_q`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])


def rename(name: str, names: dict[str, str]) -> str:
    """A tensor's new name, by a table of patterns, of a module or of a whole name; the old one if no pattern is its own."""
    end = name.rpartition(".")[2]
    whole = names.get(f"{pattern(name)}.{end}")
    new = names.get(pattern(name)) if whole is None else whole
    if new is None:
        return name
    for number in re.findall(r"\.(\d+)(?=\.)", name):
        new = new.replace("*", number, 1)
    return f"{new}.{end}" if whole is None else new


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads * head_dim, ...), from interleaved rotary pairs (Meta, llama.cpp) to Hugging Face's halves."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)
