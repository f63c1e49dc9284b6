"""What every finetuning script does around the loop: its data, how long it runs, and what is measured before and after."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from litmini.compiler import compilable
from litmini.config.training import OptimConfig, RunConfig, TrainConfig
from litmini.data.dataset import Example, show_masks
from litmini.data.packing import Batch, PackedDataset
from litmini.data.pretrain.windows import TokenWindows
from litmini.distributed.fsdp import is_sharded, local_bytes
from litmini.evaluation.metrics import answer_all, exact_match
from litmini.runs.nonfinite import save_bad_step
from litmini.runs.plots import plot_metrics
from litmini.runs.report import write_report
from litmini.runs.run import Run
from litmini.tokenizer import Tokenizer
from litmini.training.compile import compile_training, is_worth_compiling
from litmini.training.flops import Throughput, peak_memory_mib
from litmini.training.loop import Progress, evaluate, fit, memory_warmup
from litmini.training.low_memory import checkpoint_activations, offload_activations
from litmini.training.optimizer import learning_rate

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Data:
    """The tokenizer and what it made of the data files."""

    tokenizer: Tokenizer
    train: PackedDataset | TokenWindows
    val: PackedDataset | TokenWindows | None
    held_out: list[Example]
    """The held-out examples as they were read, to be answered."""
    total_rows: int
    """Rows that the run trains on, over all epochs."""
    total_steps: int
    statistics: dict[str, Any]
    """For the manifest: `statistics` of the training data, `held_out_statistics`."""
    hashes: dict[str, str]
    """sha256 of each file that the rows come from."""


def idle_optim(config: OptimConfig, steps: int) -> dict[str, bool]:
    """Settings of the optimizer -> whether they have no effect in a run of `steps` steps."""
    plain = OptimConfig()
    return {
        "optim.betas": config.name == "sgd" and config.betas != plain.betas,
        "optim.decay_fraction": config.schedule != "wsd" and config.decay_fraction != plain.decay_fraction,
        "optim.min_lr": config.min_lr > config.lr,
        f"optim.warmup_steps beyond the {steps} steps of the run": config.warmup_steps >= steps,
    }


def idle_memory(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Settings that save memory -> whether they have no effect here."""
    return {
        "train.offload_activations": config.train.offload_activations and device.type == "cpu",
        "optim.offload": config.optim.offload and device.type == "cpu",
        "optim.stochastic_rounding": config.optim.stochastic_rounding and config.precision != "bf16-true",
    }


def warn(fabric: Fabric, idle: dict[str, bool]) -> None:
    if found := [name for name, has_no_effect in idle.items() if has_no_effect]:
        fabric.print(f"warning: without effect, or not the one that one expects: {', '.join(found)}")


def preview(data: Data, config: RunConfig, model: nn.Module) -> None:
    """What `--dry_run` prints: parameters, memory and time; and, with `--show_masks`, examples token by token."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if config.show_masks and isinstance(data.train, PackedDataset):
        print(show_masks(data.train.examples, data.tokenizer, config.show_masks))
    trained, total = count_parameters(model)
    print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%).")
    if config.dry_run:
        from litmini.tasks.dry_run import dry_run  # its fake tensors take a second to import

        if config.train.checkpoint_activations:
            checkpoint_activations(model)
        print(dry_run(model, config, data.train, data.total_rows, len(data.val or ())))
    print("Nothing was trained or written.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def run_training(
    fabric: Fabric,
    wrapped: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    run: Run,
    progress: Progress,
    save_weights: Callable[[Path | None], None],
) -> None:
    """Measure the model as it is, then train it.

    Args:
        wrapped: `model` as `fabric.setup` returned it.
        save_weights: writes the method's product into a directory, for checkpoints. See `Run.save_final`.
    """
    config = run.config
    micro, rank, world = config.train.micro_batch_size, fabric.global_rank, fabric.world_size
    run.know_data(data.hashes, **data.statistics)
    trained, total = count_parameters(model)
    fabric.print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%)")
    if is_sharded(model):
        held, every = (f"{size / 2**20:,.1f}" for size in local_bytes(model))
        fabric.print(f"{world} processes share the parameters: this one holds {held} of {every} MiB")
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    meter = Throughput(model, fabric.device, dtype)
    fabric.print(f"MFU is of {meter.peak / 1e12:,.2f} Tflop/s, {meter.source}")
    if config.compile is True or (
        config.compile == "auto" and _worth_compiling(fabric, model, dtype, meter, data, config)
    ):
        compile_training(model, dtype)
    if config.train.checkpoint_activations:
        checkpoint_activations(model)
    if config.train.offload_activations:
        offload_activations(model)
    if progress.step == 0:
        measure(fabric, wrapped, model, data, run, "before")
        if isinstance(data.train, PackedDataset) and not data.train.pack:  # packed rows are all of one length
            memory_warmup(fabric, wrapped, optimizer, data.train.longest_batch(micro))

    def rows(step: int) -> range:
        batch = config.train.global_batch_size
        return range(step * batch, min((step + 1) * batch, data.total_rows))

    def save_batch(step: int, parts: list[Batch], losses: list[float]) -> str:
        mine = rows(step - 1)[rank::world]
        return save_bad_step(
            fabric, run.directory, step, parts, losses, data.tokenizer, lambda: data.train.places(mine)
        )

    try:
        fit(
            fabric,
            wrapped,
            optimizer,
            batches=lambda step: list(data.train.batches(rows(step), micro, rank, world)),
            learning_rate=lambda step: learning_rate(step, data.total_steps, config.optim),
            total_steps=data.total_steps,
            config=config.train,
            progress=progress,
            seed=config.seed,
            log=run.log,
            checkpoint=functools.partial(run.checkpoint, save_weights=save_weights),
            validate=(lambda: validation_loss(fabric, wrapped, data, config)) if data.val else None,
            max_grad_norm=config.optim.max_grad_norm,
            observe=meter,
            sample=lambda progress: log_samples(model, data, run, progress),
            save_batch=save_batch,
        )
    finally:
        run.saving.wait()
    if config.train.keep_best and progress.best_step:
        run.results |= {"best_step": progress.best_step, "best_val_loss": progress.best_val_loss}
    run.results |= {
        "trained_parameters": trained,
        "steps": progress.step,
        "tokens": progress.tokens,
        "target_tokens": progress.targets,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "mfu": meter.mfu,
        "peak_flops": meter.peak,
        "peak_flops_source": meter.source,
    }


def _worth_compiling(
    fabric: Fabric, model: nn.Module, dtype: torch.dtype, meter: Throughput, data: Data, config: RunConfig
) -> bool:
    """By all steps of the run, so that it decides the same when it goes on later."""
    flops = planned_flops(meter.flops, data, config.train, fabric.world_size)
    worth = fabric.broadcast(compilable(model, dtype) and is_worth_compiling(flops, fabric.device))
    fabric.print(f"compile auto: {'on' if worth else 'off'}, for {flops:.1e} operations in each process")
    return worth


def planned_flops(flops: Callable[[list[Batch]], float], data: Data, train: TrainConfig, world: int) -> float:
    """What a process of `world` will do in the whole run, by its share of the first step."""
    count = min(train.global_batch_size, data.total_rows)
    first = data.train.batches(range(count), train.micro_batch_size, 0, world)
    return flops(list(first)) * data.total_rows / count


def validation_loss(fabric: Fabric, wrapped: nn.Module, data: Data, config: RunConfig) -> float:
    """Mean loss a target token over all held-out rows."""
    assert data.val is not None
    micro, rank, world = config.train.micro_batch_size, fabric.global_rank, fabric.world_size
    return evaluate(fabric, wrapped, data.val.batches(range(len(data.val)), micro, rank, world))


def log_samples(model: nn.Module, data: Data, run: Run, progress: Progress) -> None:
    """Answers to the first held-out questions into samples.jsonl. Every rank answers, as a sharded model needs them all."""
    config = run.config.eval
    answers = answer_all(model, data.tokenizer, data.held_out[: config.samples], config.max_new_tokens)
    run.log_samples(progress.step, [vars(answer) for answer in answers])


def measure(fabric: Fabric, wrapped: nn.Module, model: nn.Module, data: Data, run: Run, when: str) -> None:
    """Held-out loss, answers and exact match into the run's manifest, under names that end in `when`."""
    config = run.config
    results: dict[str, Any] = {}
    if data.val:
        results[f"val_loss_{when}"] = validation_loss(fabric, wrapped, data, config)
    asked = data.held_out if config.eval.exact_match else data.held_out[: config.eval.samples]
    if asked:
        answers = answer_all(model, data.tokenizer, asked, config.eval.max_new_tokens)
        results[f"samples_{when}"] = [vars(a) for a in answers[: config.eval.samples]]
        if config.eval.exact_match:
            results[f"exact_match_{when}"] = exact_match(answers)
    run.write_manifest(**results)


def finish(
    fabric: Fabric,
    wrapped: nn.Module,
    model: nn.Module,
    data: Data,
    run: Run,
    checkpoint_dir: str | Path,
    adapter_dir: Path | None = None,
) -> str:
    """Measure what was trained and saved, draw the curve, and say what a person wants to know, and what to type next."""
    run.results["peak_memory_mib"] = peak_memory_mib(fabric.device)
    measure(fabric, wrapped, model, data, run, "after")
    if fabric.is_global_zero:
        plot_metrics(run.directory, run.results)
        write_report(
            run.directory, data.train.sizes if isinstance(data.train, PackedDataset) else None, data.train.length
        )
    r = run.results
    lines = []
    for before, after in zip(r.get("samples_before", []), r.get("samples_after", []), strict=False):
        lines += [f"\nquestion  {before['question']}", f"expected  {before['expected']}"]
        lines += [f"before    {before['given']}", f"after     {after['given']}"]
    lines.append("")
    if {"val_loss_before", "val_loss_after"} <= r.keys():
        lines.append(f"held-out loss         {r['val_loss_before']:.3f} -> {r['val_loss_after']:.3f}")
    if {"exact_match_before", "exact_match_after"} <= r.keys():
        lines.append(f"held-out exact match  {r['exact_match_before']:.0%} -> {r['exact_match_after']:.0%}")
    lines.append(
        f"training took {r['training_seconds']:.0f} s at {r['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {r['peak_memory_mib']:,.0f} MiB"
    )
    adapter = ["--adapter_dir", str(adapter_dir)] if adapter_dir else []
    words = ["python", "scripts/generate.py", "--checkpoint_dir", str(checkpoint_dir), *adapter, "--prompt", "..."]
    lines.append(f"\nThe result is {adapter_dir or checkpoint_dir}. Talk to it:\n  {shlex.join(words)}")
    return "\n".join(lines)
