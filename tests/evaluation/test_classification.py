"""Metrics of classifiers against scikit-learn, calibration, and the baselines."""

import sys
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from litmini.data.labels import MULTI, REGRESSION, SINGLE
from litmini.errors import UserError
from litmini.evaluation.baselines import INSTALL, WORDS, bag_of_words, constant
from litmini.evaluation.classification import confusion_lines, expected_error, fit_temperature, measure, roc_auc, table

DRAW = np.random.default_rng(0)


def softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("classes", [2, 4])
def test_one_label_as_scikit_learn(classes):
    scores, targets = DRAW.normal(size=(200, classes)), DRAW.integers(0, classes, 200)
    scores[np.arange(200), targets] += 1
    found, predicted = measure(scores, targets, SINGLE), scores.argmax(1)
    assert found["accuracy"] == reference.accuracy_score(targets, predicted)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert found["confusion"] == reference.confusion_matrix(targets, predicted).tolist()
    areas = [reference.roc_auc_score(targets == c, softmax(scores)[:, c]) for c in range(classes)]
    assert found["roc_auc"] == pytest.approx(np.mean(areas))
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]


def test_a_class_that_does_not_occur_is_left_out():
    scores, targets = np.eye(3)[[0, 1, 0, 0]], np.array([0, 1, 1, 0])
    found = measure(scores, targets, SINGLE)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, [0, 1, 0, 0], average="macro"))
    assert found["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert measure(scores, np.zeros(4, int), SINGLE)["roc_auc"] is None


def test_several_labels_as_scikit_learn():
    scores, targets = DRAW.normal(size=(150, 3)), DRAW.integers(0, 2, (150, 3)).astype(np.float32)
    found, predicted = measure(scores, targets, MULTI), (scores > 0).astype(int)
    assert found["accuracy"] == reference.accuracy_score(targets, predicted)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert found["roc_auc"] == pytest.approx(reference.roc_auc_score(targets, scores))
    assert found["confusion"] == reference.multilabel_confusion_matrix(targets, predicted).tolist()


def test_equal_scores_count_half():
    scores, truth = DRAW.integers(0, 4, 80).astype(float), DRAW.integers(0, 2, 80)
    assert roc_auc(scores, truth) == pytest.approx(reference.roc_auc_score(truth, scores))
    assert roc_auc(np.ones(80), truth) == 0.5


def test_values_as_scikit_learn():
    values, targets = DRAW.normal(size=(60, 1)), DRAW.normal(size=60)
    found = measure(values, targets, REGRESSION)
    assert found["mse"] == pytest.approx(reference.mean_squared_error(targets, values[:, 0]))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(targets, values[:, 0]))
    assert found["r2"] == pytest.approx(reference.r2_score(targets, values[:, 0]))
    assert found["pearson"] == pytest.approx(np.corrcoef(values[:, 0], targets)[0, 1])
    assert measure(np.zeros((4, 1)), np.ones(4), REGRESSION)["r2"] is None


def overconfident(n: int, single: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are three times too large for their labels."""
    draw = np.random.default_rng(1)
    logits = draw.normal(size=(n, 3)) * 1.5
    if not single:
        return 3 * logits, (draw.random((n, 3)) < 1 / (1 + np.exp(-logits))).astype(float)
    chances = softmax(logits)
    return 3 * logits, np.array([draw.choice(3, p=row) for row in chances])


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_a_temperature_repairs_overconfidence(kind):
    scores, targets = overconfident(3000, kind == SINGLE)
    found = measure(scores, targets, kind)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["ece"] > 0.12 > 0.04 > found["ece_calibrated"]
    for when, ece in (("before", "ece"), ("after", "ece_calibrated")):
        bins = found["reliability"][when]
        assert sum(count for count, _, _ in bins) == scores.size // (3 if kind == SINGLE else 1)
        assert expected_error(bins) == found[ece]


def test_the_temperature_has_the_lowest_cross_entropy():
    scores, targets = overconfident(500, True)
    truth = np.eye(3)[targets]
    best = fit_temperature(scores, truth, True)

    def loss(temperature: float) -> float:
        return float(reference.log_loss(targets, softmax(scores / temperature)))

    assert loss(best) < min(loss(best * 1.05), loss(best / 1.05))
    assert fit_temperature(10 * truth, truth, True) == pytest.approx(0.05, rel=0.01)  # separated: the bound


def test_calibration_is_measured_on_the_other_half():
    """Of noise, a temperature that is fitted to the same examples would look better than it is."""
    scores, targets = np.random.default_rng(3).normal(size=(40, 3)) * 8, np.random.default_rng(4).integers(0, 3, 40)
    order = np.argsort(targets, kind="stable")
    halves = np.empty(40, int)
    halves[order] = np.arange(40) % 2
    found = measure(scores, targets, SINGLE)
    truth, bins = np.eye(3)[targets], found["reliability"]["after"]
    total = sum(
        softmax(scores[halves == half] / fit_temperature(scores[halves != half], truth[halves != half], True))
        .max(1)
        .sum()
        for half in (0, 1)
    )
    assert sum(count * confidence for count, confidence, _ in bins) == pytest.approx(total)


def test_scores_that_are_not_finite():
    with pytest.raises(UserError, match="NaN or infinite"):
        measure(np.array([[np.nan, 1.0]]), np.array([0]), SINGLE)


def test_ece_by_hand():
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.62, 0.38], [0.38, 0.62]])
    found = measure(np.log(chances), np.array([0, 1, 0, 1]), SINGLE)
    assert found["ece"] == pytest.approx((2 * abs(0.9 - 0.5) + 2 * abs(0.62 - 1)) / 4)


TRAIN = ["good tea", "good cake", "bad tea", "bad cake", "good day", "bad day"]


def test_the_bag_of_words_is_scikit_learns():
    targets = np.array([1, 1, 0, 0, 1, 0])
    others = ["a good pie", "bad luck"]
    scores: Any = bag_of_words(TRAIN, targets, others, 2, SINGLE, False)
    counter = CountVectorizer(token_pattern=WORDS)
    model = LogisticRegression().fit(counter.fit_transform(TRAIN), targets)
    expected = model.predict_proba(counter.transform(others))
    assert np.allclose(softmax(scores), expected) and scores.argmax(1).tolist() == [1, 0]
    three: Any = bag_of_words(TRAIN, np.array([0, 1, 2, 2, 0, 2]), others, 3, SINGLE, True)
    assert three.shape == (2, 3)


def test_baselines_of_labels_and_values():
    several = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores: Any = bag_of_words(TRAIN, several, ["good", "bad"], 3, MULTI, False)
    assert (scores > 0).tolist() == [[True, False, True], [False, False, True]]
    values: Any = bag_of_words(TRAIN, several[:, 0], ["good", "bad"], 1, REGRESSION, False)
    assert values[0, 0] > 0.5 > values[1, 0]
    assert constant(np.array([0, 1, 1]), 2, 2, SINGLE).argmax(1).tolist() == [1, 1]
    assert np.allclose(softmax(constant(np.array([0, 1, 1]), 2, 1, SINGLE)), [[1 / 3, 2 / 3]])
    assert (constant(several, 3, 1, MULTI) > 0).tolist() == [[False, False, True]]
    assert constant(np.array([1.0, 3.0]), 1, 2, REGRESSION).tolist() == [[2.0], [2.0]]


def test_what_keeps_the_bag_of_words_from_being_measured(monkeypatch):
    assert "no words" in bag_of_words(["!", "?"], np.array([0, 1]), ["!"], 2, SINGLE, False)
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert bag_of_words(TRAIN, np.array([0, 1] * 3), TRAIN, 2, SINGLE, False) == INSTALL
    lines = table({"majority class": measure(np.eye(2), np.array([0, 1]), SINGLE), "bag of words": INSTALL})
    assert "pip install" in lines[2] and "100.0%" in lines[1]


def test_confusion_lines():
    found = measure(np.eye(2)[[0, 0, 1]], np.array([0, 1, 1]), SINGLE)
    lines = confusion_lines(found, ["no", "yes"], SINGLE)
    assert [line.split()[-2:] for line in lines[1:]] == [["1", "0"], ["1", "1"]]
    found = measure(np.array([[1.0, -1], [1, 1]]), np.array([[1.0, 1], [0, 1]]), MULTI)
    lines = confusion_lines(found, ["a", "b"], MULTI)
    assert lines[1].split() == ["a", "0", "1", "1"] and lines[2].split() == ["b", "1", "0", "1"]
    assert confusion_lines({}, ["value"], REGRESSION) == []
