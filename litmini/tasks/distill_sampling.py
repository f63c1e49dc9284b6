"""The student's completions of a step of on-policy distillation, as micro-batches.

They are a pure function of the seed, the step and the weights, whatever the number of processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from litmini.config.distill import FinetuneDistillConfig
from litmini.data.distill import PromptSequences, plain
from litmini.data.prompts import completion_batch
from litmini.generation.rollouts import Rollout, completion_seed, sample
from litmini.ops.cross_entropy import original_head
from litmini.tokenizer import Tokenizer
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from litmini.tasks.setup import TrainingSetup


class StudentSampling:
    """Samples a completion to each prompt of a step with the model that is trained."""

    def __init__(self, config: FinetuneDistillConfig, tokenizer: Tokenizer, sequences: PromptSequences) -> None:
        self.config, self.tokenizer, self.sequences = config, tokenizer, sequences
        self.numbers: list[int] = []
        """Of the sequences of the last step, in the order of their rows."""
        self._setup: Any = None

    def begin(self, setup: TrainingSetup, objective: Any) -> None:
        """Take the model from now on, and the objective that reports what is sampled."""
        self._setup, self._objective = setup, objective
        setup.prefetch = False  # the completions of the next step come from its weights

    def is_due(self, step: int) -> bool:
        """Whether the batches of a step are the student's completions, as `distill.lmbda` of all steps are."""
        chance = np.random.default_rng((self.config.seed, step)).random()
        return self._setup is not None and chance < self.config.distill.lmbda

    def batches(self, step: int, numbers: range) -> list[Batch]:
        """Return this process's micro-batches of completions to the prompts of the sequences `numbers`, as many in each."""
        fabric, micro = self._setup.fabric, self.config.train.micro_batch_size
        rank, world = fabric.global_rank, fabric.world_size
        mine = list(numbers[rank::world])
        prompts = {n: self.sequences.prompt(self.sequences.sequence(n)[0]) for n in mine}
        rollouts = self._sample(step, prompts, mine)
        mine.sort(key=lambda n: (len(prompts[n]) + len(rollouts[n].ids), n))  # those of like lengths together
        self.numbers = mine
        self._objective.add_completions([rollouts[n] for n in mine])
        rows = [(prompts[n] + rollouts[n].ids, len(prompts[n])) for n in mine]
        count = -(-len(numbers) // (micro * world))
        return [plain(completion_batch(rows[i * micro : (i + 1) * micro] or [([], 0)])) for i in range(count)]

    def _sample(self, step: int, prompts: dict[int, list[int]], numbers: list[int]) -> dict[int, Rollout]:
        d, module = self.config.distill, self._setup.module
        training = module.training
        module.eval()
        with self._setup.fabric.autocast(), original_head(module):
            found = sample(
                module,
                [prompts[n] for n in numbers],
                [completion_seed(self.config.seed, step, n) for n in numbers],
                self.tokenizer.stop_ids,
                d.sampling_temperature,
                d.max_completion_length,
                d.sample_batch_size,
            )
        module.train(training)
        return dict(zip(numbers, found, strict=True))
