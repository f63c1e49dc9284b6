"""Sampled completions, and the micro-batches that are made of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litmini.config.grpo import FinetuneGrpoConfig
from litmini.data.prompts import completion_batch
from litmini.ops.cross_entropy import IGNORE
from litmini.training.objective import Batch


@dataclass
class Completion:
    """A completion with its rewards."""

    slot: int
    """Number among all completions of a step; those of a group follow each other."""
    where: str
    """file:line of its prompt."""
    prompt_ids: list[int]
    ids: list[int]
    """Token ids of the completion, its end token included."""
    log_probs: list[float]
    """Of these, as they were sampled."""
    truncated: bool
    text: str
    rewards: list[float | None]
    """Of each function: None where it does not apply, NaN where it failed."""
    reward: float
    """Their weighted sum; NaN: it is left out."""
    advantage: float = 0.0
    kept: bool = True
    """Whether it is learned from."""
    old: list[float] = field(default_factory=list)
    """Log-probabilities under the model that sampled it, as the trainer computes them; of several steps on it."""
    reference: list[float] = field(default_factory=list)
    """The same under the model at the start, if the loss needs them."""
    weights: list[float] = field(default_factory=list)
    """Importance weights of its tokens, if a server sampled them."""


def n_groups(config: FinetuneGrpoConfig) -> int:
    """Return the prompts in an optimizer step."""
    assert config.train.global_batch_size is not None
    return config.train.global_batch_size // config.grpo.num_generations


def micro_batches(
    completions: list[Completion], config: FinetuneGrpoConfig, world: int
) -> Iterator[tuple[list[Completion], Batch]]:
    """Yield the completions of each micro-batch of a process, those of like lengths together, and its batch; equally many."""
    micro = config.train.micro_batch_size
    most = -(-n_groups(config) // world) * config.grpo.num_generations  # completions of a process
    ordered = sorted(
        completions, key=lambda completion: (len(completion.prompt_ids) + len(completion.ids), completion.slot)
    )
    for start in range(0, most, micro):
        rows = ordered[start : start + micro]
        yield rows, completion_batch([(row.prompt_ids + row.ids, len(row.prompt_ids)) for row in rows] or [([], 0)])


def learning_batches(
    completions: list[Completion], config: FinetuneGrpoConfig, world: int
) -> Iterator[tuple[list[Completion], Batch]]:
    """Yield the same with what the loss needs: advantages, and log-probabilities of several models."""
    grpo = config.grpo
    needed = {"sampled": True, "old": grpo.num_iterations > 1, "reference": grpo.beta > 0 and grpo.loss_type != "rloo"}
    needed["weights"] = config.sampler.base_url is not None
    for rows, batch in micro_batches(completions, config, world):
        batch["advantages"] = torch.tensor([row.advantage for row in rows] or [0.0])
        firsts = [len(row.prompt_ids) - 1 for row in rows]
        for name in (name for name, is_needed in needed.items() if is_needed):
            values = [row.log_probs if name == "sampled" else getattr(row, name) for row in rows]
            batch[name] = _at(values, firsts, batch["tokens"].shape)
        if grpo.mask_truncated:
            batch["labels"][[i for i, row in enumerate(rows) if row.truncated]] = IGNORE
        yield rows, batch


def _at(values: list[list[float]], firsts: list[int], shape: torch.Size) -> Tensor:
    """Return values from a position on in each row of zeros, fp32."""
    found = torch.zeros(shape)
    for row, (each, first) in enumerate(zip(values, firsts, strict=True)):
        found[row, first : first + len(each)] = torch.tensor(each)
    return found
