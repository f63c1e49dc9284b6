"""What every finetuning script does around the loop: its data, how long it runs, and what is measured before and after."""

from __future__ import annotations

import functools
import math
import resource
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from litmini.checkpoint import read_config
from litmini.config import FinetuneConfig, OptimConfig, UserError
from litmini.data import Example, describe, load_data, show_masks
from litmini.download import ensure_checkpoint
from litmini.evaluate import Answer, answer_all, exact_match
from litmini.launch import checkpoint_activations
from litmini.optim import learning_rate
from litmini.packing import Batch, Rows
from litmini.runs import Run
from litmini.tokenizer import Tokenizer
from litmini.train import Progress, evaluate, fit, rehearse

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Data:
    """The tokenizer and what it made of the data files."""

    tokenizer: Tokenizer
    train: Rows
    val: Rows | None
    held_out: list[Example]
    """The held-out examples as they were read, to be answered."""
    total_rows: int
    """Rows that the run trains on, over all epochs."""
    total_steps: int


def prepare_data(fabric: Fabric, config: FinetuneConfig) -> Data:
    """Get the checkpoint if it is missing, tokenise the data, and plan the run."""
    with fabric.rank_zero_first():
        ensure_checkpoint(config.checkpoint_dir, config.download_from)
    tokenizer = Tokenizer(config.checkpoint_dir, config.data.chat_template)
    _, base = read_config(Path(config.checkpoint_dir))
    if config.data.max_seq_len > base.max_positions:
        raise UserError(
            f"data.max_seq_len is {config.data.max_seq_len}, the model's context {base.max_positions} tokens: "
            f"use --data.max_seq_len {base.max_positions} or less."
        )
    train, val, held_out = load_data(config.data, tokenizer, config.seed)
    rows = Rows(train, config.data.max_seq_len, config.data.pack, config.seed)
    batch = config.train.global_batch_size
    steps = config.train.max_steps or math.ceil(config.train.epochs * len(rows) / batch)
    total_rows = steps * batch if config.train.max_steps else math.ceil(config.train.epochs * len(rows))
    idle = {
        "train.eval_every": config.train.eval_every is not None and not val,
        "eval.exact_match": config.eval.exact_match and not held_out,
        "optim.betas": config.optim.name == "sgd" and config.optim.betas != OptimConfig().betas,
        "optim.min_lr": config.optim.min_lr > config.optim.lr,
        f"optim.warmup_steps beyond the {steps} steps of the run": config.optim.warmup_steps >= steps,
    }
    if found := [name for name, has_no_effect in idle.items() if has_no_effect]:
        fabric.print(f"warning: without effect, or not the one that one expects: {', '.join(found)}")
    fabric.print(describe("training", train))
    if val:
        fabric.print(describe("held-out", val))
    filled = 100 * train.statistics["tokens"] / (len(rows) * rows.length) if rows.pack else None
    full = f" of {rows.length} tokens, {filled:.1f}% filled" if rows.pack else ""
    fabric.print(f"{steps:,} steps of {batch} rows{full}: {total_rows / len(rows):.2f} epochs")
    held_out_rows = Rows(val, config.data.max_seq_len, config.data.pack, config.seed, shuffle=False) if val else None
    return Data(tokenizer, rows, held_out_rows, held_out, total_rows, steps)


def preview(data: Data, config: FinetuneConfig, model: nn.Module) -> None:
    """What `--dry_run` prints: the parameters and, with `--show_masks`, examples token by token."""
    if config.show_masks:
        print(show_masks(data.train.examples, data.tokenizer, config.show_masks))
    trained, total = count_parameters(model)
    print(
        f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%). Nothing was trained or written."
    )


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
    save_weights: Callable[[Path], None],
) -> None:
    """Measure, train, measure again, and write what was found into the run's manifest.

    Args:
        wrapped: `model` as `fabric.setup` returned it.
        save_weights: writes the method's product into a directory.
    """
    config, tokenizer, examples = run.config, data.tokenizer, data.train.examples
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    rank, world = fabric.global_rank, fabric.world_size

    def batches(step: int) -> list[Batch]:
        numbers = range(data.total_rows)[step * batch : (step + 1) * batch]  # the last step may have fewer
        return list(data.train.batches(numbers, micro, rank, world))

    def val_loss() -> float:
        assert data.val is not None
        return evaluate(fabric, wrapped, data.val.batches(range(len(data.val)), micro, rank, world))

    def measure(when: str) -> list[Answer]:
        results: dict[str, Any] = {}
        answers: list[Answer] = []
        if data.val:
            results[f"val_loss_{when}"] = val_loss()
        if data.held_out and (config.eval.exact_match or config.eval.samples):
            asked = data.held_out if config.eval.exact_match else data.held_out[: config.eval.samples]
            answers = answer_all(model, tokenizer, asked, config.eval.max_new_tokens)
            results[f"samples_{when}"] = [vars(a) for a in answers[: config.eval.samples]]
        if config.eval.exact_match and answers:
            results[f"exact_match_{when}"] = exact_match(answers)
        run.write_manifest(tokenizer, examples, **results)
        return answers

    trained, total = count_parameters(model)
    fabric.print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%)")
    if config.train.checkpoint_activations:
        checkpoint_activations(model)
    if progress.step == 0:
        measure("before")
        if not config.data.pack:
            rehearse(fabric, wrapped, optimizer, data.train.longest_batch(micro))
    fit(
        fabric,
        wrapped,
        optimizer,
        batches=batches,
        learning_rate=lambda step: learning_rate(step, data.total_steps, config.optim),
        total_steps=data.total_steps,
        config=config.train,
        progress=progress,
        seed=config.seed,
        log=run.log,
        checkpoint=functools.partial(run.checkpoint, save_weights=save_weights),
        validate=val_loss if data.val else None,
        max_grad_norm=config.optim.max_grad_norm,
    )
    measure("after")
    run.write_manifest(
        tokenizer,
        examples,
        trained_parameters=trained,
        steps=progress.step,
        tokens=progress.tokens,
        target_tokens=progress.targets,
        training_seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_memory_mib=peak_memory_mib(fabric.device),
    )


def summary(run: Run, checkpoint_dir: str | Path, adapter_dir: Path | None = None) -> str:
    """What a person wants to know at the end of a run, and what to type next."""
    r = run.results
    lines = []
    for before, after in zip(r.get("samples_before", []), r.get("samples_after", []), strict=False):
        lines += [f"\nquestion  {before['question']}", f"expected  {before['expected']}"]
        lines += [f"before    {before['given']}", f"after     {after['given']}"]
    lines.append("")
    if "val_loss_after" in r:
        lines.append(f"held-out loss         {r['val_loss_before']:.3f} -> {r['val_loss_after']:.3f}")
    if "exact_match_after" in r:
        lines.append(f"held-out exact match  {r['exact_match_before']:.0%} -> {r['exact_match_after']:.0%}")
    lines.append(
        f"training took {r['training_seconds']:.0f} s at {r['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {r['peak_memory_mib']:,.0f} MiB"
    )
    adapter = ["--adapter_dir", str(adapter_dir)] if adapter_dir else []
    words = ["python", "scripts/generate.py", "--checkpoint_dir", str(checkpoint_dir), *adapter, "--prompt", "..."]
    lines.append(f"\nThe result is {adapter_dir or checkpoint_dir}. Talk to it:\n  {shlex.join(words)}")
    return "\n".join(lines)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux: in KiB
