"""Perplexity, exact match, and lm-eval's tasks."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import ulps

import litmini
from litmini.data.formats import read_examples
from litmini.errors import UserError
from litmini.evaluation.lm_eval_harness import log_likelihoods, make_lm, run_tasks
from litmini.evaluation.metrics import exact_match, perplexity, predict

TEXT = "Two large mugs to Oslo, please. Regards, Vera. " * 6


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    return litmini.load(tiny_dir, dtype="fp32")


def test_perplexity_of_one_window_is_the_loss_of_the_text(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode(TEXT)])
    loss = F.cross_entropy(model(ids)[0, :-1].detach(), ids[0, 1:], reduction="sum")
    found = perplexity(model, tokenizer, TEXT, window=ids.shape[1], stride=50)
    assert found.n_targets == ids.shape[1] - 1
    assert found.loss_sum == pytest.approx(float(loss), rel=ulps())
    assert found.perplexity == pytest.approx(math.exp(float(loss) / found.n_targets), rel=ulps())
    assert found.bits_per_byte == pytest.approx(float(loss) / math.log(2) / len(TEXT), rel=ulps())


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (20, 3), (2, 1)])
def test_perplexity_slides(loaded, window, stride):
    """Each token once, after what its window holds before it."""
    model, tokenizer = loaded
    ids = tokenizer.encode(TEXT)
    expected, done = 0.0, 0
    with torch.no_grad():
        while done < len(ids) - 1:
            start = max(0, done - (window - stride))
            stop = min(len(ids), start + window + 1)
            start = max(0, stop - window - 1)
            logs = model(torch.tensor([ids[start : stop - 1]]))[0].log_softmax(-1)
            for target in range(done + 1, stop):
                expected -= float(logs[target - 1 - start, ids[target]])
            done = stop - 1
    found = perplexity(model, tokenizer, TEXT, window, stride)
    assert found.n_targets == len(ids) - 1
    assert found.loss_sum == pytest.approx(expected, rel=ulps())


def test_perplexity_refuses(loaded):
    model, tokenizer = loaded
    for window, stride in ((300, 100), (16, 16), (16, 0)):
        with pytest.raises(UserError, match=rf"window {window} and stride {stride}.*<= 256"):
            perplexity(model, tokenizer, TEXT, window, stride)
    with pytest.raises(UserError, match="the text has 0 tokens"):
        perplexity(model, tokenizer, "", 16, 8)


def test_exact_match_of_a_file(loaded, tmp_path):
    model, tokenizer = loaded
    said = litmini.generate(model, tokenizer, "Say 7.", max_new_tokens=5)
    records = [("Say 7.", said), ("Say 7.", "something else"), ("Say 8 and 9.", "no")]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in records))
    predictions = predict(model, tokenizer, read_examples(str(file), True), 5, batch_size=2)
    assert exact_match(predictions) == pytest.approx(1 / 3)
    assert [p.prediction for p in predictions] == [
        litmini.generate(model, tokenizer, q, max_new_tokens=5) for q, _ in records
    ]


def test_log_likelihoods_of_a_ragged_batch(loaded):
    model, tokenizer = loaded
    contexts, ends = ["Two large", "a", "Say 7 and then"], [" mugs", " b c d", " 8"]
    pairs = [(tokenizer.encode(c), tokenizer.encode(e)) for c, e in zip(contexts, ends, strict=True)]
    with torch.no_grad():
        best = model(torch.tensor([pairs[0][0]]))[0, -1].argmax()
        pairs.append((pairs[0][0], [int(best)]))
        found = log_likelihoods(model, pairs)
        for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
            logits = model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
            logs = logits.log_softmax(-1)
            expected = sum(float(row[token]) for row, token in zip(logs, continuation, strict=True))
            assert value == pytest.approx(expected, abs=len(continuation) * ulps(scale=logits))
            assert greedy == (logs.argmax(-1).tolist() == continuation)
    assert [greedy for _, greedy in found] == [False, False, False, True]


def test_tasks_without_lm_eval_say_what_to_install(loaded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lm-eval\]"'):
        run_tasks(*loaded, ["anything"], None, None, None, 4)


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
output_type: {kind}
{more}
metric_list:
  - metric: {metric}
"""


@pytest.mark.parametrize(
    ("kind", "target", "metric", "more"),
    [
        ("multiple_choice", "label", "acc", 'doc_to_choice: "{{choices}}"'),
        ("generate_until", '"{{answer}}"', "exact_match", "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}"),
        ("loglikelihood_rolling", '"{{question}}"', "word_perplexity", ""),
    ],
)
def test_a_local_task_of_lm_eval_gives_what_its_own_model_gives(
    loaded, tiny_dir, tmp_path, monkeypatch, kind, target, metric, more
):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = loaded
    records = []
    for number in range(12):
        question = f"Send {number} mugs to town {'abc' * number}.\n"
        answer = tokenizer.decode(make_answer(model, tokenizer, question)) if number % 3 else "no"
        records.append({"question": question, "choices": ["one", "two of", "7"], "label": number % 3, "answer": answer})
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "task.yaml").write_text(TASK.format(kind=kind, target=target, metric=metric, more=more, file=file))
    ours = run_tasks(model, tokenizer, [f"local_{kind}"], str(tmp_path), None, 0, 5)[f"local_{kind}"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(
        HFLM(str(tiny_dir), dtype="float32", batch_size=5, device="cpu"),
        tasks=[f"local_{kind}"],
        num_fewshot=0,
        task_manager=manager,
        bootstrap_iters=0,
    )["results"][f"local_{kind}"]
    assert ours[f"{metric},none"] == pytest.approx(theirs[f"{metric},none"], rel=ulps())
    assert kind == "loglikelihood_rolling" or 0 < ours[f"{metric},none"] < 1


def make_answer(model, tokenizer, question: str) -> list[int]:
    class Request:
        args = (question, {"until": ["\n"], "max_gen_toks": 8})

    return tokenizer.encode(make_lm(model, tokenizer, 1).generate_until([Request])[0])
