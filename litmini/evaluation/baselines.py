"""What a classifier must beat: the majority class, and a logistic regression on a bag of words. Both take milliseconds."""

import warnings
from typing import Any

import numpy as np

from litmini.data.labels import MULTI, REGRESSION, SINGLE

INSTALL = "not measured: pip install 'litmini[classify]' (scikit-learn)"
WORDS = r"(?u)\b\w+\b"


def constant(targets: np.ndarray, n_classes: int, count: int, problem_type: str) -> np.ndarray:
    """Return the same scores for each of `count` texts, (count, classes): of a regression the mean of the training targets,
    else logits of how often each class occurs among them."""
    if problem_type == REGRESSION:
        row = np.array([targets.mean()], np.float64)
    elif problem_type == SINGLE:
        row = np.log(np.maximum(np.bincount(targets, minlength=n_classes), 0.5) / len(targets))
    else:
        row = _logit(targets.mean(0, dtype=np.float64))
    return np.tile(row, (count, 1))


def _logit(share: Any) -> Any:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return np.log(share / (1 - share))


def bag_of_words(
    train: list[str], targets: np.ndarray, val: list[str], n_classes: int, problem_type: str, balanced: bool
) -> np.ndarray | str:
    """Return the scores of a linear model on the counts of words, (texts, classes), or why there are none.

    It is scikit-learn's `LogisticRegression` (one for each label, if there are several), or its `Ridge` for a regression, with
    their default strength of regularization, on its `CountVectorizer`.

    Args:
        balanced: whether classes are weighed by their frequency.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression, Ridge
    except ImportError:
        return INSTALL
    counter = CountVectorizer(token_pattern=WORDS)
    try:
        words, others = counter.fit_transform(train), None
    except ValueError:
        return "not measured: the training texts have no words"
    others = counter.transform(val)

    def scores_of(labels: np.ndarray) -> np.ndarray:
        """Return the logit of each label that occurs, (texts,) of two, else (texts, labels)."""
        model = LogisticRegression(max_iter=1000, class_weight="balanced" if balanced else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(words, labels).decision_function(others)  # type: ignore[no-any-return]

    if problem_type == REGRESSION:
        return Ridge().fit(words, targets).predict(others)[:, None]  # type: ignore[no-any-return]
    if problem_type == MULTI:
        columns = [
            scores_of(column) if 0 < column.sum() < len(column) else np.full(len(val), _logit(column.mean()))
            for column in targets.T
        ]
        return np.stack(columns, 1)
    scores = scores_of(targets)
    return np.stack([-scores / 2, scores / 2], 1) if scores.ndim == 1 else scores  # of two classes, one logit
