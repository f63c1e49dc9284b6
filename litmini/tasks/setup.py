"""From data and model to a `Setup`, for all training scripts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from litmini.config.training import OptimConfig, RunConfig
from litmini.data.dataset import Example
from litmini.distributed.fabric import compute_dtype
from litmini.distributed.fsdp import is_sharded, local_bytes
from litmini.errors import UserError, counted
from litmini.methods.adapters import experts_left_out, keep_casts
from litmini.ops.attention import record_kernels
from litmini.ops.cross_entropy import original_head
from litmini.runs.directory import RunDirectory
from litmini.runs.run import Run
from litmini.tokenizer import Tokenizer
from litmini.training.display import say
from litmini.training.flops import Throughput
from litmini.training.objective import Batch
from litmini.training.optimizer import make_optimizer
from litmini.training.setup import Progress, Setup, SizedBatches, on_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Sequences(Protocol):
    """A data set of token sequences, numbered through all epochs: `PackedDataset`, `TokenWindows`."""

    length: int
    """Maximum tokens of a sequence."""

    def __len__(self) -> int: ...

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield a rank's part of the sequences `numbers` in micro-batches; their number is the same on every rank."""
        ...

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return the locations of the examples of each of these sequences."""
        ...

    def longest_batch(self, micro_batch: int) -> Batch | None:
        """Return the micro-batch that needs most memory; None if all sequences have the same length."""
        ...

    def lengths(self) -> np.ndarray | None:
        """Return the length of each example; None if the data are not examples."""
        ...


@dataclass(frozen=True)
class Data:
    """The sequences of a run, their tokenizer, and their statistics."""

    tokenizer: Tokenizer
    train: Sequences
    val: Sequences | None
    val_examples: list[Example]
    """Validation examples as they were read, for completions."""
    total_sequences: int
    """Sequences that the run trains on, over all epochs."""
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
        if self.val is None:
            return None
        count = math.ceil(len(self.val) / (self.micro_batch_size * world))
        return SizedBatches(self.val.batches(range(len(self.val)), self.micro_batch_size, rank, world), count)


@dataclass
class TrainingSetup(Setup):
    """The setup of a training script: its data has a tokenizer, and its recorder writes a directory."""

    data: Data
    recorder: Run

    @property
    def module(self) -> nn.Module:
        """The model without Fabric's wrapper."""
        return self.model.module  # type: ignore[no-any-return]

    def predict(self, examples: list[Example]) -> list[Any]:
        """Return greedy completions of the last turn of examples. Every rank calls this, for sharded models."""
        from litmini.evaluation.metrics import predict

        # what is gathered in bf16 needs autocast; elsewhere completions are those of the weights as they are
        precision = self.fabric.autocast() if is_sharded(self.module) else nullcontext()
        with precision, original_head(self.module):
            return predict(self.module, self.data.tokenizer, examples, self.recorder.config.eval.max_new_tokens)


def make_setup(
    directory: RunDirectory,
    fabric: Fabric,
    data: Data,
    model: nn.Module,
    save_weights: Callable[[Path | None], None],
    lr_ratios: dict[str, float] | None = None,
    names: Sequence[str] = (),
    before: Callable[[nn.Module], None] | None = None,
) -> TrainingSetup:
    """Shard the model, make its optimizer, restore the state that the run resumes from, and compile the model if requested.

    Args:
        model: with its method; trained parameters require gradients.
        save_weights: writes the result of training into a directory. Every rank calls it, to gather a sharded model; ranks
            other than 0 pass None.
        lr_ratios: parameter name -> its learning rate divided by `optim.lr`.
        names: of the objective's metrics.
        before: called with the model as the run began with it, sharded, before the state to resume from is restored.

    Raises:
        UserError: the checkpoint does not fit, or base, template or data changed since the run began.
    """
    config = directory.config
    new, rows = data.tokenizer.new_tokens, int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    if new and max(new.ids) >= rows:
        raise UserError("data.new_tokens is not implemented here: give the checkpoint of scripts/extend_vocabulary.py.")
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config.optim, lr_ratios or {}))
    if before is not None:
        before(wrapped)
    run = Run(directory, fabric, model, optimizer, data.tokenizer, save_weights, data.hashes, data.statistics, names)
    trained, total = count_parameters(model)
    run.results["trained_parameters"] = trained
    fabric.print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%)")
    if left_out := experts_left_out(model):
        fabric.print(left_out)
    if not is_sharded(model):
        keep_casts(model, optimizer.optimizer)
    else:
        local, every = (f"{size / 2**20:,.1f}" for size in local_bytes(model))
        fabric.print(
            f"parameters are sharded over {fabric.world_size} processes: this one holds {local} of {every} MiB"
        )
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    throughput = Throughput(model, fabric.device, dtype)
    fabric.print(f"MFU is relative to {throughput.peak / 1e12:,.2f} TFLOP/s, {throughput.source}")
    attention = None if config.attention == "auto" else config.attention
    newer = None
    if fabric.device.type == "cuda" and attention is None:
        from litmini.ops.varlen import activate_newer

        newer = activate_newer(fabric.device)
    run.results["attention"] = attention_kernels(wrapped, fabric.device, attention) + (f" ({newer})" if newer else "")
    fabric.print(f"attention: {run.results['attention']}")
    matmuls = compute_dtype(config.precision)
    worth = is_auto(config.compile, fabric.device) and _worth_compiling(fabric, model, matmuls, throughput.flops, data)
    if config.compile is True or worth:
        from litmini.training.compile import compile_training

        compile_training(model, matmuls)
    if config.train.checkpoint_activations:
        from litmini.training.low_memory import checkpoint_activations

        checkpoint_activations(model)
    if config.train.offload_activations:
        from litmini.training.offload import offload_activations

        offload_activations(model)
    setup = TrainingSetup(
        fabric, wrapped, optimizer, data, config.train, config.optim, config.seed, run.progress, run, throughput
    )
    setup.sample = functools.partial(log_samples, setup)
    setup.attention = attention
    return setup


@torch.no_grad()
def attention_kernels(model: nn.Module, device: torch.device, attention: str | None) -> str:
    """Return the names of the attention kernels that training uses, found by a forward pass of two short documents.

    Raises:
        UserError: `attention`, which the user asked for, cannot compute this model's.
    """
    tokens, documents = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    batch = on_device(
        {"tokens": tokens, "positions": torch.arange(8)[None] % 4, "documents": documents}, device, attention
    )
    training = model.training
    gpus = [device] if device.type == "cuda" else []  # by default it would initialize those of the other processes
    with torch.random.fork_rng(gpus), record_kernels() as kernels:
        model.train()(**batch)
    model.train(training)
    return " and ".join(sorted(kernels))


def log_samples(setup: TrainingSetup, progress: Progress) -> None:
    """Print completions of the first validation prompts, and append them to samples.jsonl.

    Every rank calls this, for sharded models.
    """
    predictions = setup.predict(setup.data.val_examples[: setup.recorder.config.eval.samples])
    setup.recorder.log_samples(progress.step, [vars(prediction) for prediction in predictions])
    for sample in predictions:
        step = f"step {progress.step}"
        say(
            setup.fabric,
            f"\nprompt     {sample.prompt}\nreference  {sample.reference}\n{step:10} {sample.prediction}\n",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of (trained, all) parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def is_auto(compile_: bool | str | None, device: torch.device) -> bool:
    """Return whether the length of the run decides if it is compiled: by default on a GPU only."""
    return compile_ == "auto" or (compile_ is None and device.type == "cuda")


def _worth_compiling(
    fabric: Fabric, model: nn.Module, dtype: torch.dtype, flops: Callable[[list[Batch]], float], data: Data
) -> bool:
    """Decide `--compile auto` by the FLOPs of the whole run, so that a resumed run decides the same."""
    from litmini.compiler import compilable
    from litmini.training.compile import is_worth_compiling

    planned = planned_flops(flops, data, fabric.world_size)
    worth = fabric.broadcast(compilable(model, dtype) and is_worth_compiling(planned, fabric.device))
    fabric.print(f"compile auto: {'on' if worth else 'off'}, for {planned:.1e} FLOPs per process")
    return bool(worth)


def planned_flops(flops: Callable[[list[Batch]], float], data: Data, world: int) -> float:
    """Return the FLOPs of one of `world` processes in the whole run, extrapolated from its part of the first step."""
    return flops(data.batches(0, 0, world)) * data.total_sequences / min(data.global_batch_size, data.total_sequences)


def ineffective_optim(config: OptimConfig, steps: int) -> dict[str, bool]:
    """Return setting of the optimizer -> whether it is ineffective in a run of `steps` steps."""
    plain = OptimConfig()
    return {
        "optim.betas": config.name == "sgd" and config.betas != plain.betas,
        "optim.decay_fraction": config.schedule != "wsd" and config.decay_fraction != plain.decay_fraction,
        "optim.min_lr": config.min_lr > config.lr,
        f"optim.warmup_steps beyond the {counted(steps, 'step')} of the run": config.warmup_steps >= steps,
    }


def ineffective_memory(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Return setting that saves memory -> whether it is ineffective on this device."""
    return {
        "train.offload_activations": config.train.offload_activations and device.type == "cpu",
        "optim.offload": config.optim.offload and device.type == "cpu",
        "optim.stochastic_rounding": config.optim.stochastic_rounding and config.precision != "bf16-true",
    }


def warn(fabric: Fabric, ineffective: dict[str, bool]) -> None:
    """Print the ineffective settings."""
    if names := [name for name, is_ineffective in ineffective.items() if is_ineffective]:
        fabric.print(f"warning: ineffective settings: {', '.join(names)}")
