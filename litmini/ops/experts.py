"""What all mixture-of-experts families use: the load-balancing loss, and the conversion of experts to groups and back.

Hugging Face's files hold each expert's weight as a tensor of its own; the model holds the experts of a layer as one tensor,
its grouped experts, (n_experts, out_features, in_features).
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Groups = dict[str, tuple[tuple[str, ...], tuple[int, int]]]
"""Grouped linear -> the linears that are stacked in it, and the shape of each."""


def balance_loss(routing: list[Tensor], n_active: int, real: Tensor) -> Tensor:
    """Return n_experts * the sum over experts of (fraction of tokens) * (mean probability), over all layers at once.

    It is n_active if all experts get the same number of tokens, and larger if they do not; only the probabilities have
    gradients (Switch Transformers, arXiv 2101.03961).

    Args:
        routing: each layer's router logits (B * T, n_experts).
        real: (B, T) bool, False for padding, which does not count.
    """
    counts = real.flatten()[:, None].float()  # (B * T, 1)
    tokens = torch.zeros(routing[0].shape[1], device=real.device)  # (n_experts,)
    probability = torch.zeros_like(tokens)
    for logits in routing:
        p = logits.softmax(-1, dtype=torch.float32)  # (B * T, n_experts)
        tokens = tokens + (torch.zeros_like(p).scatter(1, p.topk(n_active).indices, 1.0) * counts).sum(0)
        probability = probability + (p * counts).sum(0)
    rows = (len(routing) * counts.sum()).clamp(min=1)
    return len(tokens) * (tokens / rows * (probability / rows)).sum()


def aligned(tensor: Tensor) -> Tensor:
    """Return a weight at an address that no file decides: on a CPU, matmuls of grouped experts, or of a single row, round by
    the address."""
    return tensor if tensor.is_meta or tensor.data_ptr() % 64 == 0 else tensor.clone()


def group_experts(
    tensors: Iterable[tuple[str, Tensor]], module: str, groups: Groups, n_experts: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors with the experts of each layer grouped; only incomplete groups stay in memory.

    Tensors that do not fit, and incomplete groups, get a name that no model has: `load_model` reports it.

    Args:
        tensors: names and tensors, in any order.
        module: the name of the experts within a block: that of expert i is `{module}.{i}.{linear}.weight`.
    """
    group_of = {linear: group for group, (linears, _) in groups.items() for linear in linears}
    pattern = re.compile(rf"(.+\.{re.escape(module)})\.(\d+)\.({'|'.join(group_of)})\.weight")
    waiting: dict[str, dict[tuple[int, str], Tensor | None]] = {}  # grouped name -> {(expert, linear): its weight}
    for name, tensor in tensors:
        match = pattern.fullmatch(name)
        if not match or int(match[2]) >= n_experts or tensor.shape != groups[group_of[match[3]]][1]:
            yield name, tensor
            continue
        group = group_of[match[3]]
        grouped = f"{match[1]}.{group}.weight"
        parts = waiting.setdefault(
            grouped, {(i, linear): None for i in range(n_experts) for linear in groups[group][0]}
        )
        parts[int(match[2]), match[3]] = tensor
        existing = [part for part in parts.values() if part is not None]
        if len(existing) == len(parts):
            del waiting[grouped]
            parts.clear()
            tensor = torch.cat(existing).unflatten(0, (n_experts, -1))  # (n_experts, out_features, in_features)
            existing.clear()
            yield grouped, tensor
    for grouped, parts in waiting.items():
        missing = [f"{i}.{linear}" for (i, linear), part in parts.items() if part is None]
        yield f"{grouped} without {', '.join(missing[:5])}", torch.empty(0)


def split_experts(tensors: Iterable[tuple[str, Tensor]], groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors with grouped experts split into single ones, as views: the inverse of `group_experts`."""
    for name, tensor in tensors:
        head, *last = name.rsplit(".", 2)
        if len(last) < 2 or last[0] not in groups or last[1] != "weight" or tensor.dim() < 3:  # of an MLP beside them
            yield name, tensor
            continue
        linears, (out_features, _) = groups[last[0]]
        for i, expert in enumerate(tensor):
            for linear, weight in zip(linears, expert.split(out_features), strict=True):
                yield f"{head}.{i}.{linear}.weight", weight
