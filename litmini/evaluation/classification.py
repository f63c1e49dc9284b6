"""What the scores of a classifier are worth: accuracy, F1, ROC-AUC, and calibration before and after temperature scaling.

Scores are logits, (examples, classes) fp64. Several labels: each label has a probability of its own, sigmoid(score).
"""

from typing import Any

import numpy as np

from litmini.data.labels import MULTI, REGRESSION, SINGLE
from litmini.errors import UserError
from litmini.evaluation.intervals import wilson

BINS = 15
COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "roc_auc": ("ROC-AUC", "{:.3f}"),
    "ece": ("ECE", "{:.3f}"),
    "ece_calibrated": ("calibrated", "{:.3f}"),
    "mse": ("MSE", "{:.4g}"),
    "mae": ("mean error", "{:.4g}"),
    "r2": ("R2", "{:.3f}"),
    "pearson": ("correlation", "{:.3f}"),
}
"""Metric -> its title and format in tables."""


def measure(scores: np.ndarray, targets: np.ndarray, problem_type: str) -> dict[str, Any]:
    """Return the metrics of scores against `LabelledExamples.targets`, as JSON has them; None where one is undefined.

    - `accuracy`: of several labels, the share of examples with all labels right; `interval`: 95%, Wilson's.
    - `macro_f1`: the mean of F1 over classes that occur among targets or predictions.
    - `roc_auc`: one class against the rest, the mean over classes.
    - `confusion`: examples by class (row) and predicted class; of several labels, for each label [[neither, predicted only],
      [missed, both]].
    - `ece`: the expected calibration error in 15 bins of equal width (Guo et al., arXiv 1706.04599); of several labels, of the
      probabilities of all labels. `ece_calibrated`: the same, each half of the examples with the temperature that fits the
      other half best. `temperature`: the one that fits all.
    - `reliability`: [examples, mean confidence, share that is right] of each bin, before and after.
    - Of a regression: `mse`, `mae`, `r2`, `pearson`.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise UserError("the model gives scores that are NaN or infinite: its weights are damaged. Train it again.")
    if problem_type == REGRESSION:
        return _regression(scores[:, 0], targets.astype(np.float64))
    single = problem_type == SINGLE
    truth = np.eye(scores.shape[1])[targets] if single else targets.astype(np.float64)  # (n, classes)
    predicted = np.eye(scores.shape[1])[scores.argmax(1)] if single else (scores > 0).astype(np.float64)
    both, right = truth * predicted, int((truth == predicted).all(1).sum())
    n, hits, positive, said = len(scores), both.sum(0), truth.sum(0), predicted.sum(0)
    occurs = positive + said > 0
    found: dict[str, Any] = {"examples": n, "accuracy": right / n, "interval": list(wilson(right, n))}
    found["macro_f1"] = float((2 * hits / np.maximum(positive + said, 1))[occurs].mean()) if occurs.any() else None
    areas = [area for area in map(roc_auc, _chances(scores, single).T, truth.T) if area is not None]
    found["roc_auc"] = float(np.mean(areas)) if areas else None
    found["confusion"] = (truth.T @ predicted if single else _confusions(truth, predicted)).astype(int).tolist()
    return found | _calibration(scores, truth, single)


def _regression(values: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    errors, total = values - targets, float(np.square(targets - targets.mean()).sum())
    varies = total > 0 and float(values.std()) > 0
    return {
        "examples": len(values),
        "mse": float(np.square(errors).mean()),
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - float(np.square(errors).sum()) / total if total else None,
        "pearson": float(np.corrcoef(values, targets)[0, 1]) if varies else None,
    }


def _confusions(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return (labels, 2, 2)."""
    cells = [[(truth == t) & (predicted == p) for p in (0, 1)] for t in (0, 1)]
    return np.array([[cell.sum(0) for cell in row] for row in cells]).transpose(2, 0, 1)


def _chances(scores: np.ndarray, single: bool, temperature: Any = 1.0) -> np.ndarray:
    """Return the probabilities of classes, (n, classes)."""
    scores = scores / temperature
    if not single:
        return 0.5 * (1 + np.tanh(scores / 2))
    exps = np.exp(scores - scores.max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)


def roc_auc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Return the probability that an example of the class has a higher score than another; equal ones count half."""
    positive = truth > 0
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # of equal scores, the mean
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def _calibration(scores: np.ndarray, truth: np.ndarray, single: bool) -> dict[str, Any]:
    halves = np.empty(len(scores), np.int64)
    order = np.argsort(truth.argmax(1), kind="stable") if single else np.arange(len(scores))
    halves[order] = np.arange(len(scores)) % 2  # each class is divided
    before = reliability(_chances(scores, single), truth, single)
    found = {"ece": expected_error(before), "temperature": fit_temperature(scores, truth, single)}
    if len(scores) < 2:
        return {**found, "ece_calibrated": None, "reliability": {"before": before, "after": []}}
    fitted = [fit_temperature(scores[halves == other], truth[halves == other], single) for other in (1, 0)]
    after = reliability(_chances(scores, single, np.array(fitted)[halves, None]), truth, single)
    return {**found, "ece_calibrated": expected_error(after), "reliability": {"before": before, "after": after}}


def reliability(chances: np.ndarray, truth: np.ndarray, single: bool) -> list[list[float]]:
    """Return [examples, mean confidence, share that is right] of each bin of confidence that has any."""
    if single:
        confidence, right = chances.max(1), truth[np.arange(len(truth)), chances.argmax(1)]
    else:
        confidence, right = chances.ravel(), truth.ravel()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, values, BINS) for values in (confidence, right)]
    return [[int(n), float(a / n), float(b / n)] for n, a, b in zip(count, *sums, strict=True) if n]


def expected_error(bins: list[list[float]]) -> float:
    """Return the mean difference of confidence and share that is right, over examples."""
    total = sum(count for count, _, _ in bins)
    return float(sum(count * abs(confidence - right) for count, confidence, right in bins) / total)


def fit_temperature(scores: np.ndarray, truth: np.ndarray, single: bool) -> float:
    """Return the temperature, 0.05 to 20, with the lowest cross entropy. It is convex in 1 / temperature: bisection."""
    low, high = 0.05, 20.0  # of 1 / temperature
    for _ in range(60):
        middle = (low * high) ** 0.5
        # the derivative: expected less true scores
        rises = float(((_chances(scores, single, 1 / middle) - truth) * scores).sum()) > 0
        low, high = (low, middle) if rises else (middle, high)
    return 1 / (low * high) ** 0.5


def table(rows: dict[str, dict[str, Any] | str]) -> list[str]:
    """Return lines of text: a row for each classifier, of its metrics, or of a text that says why there are none."""
    measured = [found for found in rows.values() if not isinstance(found, str)]
    columns = [key for key in COLUMNS if any(key in found for found in measured)]
    width = max(map(len, rows))
    lines = ["".join([" " * width, *(f"{COLUMNS[key][0]:>12}" for key in columns)])]
    for name, found in rows.items():
        cells = f"  {found}" if isinstance(found, str) else "".join(f"{shown(found, key):>12}" for key in columns)
        lines.append(f"{name:{width}}{cells}")
    return lines


def shown(found: dict[str, Any], key: str) -> str:
    """Return a metric as text."""
    value = found.get(key)
    return "-" if value is None else COLUMNS[key][1].format(value)


def confusion_lines(found: dict[str, Any], names: list[str], problem_type: str) -> list[str]:
    """Return the confusion matrix as lines of text; nothing of a regression or of more than 12 classes."""
    if problem_type == REGRESSION or len(names) > 12:
        return []
    if problem_type == MULTI:
        heads, rows = ["missed", "wrongly", "right"], [[m[1][0], m[0][1], m[1][1]] for m in found["confusion"]]
        lead = "label"
    else:
        heads, rows, lead = names, found["confusion"], "class, predicted as"
    width = max(len(lead), *map(len, names))
    cell = [max(len(head), 5) + 2 for head in heads]
    lines = [f"{lead:{width}}" + "".join(f"{head:>{size}}" for head, size in zip(heads, cell, strict=True))]
    return lines + [
        f"{name:{width}}" + "".join(f"{count:>{size}}" for count, size in zip(row, cell, strict=True))
        for name, row in zip(names, rows, strict=True)
    ]
