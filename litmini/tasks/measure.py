"""The measurements before and after training, and the results that a run reports."""

from __future__ import annotations

import shlex
from typing import Any

from litmini.runs.run import MEASURES, today_keys
from litmini.tasks.setup import TrainingSetup
from litmini.training.display import say
from litmini.training.flops import Throughput, peak_memory_mib
from litmini.training.loop import memory_warmup, validate
from litmini.training.objective import Objective

MOST_WRONG = 20  # wrong completions that the report shows


def measure_start(setup: TrainingSetup, objective: Objective) -> None:
    """Measure the model before training, and run the longest batch once. Do nothing if the run is resumed."""
    if setup.progress.step == 0:
        measure(setup, objective, "before")
        longest = setup.data.train.longest_batch(setup.data.micro_batch_size)
        if longest is not None:
            memory_warmup(setup, objective, longest)


def finish(
    setup: TrainingSetup, objective: Objective, adapter_of: str | None = None, usage: str | None = None, **report: Any
) -> str:
    """Save the result of training, measure it, write plot and report, and return a summary with the command to type next.

    Args:
        adapter_of: the base checkpoint, if the result is an adapter.
        usage: a line that says how the result is used; None: by `scripts/generate.py`.
        report: further arguments of `write_report`.
    """
    run, throughput, progress = setup.recorder, setup.throughput, setup.progress
    assert isinstance(throughput, Throughput)
    if setup.train.keep_best and progress.best_step:
        run.results |= {"best_step": progress.best_step, "best_val_loss": progress.best_val_loss}
    run.results |= {
        "steps": progress.step,
        "tokens": progress.tokens,
        objective.unit: progress.targets,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "mfu": throughput.mfu,
        "peak_flops": throughput.peak,
        "peak_flops_source": throughput.source,
    }
    final = run.save_final()
    run.results["peak_memory_mib"] = peak_memory_mib(setup.fabric.device)
    measure(setup, objective, "after")
    if setup.fabric.is_global_zero:
        from litmini.runs.report import plot_metrics, write_report

        plot_metrics(run.directory, run.results)
        write_report(run.directory, setup.data.train.lengths(), setup.data.train.length, **report)
    if usage is None:
        where = [adapter_of, "--adapter_dir", str(final)] if adapter_of else [str(final)]
        where += ["--model_file", run.config.own_file] if run.config.own_file else []
        words = ["python", "scripts/generate.py", "--checkpoint_dir", *where, "--prompt", "..."]
        usage = f"Try it:\n  {shlex.join(words)}"
    return "\n".join([*describe_results(run.results), f"\nThe result is {final}. {usage}"])


def describe_results(r: dict[str, Any]) -> list[str]:
    """Return the results of a run as lines of text."""
    lines = []
    samples = (today_keys(r.get(f"samples_{when}", [])) for when in ("before", "after"))
    for before, after in zip(*samples, strict=False):
        lines += [f"\nprompt     {before['prompt']}", f"reference  {before['reference']}"]
        lines += [f"before     {before['prediction']}", f"after      {after['prediction']}"]
    lines.append("")
    for key, (title, form) in MEASURES.items():
        if {f"{key}_before", f"{key}_after"} <= r.keys():
            before, after = (form.format(r[f"{key}_{when}"]) for when in ("before", "after"))
            lines.append(f"{f'validation {title}  ':24}{before} -> {after}")
    lines.append(
        f"training took {r['training_seconds']:.0f} s at {r['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {r['peak_memory_mib']:,.0f} MiB"
    )
    return lines


def measure(setup: TrainingSetup, objective: Objective, when: str) -> None:
    """Measure validation loss, completions and exact match, and write them to the manifest under names ending in `when`."""
    data, run = setup.data, setup.recorder
    config = run.config.eval
    results: dict[str, Any] = {}
    for name, value in validate(setup, objective).items():
        results[f"{'val_loss' if name == 'loss' else name}_{when}"] = value
    if when == "before" and f"val_loss_{when}" in results:
        say(setup.fabric, f"validation loss before training: {results[f'val_loss_{when}']:.4f}")
    if examples := data.val_examples if config.exact_match else data.val_examples[: config.samples]:
        from litmini.evaluation.metrics import exact_match

        predictions = setup.predict(examples)
        results[f"samples_{when}"] = [vars(p) for p in predictions[: config.samples]]
        if config.exact_match:
            results[f"exact_match_{when}"] = exact_match(predictions)
            if when == "after":
                wrong = [vars(p) for p in predictions if not p.correct]
                results |= {"wrong": len(wrong), "wrong_after": wrong[:MOST_WRONG]}
    run.write_manifest(**results)
