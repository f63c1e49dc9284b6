"""Losses of classification against those of transformers, and class weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from classify_parts import LABELS, TEXTS, TYPES, write_labelled
from numerics import assert_gradients_close, ulps
from tiny import make_family

from litmini.checkpoints.hf import load_model
from litmini.config.classify import ClassesConfig, FinetuneClassifierConfig, LabelledDataConfig
from litmini.data.labelled import LabelledExamples, LabelledSequences, load_labelled, model_inputs
from litmini.data.labels import MULTI, REGRESSION, SINGLE
from litmini.errors import UserError
from litmini.evaluation.classification import measure
from litmini.methods.heads import use_scores
from litmini.tasks.classify import Classification, label_weights, save_classifier
from litmini.tokenizer import Tokenizer
from litmini.training.setup import on_device


def examples_of(base: Path, tmp_path: Path, kind: str, copies: int = 1) -> LabelledExamples:
    file = write_labelled(tmp_path / f"{kind}.jsonl", kind, copies)
    examples, _ = load_labelled(LabelledDataConfig(str(file), max_seq_len=64), Tokenizer(base), 0)
    assert examples.problem_type == kind
    return examples


def classifier(base: Path, kind: str) -> Any:
    """With scores far from zero."""
    torch.manual_seed(0)
    model = load_model(base, torch.float32)
    use_scores(model, 1 if kind == REGRESSION else 3).weight.data.mul_(20)
    return model


def gradients(model: Any, objective: Classification, batches: list[Any], units: int) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    losses = [objective.loss(model, batch) / units for batch in batches]
    sum(losses).backward()
    return float(sum(losses).detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_loss_and_gradients_are_those_of_transformers(tokenizer_dir, tmp_path, model_type, kind):
    """Texts of several lengths: packed here, padded there. A mean over texts; of several labels, over labels as well."""
    base = make_family(model_type, tmp_path / "base", tokenizer_dir)
    examples, model = examples_of(base, tmp_path, kind), classifier(base, kind)
    (tmp_path / "final").mkdir()
    config = FinetuneClassifierConfig(checkpoint_dir=str(base), out_dir="x", data=LabelledDataConfig("x"), lora=None)
    names: Any = SimpleNamespace(names=examples.names, tokenizer=Tokenizer(base))
    save_classifier(model, tmp_path / "final", config, names, kind)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert theirs.config.problem_type == kind
    data = LabelledSequences(examples, 64, False, 0)
    batch = data.batch([[0, 3, 4], [1], [2, 5]])
    loss, found = gradients(model, Classification(kind), [batch], 6)
    rows = [examples[i][0] for i in range(6)]
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    tokens = torch.tensor([[*row, *[theirs.config.pad_token_id] * (longest - len(row))] for row in rows])
    expected = theirs.eval()(input_ids=tokens, attention_mask=mask, labels=torch.from_numpy(examples.targets)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    own = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, gradient in found.items():
        reference = own[name.removeprefix("model.")]
        assert float((gradient - reference).norm()) <= 1e-5 * float(reference.norm()) + 1e-7, name


@pytest.mark.parametrize("kind", TYPES)
def test_one_micro_batch_of_eight_equals_eight_of_one_with_weights(tiny_dir, tmp_path, kind):
    """A micro-batch of light classes alone counts as much as beside heavy ones."""
    examples, model = examples_of(tiny_dir, tmp_path, kind, 2), classifier(tiny_dir, kind)
    weights = None if kind == REGRESSION else label_weights(examples, {"fruit": 5.0, "tools": 0.1})
    objective, data = Classification(kind, weights), LabelledSequences(examples, 64, False, 0)
    rows = [[i] for i in range(8)]
    together, apart = [data.batch([[0, 1, 2], [3, 4, 5], [6, 7]])], [data.batch([row]) for row in [*rows, []]]
    assert sum(map(objective.count, together)) == sum(map(objective.count, apart)) == 8
    loss, expected = gradients(model, objective, together, 8)
    again, found = gradients(model, objective, apart, 8)
    assert again == pytest.approx(loss, rel=ulps())
    assert_gradients_close(found, expected)
    ready = [on_device(together[0], torch.device("cpu"), "sdpa")]
    assert gradients(model, objective, ready, 8)[0] == pytest.approx(loss, rel=1e-5)
    if weights is not None:
        unweighted, _ = gradients(model, Classification(kind), together, 8)
        assert unweighted != pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("kind", TYPES)
def test_the_metric_of_a_step_is_that_of_validation(tiny_dir, tmp_path, kind):
    """Over micro-batches, and again from zero after it was taken."""
    examples, model = examples_of(tiny_dir, tmp_path, kind, 2), classifier(tiny_dir, kind)
    objective, data = Classification(kind), LabelledSequences(examples, 64, False, 0, shuffle=False)
    batches = [data.batch([[0, 1, 2, 3, 4]]), data.batch([[i] for i in range(5, len(examples))])]
    with torch.no_grad():
        scores = torch.cat([model(**model_inputs(batch))[0] for batch in batches])
        for _ in range(2):
            for batch in batches:
                objective.loss(model, batch)
            expected = measure(scores.numpy(), examples.targets, kind)
            found = objective.metrics(objective.take_sums().tolist())
            assert found == {name: pytest.approx(expected[name], rel=1e-6) for name in objective.names}
    assert objective.take_sums().tolist() == [0.0, 0.0]


def test_weights_are_those_of_torch(tiny_dir, tmp_path):
    """Summed; torch's mean would divide by the weights of the micro-batch."""
    for kind in (SINGLE, MULTI):
        examples, model = examples_of(tiny_dir, tmp_path, kind), classifier(tiny_dir, kind)
        weights = torch.tensor([0.5, 2.0, 3.0])
        batch = LabelledSequences(examples, 64, False, 0).batch([list(range(6))])
        with torch.no_grad():
            scores, _ = model(**{k: batch[k] for k in ("tokens", "positions", "documents", "labels")})
            targets = torch.from_numpy(examples.targets)
            if kind == SINGLE:
                expected = torch.nn.CrossEntropyLoss(weights)(scores, targets) * weights[targets].sum()
            else:
                expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(scores, targets) * 6
            assert float(Classification(kind, weights).loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_weights(tiny_dir, tmp_path):
    single, several = (examples_of(tiny_dir, tmp_path, kind) for kind in (SINGLE, MULTI))
    single.texts[0].append(single.texts[0][0])
    weights = label_weights(single, "balanced")
    assert weights is not None and weights.tolist() == [1.0, 1.0, 1.0]
    found = label_weights(several, "balanced")  # fruit 3, tools 2, weather 3 of 6
    assert found is not None and found.tolist() == [1.0, 2.0, 1.0]
    assert label_weights(single, None) is None
    given = label_weights(single, {"tools": 2.0})
    assert given is not None and given.tolist() == [1.0, 2.0, 1.0]


def test_weights_that_are_refused(tiny_dir, tmp_path):
    with pytest.raises(UserError, match="there is no class toys; the classes are fruit, tools, weather"):
        label_weights(examples_of(tiny_dir, tmp_path, SINGLE), {"toys": 2.0})
    with pytest.raises(UserError, match="these labels are numbers"):
        label_weights(examples_of(tiny_dir, tmp_path, REGRESSION), "balanced")
    for wrong, expected in (("heavy", "expected balanced"), ({"a": 0.0}, "classes.weights")):
        with pytest.raises(UserError, match=expected):
            ClassesConfig(weights=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a regression has none"):
        ClassesConfig(REGRESSION, "balanced")


def test_a_batch_has_what_its_examples_have(tiny_dir, tmp_path):
    examples = examples_of(tiny_dir, tmp_path, MULTI)
    batch = LabelledSequences(examples, 64, False, 0).batch([[3], [], [5, 0]])
    assert batch["numbers"].tolist() == [3, 5, 0] and examples.names == ["fruit", "tools", "weather"]
    assert batch["targets"].tolist() == [[0, 1, 1], [1, 0, 1], [1, 0, 0]]
    assert len(TEXTS) == len(LABELS[MULTI]) == len(examples)
