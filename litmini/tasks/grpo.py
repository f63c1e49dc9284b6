"""Policy optimization on sampled completions: its data, and the plan of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from litmini.config.grpo import FinetuneGrpoConfig, GrpoDataConfig
from litmini.data.formats import Example
from litmini.data.prompts import Prompt, Prompts, load_prompts
from litmini.errors import counted
from litmini.tasks.grpo_rewards import load_rewards
from litmini.tasks.grpo_sampling import Sampling
from litmini.tasks.grpo_server import check_server
from litmini.tasks.plan import EXAMPLES, open_base
from litmini.tasks.setup import Data, ineffective_memory, ineffective_optim, warn
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, kw_only=True)
class GrpoData(Data):
    """The prompts of a run; `sampling` makes batches of them."""

    sampling: Sampling
    prompts: Prompts
    """Those of training."""
    val_prompts: Prompts | None

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        if not self.sampling.is_ready:  # before there is a model: as large as they may become
            return list(self.prompts.batches(self._numbers(step), self.micro_batch_size, rank, world))
        return self.sampling.batches(step)

    def validation_batches(self, rank: int, world: int) -> Iterator[Batch] | None:
        return None if self.val_prompts is None else self.sampling.validation_batches(self.val_prompts)

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        return self.sampling.locations


def prepare_data(fabric: Fabric, config: FinetuneGrpoConfig, began: datetime | None = None) -> GrpoData:
    """Download the checkpoint if it is missing, read prompts and rewards, and plan the run.

    Raises:
        UserError: prompts, or a reward, cannot be read, or a sampling server does not answer.
    """
    tokenizer, _ = open_base(fabric, config, began)
    if not (config.dry_run or config.show_masks):
        check_server(config)
    device = "cpu" if fabric.device.type == "cpu" else str(fabric.device)
    rewards, hashes = load_rewards(config.rewards, device, config.judge)
    train, val = load_prompts(config.data, tokenizer, config.grpo.max_completion_length, config.seed)
    group, devices = config.grpo.num_generations, config.devices * config.num_nodes
    if config.train.global_batch_size is None:
        config.train.global_batch_size = EXAMPLES * group * devices
    batch = config.train.global_batch_size
    config.train.micro_batch_size = min(config.train.micro_batch_size, batch)
    again = config.grpo.num_iterations
    steps = config.train.max_steps or math.ceil(len(train) * config.train.epochs / (batch // group)) * again
    _warn(fabric, config, val, steps)
    fabric.print(train.describe("training"))
    if val:
        fabric.print(val.describe("validation"))
    each = f"{counted(batch // group, 'prompt')} with {group} completions each"
    on_same = f", {again} steps on the same completions" * (again > 1)
    fabric.print(
        f"{counted(steps, 'step')} of {each}{on_same}: {steps * batch / again / group / len(train):.2f} epochs"
    )
    examples = [_example(prompt, config) for prompt in val.prompts] if val else []
    statistics = {"statistics": train.statistics, "validation_statistics": val.statistics if val else None}
    hashes = {**train.files, **(val.files if val else {}), **hashes}
    return GrpoData(
        tokenizer, train, val, examples, steps * batch, batch, config.train.micro_batch_size, statistics, hashes,
        sampling=Sampling(config, tokenizer, train, rewards), prompts=train, val_prompts=val,
    )  # fmt: skip


def _warn(fabric: Fabric, config: FinetuneGrpoConfig, val: Prompts | None, steps: int) -> None:
    """Print the settings without an effect."""
    plain = {f.name: f.default for f in dataclasses.fields(GrpoDataConfig)}
    unused = {f"data.{name}": getattr(config.data, name) != plain[name] for name in ("train_on", "pack", "weights")}
    unused["lora.dropout, which is off"] = config.lora is not None and config.lora.dropout > 0
    unused["train.eval_every"] = config.train.eval_every is not None and not val
    unused["train.patience"] = config.train.patience is not None and not (val and config.train.eval_every)
    memory = ineffective_memory(config, fabric.device)
    warn(fabric, unused | config.grpo.ineffective() | ineffective_optim(config.optim, steps) | memory)


def _example(prompt: Prompt, config: FinetuneGrpoConfig) -> Example:
    """Return a prompt with the right answer, if it has one, as an example to complete."""
    reference = str(prompt.record.get(config.rewards.answer) or "(none)")
    if isinstance(prompt.prompt, str):
        return Example(prompt.where, prompt=prompt.prompt, text=prompt.prompt + reference)
    return Example(prompt.where, [*prompt.prompt, {"role": "assistant", "content": reference}])
