"""What every training script does around the loop: from data and model to a `Setup`, and what is measured before and after."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from litmini.config.training import OptimConfig, RunConfig
from litmini.data.dataset import Example
from litmini.distributed.fsdp import is_sharded, local_bytes
from litmini.runs.directory import RunDirectory
from litmini.runs.run import Run
from litmini.tokenizer import Tokenizer
from litmini.training.flops import Throughput
from litmini.training.objective import Batch
from litmini.training.optimizer import make_optimizer
from litmini.training.setup import Progress, Setup

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Sequences(Protocol):
    """A data set as sequences of tokens, numbered through all epochs: `PackedDataset`, `TokenWindows`."""

    length: int
    """The longest sequence."""

    def __len__(self) -> int: ...

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Return a rank's share of the sequences `numbers` in micro-batches, as many on every rank."""
        ...

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return where the examples of these sequences come from."""
        ...

    def longest_batch(self, micro_batch: int) -> Batch | None:
        """Return the micro-batch that needs most memory; None where all sequences are of one length."""
        ...

    def lengths(self) -> np.ndarray | None:
        """Return the length of each example; None where the data are no examples."""
        ...


@dataclass(frozen=True)
class Data:
    """The sequences of a run, the tokenizer they were made with, and what is known of them."""

    tokenizer: Tokenizer
    train: Sequences
    val: Sequences | None
    val_examples: list[Example]
    """Validation examples as they were read, to be completed."""
    total_sequences: int
    """That the run trains on, over all epochs."""
    global_batch_size: int
    micro_batch_size: int
    statistics: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""
    hashes: dict[str, str] = field(default_factory=dict)
    """sha256 of each file that the sequences come from."""

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_sequences / self.global_batch_size)

    def _numbers(self, step: int) -> range:
        first = step * self.global_batch_size
        return range(first, min(first + self.global_batch_size, self.total_sequences))

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        return list(self.train.batches(self._numbers(step), self.micro_batch_size, rank, world))

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        return self.train.locations(self._numbers(step)[rank::world])

    def validation_batches(self, rank: int, world: int) -> Iterable[Batch] | None:
        return self.val.batches(range(len(self.val)), self.micro_batch_size, rank, world) if self.val else None


@dataclass
class TrainingSetup(Setup):
    """The setup of a training script: its data has a tokenizer, and its recorder is a directory."""

    data: Data
    recorder: Run

    @property
    def module(self) -> nn.Module:
        """The model as it was loaded, without Fabric's wrapper."""
        return self.model.module  # type: ignore[no-any-return]


def make_setup(
    directory: RunDirectory,
    fabric: Fabric,
    data: Data,
    model: nn.Module,
    save_weights: Callable[[Path | None], None],
    lr_ratios: dict[str, float] | None = None,
) -> TrainingSetup:
    """Shard the model, make its optimizer, restore the state that the run resumes from, and compile what is to be compiled.

    Args:
        model: with its method; every parameter that is trained requires a gradient.
        save_weights: writes the method's product into a directory. Every rank calls it, since gathering a sharded model takes
            them all; those other than 0 are given None.
        lr_ratios: parameter name -> its learning rate over `optim.lr`.

    Raises:
        UserError: the checkpoint does not fit, or base, template or data changed since the run began.
    """
    config = directory.config
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config.optim, lr_ratios or {}))
    run = Run(directory, fabric, model, optimizer, data.tokenizer, save_weights, data.hashes, data.statistics)
    trained, total = count_parameters(model)
    run.results["trained_parameters"] = trained
    fabric.print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%)")
    if is_sharded(model):
        local, every = (f"{size / 2**20:,.1f}" for size in local_bytes(model))
        fabric.print(f"{fabric.world_size} processes share the parameters: this one holds {local} of {every} MiB")
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    throughput = Throughput(model, fabric.device, dtype)
    fabric.print(f"MFU is of {throughput.peak / 1e12:,.2f} Tflop/s, {throughput.source}")
    worth = config.compile == "auto" and _worth_compiling(fabric, model, dtype, throughput.flops, data)
    if config.compile is True or worth:
        from litmini.training.compile import compile_training

        compile_training(model, dtype)
    if config.train.checkpoint_activations or config.train.offload_activations:
        from litmini.training.low_memory import checkpoint_activations, offload_activations

        if config.train.checkpoint_activations:
            checkpoint_activations(model)
        if config.train.offload_activations:
            offload_activations(model)
    setup = TrainingSetup(
        fabric, wrapped, optimizer, data, config.train, config.optim, config.seed, run.progress, run, throughput
    )
    setup.sample = functools.partial(log_samples, setup)
    return setup


def log_samples(setup: TrainingSetup, progress: Progress) -> None:
    """Completions of the first validation prompts into samples.jsonl. Every rank takes part, as a sharded model needs them."""
    from litmini.evaluation.metrics import predict

    config = setup.recorder.config.eval
    answers = predict(
        setup.module, setup.data.tokenizer, setup.data.val_examples[: config.samples], config.max_new_tokens
    )
    setup.recorder.log_samples(progress.step, [vars(answer) for answer in answers])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def _worth_compiling(
    fabric: Fabric, model: nn.Module, dtype: torch.dtype, flops: Callable[[list[Batch]], float], data: Data
) -> bool:
    """By all steps of the run, so that it decides the same when it is resumed."""
    from litmini.compiler import compilable
    from litmini.training.compile import is_worth_compiling

    planned = planned_flops(flops, data, fabric.world_size)
    worth = fabric.broadcast(compilable(model, dtype) and is_worth_compiling(planned, fabric.device))
    fabric.print(f"compile auto: {'on' if worth else 'off'}, for {planned:.1e} FLOPs in each process")
    return bool(worth)


def planned_flops(flops: Callable[[list[Batch]], float], data: Data, world: int) -> float:
    """FLOPs of a process of `world` in the whole run, by its share of the first step."""
    return flops(data.batches(0, 0, world)) * data.total_sequences / min(data.global_batch_size, data.total_sequences)


def ineffective_optim(config: OptimConfig, steps: int) -> dict[str, bool]:
    """Settings of the optimizer -> whether they have no effect in a run of `steps` steps."""
    plain = OptimConfig()
    return {
        "optim.betas": config.name == "sgd" and config.betas != plain.betas,
        "optim.decay_fraction": config.schedule != "wsd" and config.decay_fraction != plain.decay_fraction,
        "optim.min_lr": config.min_lr > config.lr,
        f"optim.warmup_steps beyond the {steps} steps of the run": config.warmup_steps >= steps,
    }


def ineffective_memory(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Settings that save memory -> whether they have no effect here."""
    return {
        "train.offload_activations": config.train.offload_activations and device.type == "cpu",
        "optim.offload": config.optim.offload and device.type == "cpu",
        "optim.stochastic_rounding": config.optim.stochastic_rounding and config.precision != "bf16-true",
    }


def warn(fabric: Fabric, ineffective: dict[str, bool]) -> None:
    """Print the settings that have no effect."""
    if found := [name for name, has_no_effect in ineffective.items() if has_no_effect]:
        fabric.print(f"warning: without effect, or not the one that one expects: {', '.join(found)}")
