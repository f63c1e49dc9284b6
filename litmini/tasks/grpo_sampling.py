"""The completions of a step: sampled, scored, compared, and made into micro-batches.

They are a pure function of the seed, the step and the weights, whatever the number of processes: each group is sampled by one
of them, each completion with a seed of its own. Of steps on the same completions, a checkpoint has the completions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from litmini.config.grpo import FinetuneGrpoConfig
from litmini.data.prompts import Prompt, Prompts
from litmini.distributed.host_arrays import gather_on_host, sum_array_on_host
from litmini.errors import UserError
from litmini.files import write_text
from litmini.generation.rollouts import Rollout, completion_seed, sample
from litmini.methods.reference import at_start
from litmini.ops.cross_entropy import original_head
from litmini.tasks.grpo_completions import Completion, learning_batches, micro_batches, n_groups
from litmini.tasks.grpo_losses import advantages, equal_groups, nanstd
from litmini.tasks.grpo_rewards import Rewards, kept_output
from litmini.tasks.grpo_server import SamplingServer, importance_weights
from litmini.tasks.preference import INPUTS
from litmini.tokenizer import Tokenizer
from litmini.training.display import say
from litmini.training.objective import Batch
from litmini.training.setup import on_device

if TYPE_CHECKING:
    from litmini.tasks.setup import TrainingSetup

ROLLOUTS = "rollouts.json"


class Sampling:
    """Samples the completions of each step with the model that is trained."""

    def __init__(self, config: FinetuneGrpoConfig, tokenizer: Tokenizer, prompts: Prompts, rewards: Rewards) -> None:
        self.config, self.tokenizer, self.prompts, self.rewards = config, tokenizer, prompts, rewards
        self.completions: list[Completion] = []  # of this process
        self.locations: list[list[str]] = []  # of each row of the last micro-batches
        self._first = -1  # the step that they were sampled in
        self._batches: list[Batch] = []
        self._setup: Any = None
        self._server: SamplingServer | None = None
        self._warned: set[str] = set()

    @property
    def is_ready(self) -> bool:
        """Whether there is a model to sample with."""
        return self._setup is not None

    def begin(self, setup: TrainingSetup, objective: Any) -> None:
        """Take the model from now on, and the objective that reports what is sampled."""
        self._setup, self._objective, self._fabric = setup, objective, setup.fabric
        setup.prefetch = False  # the completions of the next step come from its weights
        if self.config.sampler.base_url is not None:
            model: Any = setup.module
            self._server = SamplingServer(self.config, setup.recorder.directory, model.config.vocab_size)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of this process in an optimizer step; as many in each process."""
        first = step - step % self.config.grpo.num_iterations
        if self._first != first:
            self.completions = self._sample(step) if step == first else self._read(first)
            learned = [completion for completion in self.completions if completion.kept]
            found = list(learning_batches(learned, self.config, self._fabric.world_size))
            self._batches, self._first = [batch for _, batch in found], first
            self.locations = [
                place for rows, _ in found for place in [[row.where] for row in rows] or [[]]
            ]  # padding: none
        return self._batches

    # Sampling

    def _sample(self, step: int) -> list[Completion]:
        """Return the completions of this process in `step`, with advantages."""
        grpo, fabric = self.config.grpo, self._fabric
        n, groups = grpo.num_generations, n_groups(self.config)
        first = step // grpo.num_iterations * groups
        mine = range(fabric.global_rank, groups, fabric.world_size)
        if self._server:
            self._server.update(fabric, self._setup.module, step)
        completions = self._completions({g: self.prompts.prompt(first + g) for g in mine}, n, step)
        if grpo.num_iterations > 1 or grpo.beta or self._server:
            self._add_log_probs(completions)
        if self._server:
            for one in completions:
                one.weights = importance_weights(one.old, one.log_probs, self.config)
        if grpo.beta and grpo.loss_type == "rloo":
            for completion in completions:
                completion.reward -= grpo.beta * (sum(completion.old) - sum(completion.reference))
        everyone = np.zeros(groups * n)
        everyone[[completion.slot for completion in completions]] = [completion.reward for completion in completions]
        rewards = torch.from_numpy(sum_array_on_host(fabric, everyone)).view(groups, n)
        self._compare(completions, rewards)
        self._report(completions, rewards, list(mine), step)
        return completions

    def _completions(
        self, prompts: dict[int, Prompt], n: int, step: int, temperature: float | None = None
    ) -> list[Completion]:
        """Return n completions to each of this process's prompts.

        Args:
            prompts: number in the step -> prompt.
            temperature: None: that of training.
        """
        grpo = self.config.grpo
        slots = [number * n + i for number in prompts for i in range(n)]
        asked = (
            [prompts[slot // n].ids for slot in slots],
            [completion_seed(self.config.seed, step, slot) for slot in slots],
            self.tokenizer.stop_ids,
            grpo.temperature if temperature is None else temperature,
        )
        rollouts = self._server.sample(*asked) if self._server else self._sample_here(*asked)
        texts = [self.tokenizer.decode(rollout.ids) for rollout in rollouts]
        rank = self._fabric.global_rank
        log = self._setup.recorder.directory / ("rewards.log" if not rank else f"rewards-rank-{rank}.log")
        with kept_output(self.rewards, log):
            given = [(prompts[slot // n], text) for slot, text in zip(slots, texts, strict=True)]
            rewards = self.rewards.score(given)
        self._say_failures()
        return [
            Completion(
                slot, prompt.where, prompt.ids, rollout.ids, rollout.log_probs, rollout.truncated, text, each,
                self.rewards.total(each),
            )
            for slot, rollout, (prompt, text), each in zip(slots, rollouts, given, rewards, strict=True)
        ]  # fmt: skip

    def _sample_here(
        self, prompts: list[list[int]], seeds: list[int], stop_ids: list[int], temperature: float
    ) -> list[Rollout]:
        grpo, module = self.config.grpo, self._setup.module
        training = module.training
        module.eval()
        with self._fabric.autocast(), original_head(module):
            found = sample(
                module, prompts, seeds, stop_ids, temperature, grpo.max_completion_length, grpo.sample_batch_size
            )
        module.train(training)
        return found

    def _compare(self, completions: list[Completion], rewards: Tensor) -> None:
        """Give completions their advantages, and leave out those without a reward or, if asked for, of equal groups.

        Args:
            rewards: (groups, n) fp64, of all processes.
        """
        grpo = self.config.grpo
        if rewards.isnan().all():
            first = next((first for _, first in self.rewards.failures.values()), "")
            raise UserError(
                f"no completion of this step has a reward{f': {first}' if first else ''}. Correct the reward, and continue "
                f"with --resume auto."
            )
        values = advantages(rewards.float(), grpo).flatten()
        equal = equal_groups(rewards).repeat_interleave(grpo.num_generations)
        for completion in completions:
            completion.advantage = float(values[completion.slot])
            completion.kept = not math.isnan(completion.reward) and not (
                grpo.dynamic_sampling and bool(equal[completion.slot])
            )
        if bool(equal.all()):
            self._say_once(
                "equal",
                f"warning: the completions to each prompt of this step have equal rewards (mean {rewards.nanmean():.3g}): "
                f"there is nothing to learn from. The column equal_groups of metrics.csv is the share of such groups. "
                f"Begin with a model that gets some rewards, by a short finetuning, say; or take rewards with more steps.",
            )

    # Log-probabilities

    def _add_log_probs(self, completions: list[Completion]) -> None:
        """Give completions their log-probabilities under the model as it is and, with beta, as it was at the start."""
        grpo, setup = self.config.grpo, self._setup
        training = setup.model.training
        setup.model.train()  # as in the loss; dropout is off
        for rows, batch in micro_batches(completions, self.config, self._fabric.world_size):
            ready = on_device(batch, self._fabric.device, setup.attention)
            inputs = {name: ready[name] for name in INPUTS}
            with torch.no_grad():
                both = [("old", setup.model(**inputs)[0].cpu())]  # CPU-GPU sync point
                if grpo.beta:
                    with at_start(setup.module):
                        both.append(("reference", setup.model(**inputs)[0].cpu()))
            for name, found in both:
                for row, completion in enumerate(rows):
                    first = len(completion.prompt_ids) - 1
                    setattr(completion, name, found[row, first : first + len(completion.ids)].tolist())
        setup.model.train(training)

    # Validation

    @torch.no_grad()
    def validation_batches(self, val: Prompts) -> Iterator[Batch]:
        """Yield the rewards of a greedy completion to each validation prompt of this process."""
        rank, world = self._fabric.global_rank, self._fabric.world_size
        size = self.config.grpo.sample_batch_size * world
        if self._server:
            self._server.update(self._fabric, self._setup.module, self._setup.progress.step)
        for start in range(0, len(val), size):
            mine = range(start, min(start + size, len(val)))[rank::world]
            completions = self._completions({i: val.prompts[i] for i in mine}, 1, 0, temperature=0.0)
            self._objective.add_completions(completions, 0, 0, [])
            rewards = torch.tensor([completion.reward for completion in completions])
            yield {"tokens": torch.zeros(len(completions), 1, dtype=torch.int64), "rewards": rewards}

    # Reports

    def _report(self, completions: list[Completion], rewards: Tensor, mine: list[int], step: int) -> None:
        equal, stds = equal_groups(rewards)[mine], nanstd(rewards)[mine].flatten()
        self._objective.add_completions(completions, len(mine), int(equal.sum()), stds[stds.isfinite()].tolist())
        if self._fabric.is_global_zero and completions:
            group = [a for a in completions if a.slot < self.config.grpo.num_generations and not math.isnan(a.reward)]
            ranked = sorted(group, key=lambda completion: (completion.reward, completion.slot))
            shown = [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked
            number = step // self.config.grpo.num_iterations * n_groups(self.config)
            prompt = self.prompts.prompt(number)
            reference = str(prompt.record.get(self.config.rewards.answer, ""))
            rows = [
                {"prompt": prompt.text, "reference": reference, "prediction": a.text, "reward": a.reward,
                 "advantage": a.advantage, **dict(zip(self.rewards.names, a.rewards, strict=True))}
                for a in shown
            ]  # fmt: skip
            self._setup.recorder.log_samples(step + 1, rows)

    def _say_failures(self) -> None:
        for name, (_, first) in self.rewards.failures.items():
            self._say_once(name, f"warning: a reward failed, and its completion is left out (the first time): {first}")

    def _say_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            say(self._fabric, text)

    # State

    def save(self, directory: Path | None) -> None:
        """Write the completions of all processes into a checkpoint, if there are still steps on them. Every rank calls this.

        Args:
            directory: of rank 0; the other ranks pass None.
        """
        progress = self._setup.progress
        if progress.step % self.config.grpo.num_iterations == 0 or progress.step == self._setup.data.total_steps:
            return
        parts = gather_on_host(
            self._fabric, json.dumps([dataclasses.asdict(completion) for completion in self.completions])
        )
        if directory is not None:
            write_text(directory / ROLLOUTS, json.dumps({"first": self._first, "completions": parts}))

    def _read(self, first: int) -> list[Completion]:
        """Return the completions of this process from the checkpoint that the run resumes from."""
        checkpoint = self._setup.recorder.run_directory.restart_from
        file = checkpoint / ROLLOUTS if checkpoint else None
        if file is None or not file.is_file():
            raise UserError(f"{checkpoint} has no {ROLLOUTS}, the completions of the steps from {first + 1} on.")
        found = json.loads(file.read_text(encoding="utf-8"))
        completions = [Completion(**one) for part in found["completions"] for one in json.loads(part)]
        group, fabric = self.config.grpo.num_generations, self._fabric
        mine = [a for a in completions if a.slot // group % fabric.world_size == fabric.global_rank]
        assert found["first"] == first, (found["first"], first)
        return mine
