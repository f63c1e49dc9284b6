"""The training loop: the only one. Plain functions over objects that the script has built.

The loss of an optimizer step is the sum over its target tokens, divided by their number: over micro-batches and ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from litmini.config.training import TrainConfig
from litmini.distributed.fsdp import full_tensor, is_dtensor
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.training.signals import Interrupted, caught

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Batch = dict[str, torch.Tensor]
MOST_SKIPPED = 25  # steps in a row; a gradient scaler may need 16 to find its scale


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens that went through the model, padding not counted."""
    targets: int = 0
    """Tokens that carried loss."""
    seconds: float = 0.0
    """Time in training steps."""
    best_step: int = 0
    """After which step the held-out loss was lowest; 0: none was taken."""
    best_val_loss: float | None = None
    """That loss."""
    skipped: int = 0
    """Steps left out because loss or gradients were not finite."""
    skipped_in_row: int = 0
    """Of these, the last ones without a step taken between them."""
    loss_scale: dict[str, float] | None = None
    """State of the gradient scaler of 16-mixed."""

    def advance(self, tokens: int, targets: int, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += tokens
        self.targets += targets
        self.seconds += seconds

    def remember(self, val_loss: float) -> None:
        """Note a held-out loss if it is the lowest so far."""
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, val_loss


def fit(
    fabric: Fabric,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], list[Batch]],
    learning_rate: Callable[[int], float],
    total_steps: int,
    config: TrainConfig,
    progress: Progress,
    seed: int,
    log: Callable[[dict[str, float]], None],
    checkpoint: Callable[[Progress], Any],
    validate: Callable[[], float] | None = None,
    max_grad_norm: float | None = 1.0,
    observe: Callable[[list[Batch], float], dict[str, float]] | None = None,
    sample: Callable[[Progress], None] | None = None,
    save_batch: Callable[[int, list[Batch], list[float]], Any] | None = None,
) -> Progress:
    """Train from `progress.step` to `total_steps`, or until the held-out loss falls no more (`config.patience`).

    Args:
        model, optimizer: as `fabric.setup` returned them.
        batches: step -> this rank's micro-batches; the same number on every rank.
        learning_rate: step -> learning rate.
        seed: dropout in each step is a pure function of this, the step and the rank, as the two above are of the step:
            so a resumed run goes on exactly, and evaluating or sampling in between changes nothing.
        log: takes a row of metrics, each `config.log_every` steps.
        checkpoint: saves, each `config.save_every` steps and when interrupted.
        validate: the held-out loss, each `config.eval_every` steps.
        max_grad_norm: clip the global norm to this; None: only measure it.
        observe: further metrics of a step: takes this rank's micro-batches and the seconds they took.
        sample: generates answers, each `config.sample_every` steps; every rank calls it.
        save_batch: takes a step (from 1) that was not finite, its micro-batches and their losses; says where it saved them.
            Every rank calls it.

    Raises:
        UserError: loss or gradients are not finite; skipping, `MOST_SKIPPED` times in a row.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    model.train()
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler and progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    hidden = None if fabric.is_global_zero else True  # None: where nobody looks at a terminal
    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step", disable=hidden)
    with caught() as received, bar:
        for step in range(progress.step, total_steps):
            started = time.perf_counter()
            _seed(fabric.device, hash((seed, step, fabric.global_rank)) % 2**63)  # ints hash the same in every process
            micro_batches = batches(step)
            targets, tokens, stop = _total(fabric, _targets(micro_batches), _tokens(micro_batches), len(received))
            rate = learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_ratio"]
            losses, loss, norm = _take_step(fabric, model, optimizer, micro_batches, targets, max_grad_norm, scaler)
            if _not_taken(loss, norm, scaler, progress):
                where = f" Its batch is in {save_batch(step + 1, micro_batches, losses)}." if save_batch else ""
                _stop_or_skip(fabric, f"step {step + 1}: loss {loss}, gradient norm {norm}", where, config, progress)
            seconds = max(1e-9, time.perf_counter() - started)
            progress.advance(tokens, targets, seconds)
            metrics = {"step": step + 1, "tokens": progress.tokens, "loss": loss, "lr": rate, "grad_norm": norm}
            metrics |= {"tokens_per_second": tokens / seconds, **(observe(micro_batches, seconds) if observe else {})}
            if validate and config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < total_steps:
                metrics["val_loss"] = validate()
                model.train()
                progress.remember(metrics["val_loss"])
            if "val_loss" in metrics or (step + 1) % config.log_every == 0 or step + 1 == total_steps:
                log(metrics)
            _show(fabric, bar, metrics, progress)
            if sample and config.sample_every and (step + 1) % config.sample_every == 0:
                sample(progress)
                model.train()
            stop = bool(stop or (received and fabric.world_size == 1))
            if stop or _is_due(progress, config):
                progress.loss_scale = scaler.state_dict() if scaler else None
                saved = checkpoint(progress)
            if stop:
                raise Interrupted(received, f"stopped after step {step + 1}; saved {saved}. Go on with --resume auto")
            if "val_loss" in metrics and _is_enough(fabric, progress, config):
                break
    return progress


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed`, which takes a tenth of a millisecond to write down who called it, for GPUs to come."""
    torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)


def _total(fabric: Fabric, *counts: int) -> list[int]:
    """Sums over all ranks; of signals, too, so that all stop after the same step."""
    if fabric.world_size == 1:
        return list(counts)
    total: Any = fabric.all_reduce(torch.tensor(counts, device=fabric.device), reduce_op="sum")
    return total.tolist()


def _is_due(progress: Progress, config: TrainConfig) -> bool:
    """Whether to save after this step."""
    is_best = config.keep_best and progress.best_step == progress.step
    return is_best or bool(config.save_every and progress.step % config.save_every == 0)


def _is_enough(fabric: Fabric, progress: Progress, config: TrainConfig) -> bool:
    """Whether the last `config.patience` evaluations found no lower held-out loss."""
    assert config.eval_every
    enough = bool(config.patience and progress.step - progress.best_step >= config.patience * config.eval_every)
    if enough:
        fabric.print(
            f"stopped early after step {progress.step}: the held-out loss has not been below "
            f"{progress.best_val_loss:.4f}, of step {progress.best_step}, for {config.patience} evaluations"
        )
    return enough


def _show(fabric: Fabric, bar: tqdm, metrics: dict[str, float], progress: Progress) -> None:
    """Move the bar or, in log files, print a line for each twentieth of the run."""
    bar.set_postfix_str(_in_words(metrics), refresh=False)
    bar.update()
    if bar.disable and progress.step % max(1, bar.total // 20) == 0:
        left = tqdm.format_interval(progress.seconds / progress.step * (bar.total - progress.step))
        fabric.print(f"step {progress.step} of {bar.total}: {_in_words(metrics)}, {left} left")


def _in_words(metrics: dict[str, float]) -> str:
    """A line for people."""
    words = f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, norm {metrics['grad_norm']:.2f}, "
    words += f"{metrics['tokens_per_second']:,.0f} tok/s"
    if "mfu" in metrics:
        words += f", MFU {metrics['mfu']:.0%}, {metrics['memory_mib']:,.0f} MiB"
    return words


def _take_step(
    fabric: Fabric,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    targets: int,
    max_grad_norm: float | None,
    scaler: Any,
) -> tuple[list[float], float, float]:
    """One optimizer step, not taken where loss or gradients are not finite.

    Args:
        targets: of all micro-batches on all ranks.
        scaler: the gradient scaler of 16-mixed; it lowers its scale when gradients are not finite.

    Returns:
        The summed losses of this rank's micro-batches, the loss a target and the gradient norm before clipping, both over
        all ranks.
    """
    losses = []
    sharded = is_dtensor(next(model.parameters()))  # gradients are, too, after each micro-batch
    for i, batch in enumerate(micro_batches):
        more = i + 1 < len(micro_batches)
        with fabric.no_backward_sync(model, enabled=more and not sharded):
            if sharded:  # Fabric has just switched it on
                model.module.set_requires_all_reduce(not more)  # copies of the shares (hsdp) are added up once a step
            loss, _ = model(**fabric.to_device(batch))
            fabric.backward(loss * (fabric.world_size / max(1, targets)))  # ranks are averaged: undo it
        losses.append(loss.detach())
    if getattr(optimizer, "in_backward", False):  # the steps were taken there
        clipped: Any = torch.tensor(optimizer.take_norm())  # type: ignore[attr-defined]
    else:
        clip = max_grad_norm or math.inf
        clipped = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
    total: Any = fabric.all_reduce(sum(losses), reduce_op="sum")
    total, norm, *each = torch.stack(
        [total, full_tensor(clipped).to(total), *losses]
    ).tolist()  # the step's CPU-GPU sync point
    mean = total / max(1, targets)
    finite = math.isfinite(mean) and math.isfinite(norm)
    if not finite:
        optimizer.zero_grad()
    if scaler or finite:
        optimizer.step()
    optimizer.zero_grad()
    return each, mean, norm


def _not_taken(loss: float, norm: float, scaler: Any, progress: Progress) -> bool:
    """Whether a step was left out for a reason that the user should know; counts those in a row."""
    taken = math.isfinite(loss) and math.isfinite(norm)
    progress.skipped += not taken
    progress.skipped_in_row = 0 if taken else progress.skipped_in_row + 1
    scaling = scaler and math.isfinite(loss) and progress.skipped_in_row < MOST_SKIPPED  # it finds its scale that way
    return not (taken or scaling)


def _stop_or_skip(fabric: Fabric, what: str, where: str, config: TrainConfig, progress: Progress) -> None:
    """Say that a step was not taken, as a warning or as the error that ends the run."""
    what += f": not finite, so the step was not taken.{where}"
    if config.on_nonfinite == "stop":
        raise UserError(
            f"{what} Look at that data, or try a lower --optim.lr; --train.on_nonfinite skip leaves such steps out."
        )
    if progress.skipped_in_row >= MOST_SKIPPED:
        raise UserError(f"{what} So were the {MOST_SKIPPED - 1} before it: the weights are likely to be damaged.")
    fabric.print(f"warning: {what}")


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss a target over all `batches` of all ranks: it does not depend on batch size or number of ranks."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        loss, targets = model(**fabric.to_device(batch))
        total += torch.stack((loss.double(), targets.double())).cpu()
    reduced: Any = fabric.all_reduce(total.to(fabric.device), reduce_op="sum")
    loss_sum, count = reduced.tolist()
    return loss_sum / max(1.0, count)


def memory_warmup(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One forward and backward of the largest micro-batch: whatever runs out of memory does so now, not after hours.

    Leaves no trace: the gradients are dropped.
    """
    model.train()
    loss, _ = model(**fabric.to_device(batch))
    fabric.backward(loss)
    optimizer.zero_grad()


def _targets(batches: list[Batch]) -> int:
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)


def _tokens(batches: list[Batch]) -> int:
    """Tokens that are no padding; a batch that names no documents has none."""
    return sum(int((b["documents"] > 0).sum()) if "documents" in b else b["tokens"].numel() for b in batches)
