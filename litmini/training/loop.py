"""The training loop. It takes an objective, and a `Setup` with model, optimizer and data.

The loss of an optimizer step is the sum over all units of the objective, over all micro-batches and ranks, divided by their
number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from litmini.config.training import TrainConfig
from litmini.distributed.fabric import sum_on_host
from litmini.distributed.fsdp import full_tensor, is_dtensor
from litmini.distributed.processes import Interrupted, graceful_shutdown
from litmini.errors import UserError
from litmini.training.display import Display, validating
from litmini.training.objective import Batch, Measuring, Objective, count_tokens
from litmini.training.optimizer import learning_rate
from litmini.training.setup import Feed, Progress, Setup, on_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_SKIPPED = 25  # consecutive steps; a gradient scaler may need 16 to find its scale


def fit(setup: Setup, objective: Objective, stop_after: int | None = None) -> Progress:
    """Train from `setup.progress` to the last step, or until the validation loss stops falling (`train.patience`).

    Args:
        stop_after: return after this step, with the schedule and data of the whole run; None: after the last step.

    Raises:
        UserError: loss or gradients are not finite; with `on_nonfinite` skip, in `MAX_SKIPPED` consecutive steps.
        Interrupted: by SIGTERM or Ctrl-C; the state is saved.
    """
    fabric, progress, total_steps = setup.fabric, setup.progress, setup.data.total_steps
    last = total_steps if stop_after is None else stop_after
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler and progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    setup.model.train()
    rank, world = fabric.global_rank, fabric.world_size
    feed = Feed(setup.data, fabric.device, rank, world, setup.attention, setup.prefetch)
    display = Display(fabric, total_steps, progress.step)
    try:
        with graceful_shutdown() as received, display.bar:
            while progress.step < last and not _is_enough(fabric, progress, setup.train):
                metrics, stop = _step(setup, objective, feed, scaler, len(received))
                _report(setup, objective, display, metrics)
                stop = bool(stop or (received and fabric.world_size == 1))
                if stop or _is_due(progress, setup.train):
                    progress.loss_scale = scaler.state_dict() if scaler else None
                    saved = setup.recorder.checkpoint(progress)
                if stop:
                    raise Interrupted(
                        received, f"stopped after step {progress.step}; saved {saved}. Resume it with --resume auto"
                    )
    finally:
        setup.recorder.wait()
    return progress


def _step(setup: Setup, objective: Objective, feed: Feed, scaler: Any, signals: int) -> tuple[dict[str, float], bool]:
    """Take one optimizer step; return its metrics, and whether any rank received a signal."""
    fabric, progress, data = setup.fabric, setup.progress, setup.data
    started, step = time.perf_counter(), progress.step
    rank, world = fabric.global_rank, fabric.world_size
    _seed(fabric.device, hash((setup.seed, step, rank)) % 2**63)  # ints hash the same in every process
    batches = feed.take(step)
    micro_batches = [batch for batch, _ in batches]
    counts = sum(map(objective.count, micro_batches)), sum(map(count_tokens, micro_batches))
    units, tokens, stop = sum_on_host(fabric, *counts, signals)  # signals, too: all ranks stop after the same step
    rate = learning_rate(step, data.total_steps, setup.optim)
    for group in setup.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    losses, loss, norm, measured = _take_step(setup, objective, [ready for _, ready in batches], units, scaler)
    if _not_taken(loss, norm, scaler, progress):
        where = setup.recorder.save_nonfinite_step(
            step + 1, micro_batches, losses, lambda: data.locations(step, rank, world)
        )
        where = f" Its batch is in {where}." if where else ""
        _stop_or_skip(fabric, f"step {step + 1}: loss {loss}, gradient norm {norm}", where, setup.train, progress)
    seconds = max(1e-9, time.perf_counter() - started)
    progress.advance(tokens, units, seconds)
    metrics = {"step": step + 1, "tokens": progress.tokens, "loss": loss, "lr": rate, "grad_norm": norm}
    metrics |= {"tokens_per_second": tokens / seconds}
    metrics |= setup.throughput(micro_batches, seconds) if setup.throughput else {}
    return metrics | measured, bool(stop)


def _report(setup: Setup, objective: Objective, display: Display, metrics: dict[str, float]) -> None:
    """Validate, log, show progress and sample, if they are due after this step; add a validation loss to `metrics`."""
    progress, train = setup.progress, setup.train
    last = progress.step == setup.data.total_steps
    if train.eval_every and progress.step % train.eval_every == 0 and not last:
        found = validate(setup, objective)
        metrics |= {f"val_{name}": value for name, value in found.items()}
        if found:
            progress.remember(found["loss"])
    if "val_loss" in metrics or progress.step % train.log_every == 0 or last:
        setup.recorder.log(metrics)
    display.show(metrics, progress, objective.shown if isinstance(objective, Measuring) else {})
    sampled = setup.sample and train.sample_every and progress.step % train.sample_every == 0
    if sampled:
        setup.sample(progress)  # type: ignore[misc]
    if sampled or "val_loss" in metrics:
        setup.model.train()


def _seed(device: torch.device, seed: int) -> None:
    """Call `torch.manual_seed`; on a CPU, seed its generator alone, which saves 0.1 ms."""
    torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)


def _is_due(progress: Progress, config: TrainConfig) -> bool:
    """Return whether a checkpoint is due after this step."""
    is_best = config.keep_best and progress.best_step == progress.step
    return is_best or bool(config.save_every and progress.step % config.save_every == 0)


def _is_enough(fabric: Fabric, progress: Progress, config: TrainConfig) -> bool:
    """Return whether the last `config.patience` evaluations found no lower validation loss, also those before resuming."""
    enough = bool(config.patience and progress.not_better >= config.patience)
    if enough:
        lowest = "finite" if progress.best_val_loss is None else f"below {progress.best_val_loss:.4f}"
        fabric.print(
            f"stopped early after step {progress.step}: the validation loss has not been {lowest}, "
            f"of step {progress.best_step}, for {config.patience} evaluations"
        )
    return enough


def _take_step(
    setup: Setup, objective: Objective, micro_batches: list[dict[str, Any]], units: int, scaler: Any
) -> tuple[list[float], float, float, dict[str, float]]:
    """Run the micro-batches and take one optimizer step, unless loss or gradients are not finite.

    Args:
        micro_batches: on the device.
        units: of all micro-batches on all ranks.
        scaler: the gradient scaler of 16-mixed; it lowers its scale when gradients are not finite.

    Returns:
        The summed losses of this rank's micro-batches; the loss per unit, the gradient norm before clipping, and what the
        objective measures, all over all ranks.
    """
    fabric, model, optimizer = setup.fabric, setup.model, setup.optimizer
    losses = []
    sharded = is_dtensor(next(model.parameters()))  # gradients are sharded after each micro-batch as well
    for i, batch in enumerate(micro_batches):
        more = i + 1 < len(micro_batches)
        with fabric.no_backward_sync(model, enabled=more and not sharded):
            if sharded:  # Fabric has just enabled the all-reduce
                model.module.set_requires_all_reduce(not more)  # replicas of shards (hsdp) are summed once per step
            loss = objective.loss(model, batch)
            fabric.backward(loss * (fabric.world_size / max(1, units)))  # gradients are averaged over ranks: undo it
        losses.append(loss.detach())
    if getattr(optimizer, "in_backward", False):  # the backward pass took the steps
        clipped: Any = torch.tensor(optimizer.take_norm())
    else:
        clip = setup.optim.max_grad_norm or math.inf
        clipped = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
    measured = objective.take_sums() if isinstance(objective, Measuring) else losses[0].new_zeros(0)
    sums: Any = fabric.all_reduce(torch.cat([sum(losses)[None], measured]), reduce_op="sum")  # type: ignore[index]
    numbers = torch.cat([full_tensor(clipped).to(sums)[None], torch.stack(losses), sums])
    norm, *each = numbers.tolist()  # the step's CPU-GPU sync point
    each, total, measured_sums = each[: len(losses)], each[len(losses)], each[len(losses) + 1 :]
    mean = total / max(1, units)
    finite = math.isfinite(mean) and math.isfinite(norm)
    if not finite:
        optimizer.zero_grad()
    if scaler or finite:
        optimizer.step()
    optimizer.zero_grad()
    return each, mean, norm, objective.metrics(measured_sums) if isinstance(objective, Measuring) else {}


def _not_taken(loss: float, norm: float, scaler: Any, progress: Progress) -> bool:
    """Return whether the step was skipped, other than to find the loss scale; count skipped steps."""
    taken = math.isfinite(loss) and math.isfinite(norm)
    progress.skipped += not taken
    progress.skipped_in_row = 0 if taken else progress.skipped_in_row + 1
    scaling = scaler and math.isfinite(loss) and progress.skipped_in_row < MAX_SKIPPED  # the scaler finds its scale
    return not (taken or scaling)


def _stop_or_skip(fabric: Fabric, what: str, where: str, config: TrainConfig, progress: Progress) -> None:
    """Report a non-finite step as a warning, or as the error that ends the run."""
    what += f": not finite, so the step was not taken.{where}"
    if config.on_nonfinite == "stop":
        raise UserError(
            f"{what} Look at that data, or try a lower --optim.lr; --train.on_nonfinite skip skips such steps."
        )
    if progress.skipped_in_row >= MAX_SKIPPED:
        raise UserError(f"{what} So were the {MAX_SKIPPED - 1} steps before it: the weights are probably damaged.")
    fabric.print(f"warning: {what}")


def validate(setup: Setup, objective: Objective) -> dict[str, float]:
    """Return the mean validation loss per unit as `loss`, and what the objective measures; {} without a validation set."""
    fabric = setup.fabric
    batches = setup.data.validation_batches(fabric.global_rank, fabric.world_size)
    if batches is None:
        return {}
    return _evaluate(fabric, setup.model, objective, validating(fabric, batches), setup.attention)


def evaluate(
    fabric: Fabric, model: Any, objective: Objective, batches: Iterable[Batch], attention: str | None = None
) -> float:
    """Return the mean loss per unit over all `batches` of all ranks, independent of batch size and number of ranks.

    Args:
        attention: the kernel to use; None: by the rules.
    """
    return _evaluate(fabric, model, objective, batches, attention)["loss"]


@torch.no_grad()
def _evaluate(
    fabric: Fabric, model: Any, objective: Objective, batches: Iterable[Batch], attention: str | None
) -> dict[str, float]:
    """Return the mean loss per unit as `loss`, and what the objective measures."""
    model.eval()
    losses, units = [], 0
    for batch in batches:
        losses.append(objective.loss(model, on_device(batch, fabric.device, attention)))
        units += objective.count(batch)
    loss_sum = sum(torch.stack(losses).tolist()) if losses else 0.0  # CPU-GPU sync point
    measured = objective.take_sums().tolist() if isinstance(objective, Measuring) else []
    if fabric.world_size > 1:
        mine = torch.tensor([loss_sum, units, *measured], dtype=torch.float64, device=fabric.device)
        total: Any = fabric.all_reduce(mine, reduce_op="sum")
        loss_sum, units, *measured = total.tolist()
    found = {"loss": loss_sum / max(1, units)}
    return found | (objective.metrics(measured) if isinstance(objective, Measuring) else {})


def memory_warmup(setup: Setup, objective: Objective, batch: Batch) -> None:
    """Run the largest micro-batch forward and backward, so that a run that needs too much memory fails at once.

    The gradients are dropped, so the run is unchanged.
    """
    setup.model.train()
    optimizer: Any = setup.optimizer.optimizer  # in Fabric's wrapper
    with optimizer.without_steps() if getattr(optimizer, "in_backward", False) else nullcontext():
        setup.fabric.backward(objective.loss(setup.model, on_device(batch, setup.fabric.device, setup.attention)))
    setup.optimizer.zero_grad()
    if isinstance(objective, Measuring):
        objective.take_sums()
