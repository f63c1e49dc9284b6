"""What classification measures on the validation data, before and after training and beside baselines; and its charts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from litmini.data.labelled import model_inputs
from litmini.data.labels import MULTI, REGRESSION
from litmini.evaluation.baselines import bag_of_words, constant
from litmini.evaluation.classification import COLUMNS, confusion_lines, measure, shown, table
from litmini.training.setup import on_device

if TYPE_CHECKING:
    from litmini.tasks.classify import ClassificationData
    from litmini.tasks.setup import TrainingSetup

BEFORE, AFTER = "this model before training", "this model after training"
Found = dict[str, Any] | str


@torch.no_grad()
def validation_scores(setup: TrainingSetup) -> np.ndarray | None:
    """Return the scores of all validation examples, (examples, classes) fp32, on every rank; None without such examples."""
    fabric, data, model = setup.fabric, setup.data, setup.model
    batches = data.validation_batches(fabric.global_rank, fabric.world_size)
    if batches is None or data.val is None:
        return None
    model.eval()
    examples: Any = data.val
    found = torch.zeros(len(examples.examples), len(examples.examples.names), device=fabric.device)
    for batch in batches:
        ready = on_device(batch, fabric.device, setup.attention)
        scores, _ = model(**model_inputs(ready))
        found[ready["numbers"]] = scores
    whole: Any = fabric.all_reduce(found, reduce_op="sum")  # each example is on one rank
    return whole.cpu().numpy()  # type: ignore[no-any-return]


def measure_classifier(setup: TrainingSetup, data: ClassificationData, when: str) -> None:
    """Measure the scores of the validation data, and write them to the manifest: under `classification` all of them, the most
    important ones under names ending in `when`.

    Do nothing before the training of a run that is resumed.
    """
    if when == "before" and setup.progress.step:
        return
    scores = validation_scores(setup)
    if scores is None or data.val is None:
        return
    run, found = setup.recorder, measure(scores, data.val.examples.targets, data.problem_type)
    rows = {**run.results.get("classification", {}), AFTER if when == "after" else BEFORE: found}
    run.write_manifest(
        **{f"{key}_{when}": found[key] for key in COLUMNS if found.get(key) is not None}, classification=rows
    )


def measure_baselines(setup: TrainingSetup, data: ClassificationData, balanced: bool) -> None:
    """Measure what needs no language model on the same split, and write it to the manifest."""
    if data.val is None or not setup.fabric.is_global_zero:
        return
    train, val, kind = data.train.examples, data.val.examples, data.problem_type
    texts, others = ([text.text for text in each.records()] for each in (train, val))
    n_classes = len(data.names)
    common = {MULTI: "most common labels", REGRESSION: "mean of the training data"}.get(kind, "majority class")
    words = "bag of words, ridge regression" if kind == REGRESSION else "bag of words, logistic regression"
    scores: dict[str, np.ndarray | str] = {
        common: constant(train.targets, n_classes, len(val), kind),
        words: bag_of_words(texts, train.targets, others, n_classes, kind, balanced),
    }
    found: dict[str, Found] = {
        name: each if isinstance(each, str) else measure(each, val.targets, kind) for name, each in scores.items()
    }
    run = setup.recorder
    run.write_manifest(classification={**found, **run.results.get("classification", {})})


def describe_classifier(setup: TrainingSetup, data: ClassificationData) -> str:
    """Return the metrics of the model and the baselines, and its confusion matrix, as text."""
    rows: dict[str, Found] = setup.recorder.results.get("classification", {})
    if AFTER not in rows or data.val is None:
        return "no validation data, so nothing is measured: give --data.val_path or --data.val_fraction"
    found: Any = rows[AFTER]
    lines = [f"\nOn the {found['examples']:,} validation examples:", *table(rows)]
    if "interval" in found:
        low, high = found["interval"]
        lines += [f"95% interval of the accuracy after training: {low:.1%} to {high:.1%}", ""]
    lines += confusion_lines(found, data.names, data.problem_type)
    others = {name: each for name, each in rows.items() if name not in (BEFORE, AFTER) and not isinstance(each, str)}
    key = "mse" if data.problem_type == REGRESSION else "accuracy"
    sign = -1 if key == "mse" else 1
    if better := [name for name, each in others.items() if sign * each[key] >= sign * found[key]]:
        lines.append(f"note: on these data the model does no better than: {'; '.join(better)}.")
    return "\n".join(lines)


def report_tables(setup: TrainingSetup) -> dict[str, dict[str, Any]]:
    """Return the tables for the report: for each classifier its metrics."""
    rows: dict[str, Found] = setup.recorder.results.get("classification", {})
    tables: dict[str, dict[str, Any]] = {}
    for name, found in rows.items():
        if isinstance(found, str):
            tables[name] = {"metrics": found}
        else:
            tables[name] = {title: shown(found, key) for key, (title, _) in COLUMNS.items() if key in found}
            if "temperature" in found:
                tables[name]["temperature"] = f"{found['temperature']:.2f}"
    return tables


def report_charts(setup: TrainingSetup, data: ClassificationData) -> list[Callable[[Any], None]]:
    """Return functions that draw on matplotlib's axes: the reliability and the confusion matrix of the trained model."""
    found = setup.recorder.results.get("classification", {}).get(AFTER)
    if not found or data.problem_type == REGRESSION:
        return []
    charts: list[Callable[[Any], None]] = [functools.partial(_draw_reliability, found=found)]
    if data.problem_type != MULTI and len(data.names) <= 20:
        charts.append(functools.partial(_draw_confusion, found=found, names=data.names))
    return charts


def _draw_reliability(axes: Any, found: dict[str, Any]) -> None:
    axes.set_title("reliability: share that is right by confidence", fontsize=10)
    axes.plot([0, 1], [0, 1], color="#64748b", linewidth=0.8)
    names = {"before": f"as trained, ECE {found['ece']:.3f}"}
    if found["ece_calibrated"] is not None:
        names["after"] = f"with temperature, ECE {found['ece_calibrated']:.3f}"
    for (when, label), color in zip(names.items(), ("#2563eb", "#ea580c"), strict=False):
        _, confidence, right = zip(*found["reliability"][when], strict=True)
        axes.plot(confidence, right, "o-", color=color, label=label, markersize=4, linewidth=1)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence")
    axes.legend(frameon=False, fontsize=8)


def _draw_confusion(axes: Any, found: dict[str, Any], names: list[str]) -> None:
    axes.set_title("class (row) and predicted class", fontsize=10)
    axes.grid(False)
    axes.imshow(found["confusion"], cmap="Blues", aspect="auto")
    largest = max(map(max, found["confusion"]))
    for row, counts in enumerate(found["confusion"]):
        for column, count in enumerate(counts):
            color = "white" if 2 * count > largest else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
