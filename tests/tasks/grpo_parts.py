"""Completions of a tiny model, and what it makes of them: for the tests of policy optimization."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from preference_parts import policy

from litmini.config.grpo import GrpoConfig
from litmini.data.prompts import completion_batch
from litmini.methods.heads import use_log_probs
from litmini.ops.cross_entropy import IGNORE, original_head
from litmini.tasks.grpo_objective import PolicyOptimization

GROUPS, N = 3, 4  # prompts, and completions to each


def completions(vocab: int = 512) -> list[dict[str, Any]]:
    """Prompts and completions of ragged lengths, one to nine tokens, with rewards; those of the last group are equal."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for group in range(GROUPS):
        prompt = torch.randint(3, vocab, (4 + 3 * group,), generator=generator).tolist()
        for i in range(N):
            size = 1 + (5 * i + 2 * group) % 9
            ids = torch.randint(3, vocab, (size,), generator=generator).tolist()
            reward = float(torch.rand((), generator=generator)) if group < GROUPS - 1 else 0.5
            found.append({"prompt": prompt, "ids": ids, "reward": reward, "truncated": i == 2})
    return found


def model_of(base: Path, temperature: float = 1.0, seed: int = 1) -> Any:
    """A model in fp32 whose weights are not those of `base` any more, with the head of a temperature."""
    model = policy(base, seed)
    with original_head(model):
        pass
    model.lm_head = model.lm_head.original
    use_log_probs(model, temperature=temperature)
    return model


def batch_of(
    rows: list[dict[str, Any]], config: GrpoConfig, advantages: torch.Tensor, **more: list[list[float]]
) -> Any:
    """A micro-batch of completions; `more` are log-probabilities of each token of each completion."""
    batch = completion_batch([(row["prompt"] + row["ids"], len(row["prompt"])) for row in rows])
    batch["advantages"] = advantages.float()
    for name, values in more.items():
        batch[name] = torch.zeros(batch["tokens"].shape)
        for i, (row, each) in enumerate(zip(rows, values, strict=True)):
            first = len(row["prompt"]) - 1
            batch[name][i, first : first + len(each)] = torch.tensor(each)
    if config.mask_truncated:
        batch["labels"][[i for i, row in enumerate(rows) if row["truncated"]]] = IGNORE
    return batch


def step(config: GrpoConfig, model: Any, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and metrics of an optimizer step, as the loop computes them."""
    objective = PolicyOptimization(config, model, ("reward",))
    units = sum(map(objective.count, batches))
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective.loss(model, batch)
        (loss / units).backward()
        total += float(loss.detach())
    with original_head(model):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total / units, gradients, objective.metrics(objective.take_sums().tolist())


def log_probs_of(model: Any, rows: list[dict[str, Any]]) -> list[list[float]]:
    """The log-probability of each token of each completion, each completion by itself."""
    found = []
    for row in rows:
        batch = completion_batch([(row["prompt"] + row["ids"], len(row["prompt"]))])
        with torch.no_grad():
            values, _ = model(**{name: batch[name] for name in ("tokens", "positions", "documents", "labels")})
        found.append(values[0, len(row["prompt"]) - 1 :].tolist())
    return found


def prompts_file(file: Path, count: int = 12, first: int = 0) -> Path:
    rows = [{"prompt": f"What is {i} plus {i % 7}?", "answer": str(i + i % 7)} for i in range(first, first + count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trainer(theirs: Any, model: Any, **settings: Any) -> Any:
    """What TRL's `_compute_loss` of GRPO and RLOO asks of `self`: one process, metrics in lists."""
    import collections

    same = {name: (lambda x, **_: x) for name in ("gather", "gather_for_metrics", "reduce", "unwrap_model")}
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, **same)
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    found = SimpleNamespace(accelerator=accelerator, _metrics=metrics, args=args, model=model)
    plain = {"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    plain |= {"use_vllm": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1}
    vars(found).update(plain | settings)
    return found
