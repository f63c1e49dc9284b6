"""Labels and conversations as they are read, and runs of every problem type from data to what is loaded elsewhere."""

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from classify_parts import TYPES, write_labelled
from numerics import assert_close
from test_classify import ROOT, data_config, run, words
from tiny import make_family

import litmini
from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.config.classify import FinetuneClassifierConfig, LabelledDataConfig
from litmini.config.finetune import LoraConfig
from litmini.data.labelled import load_labelled
from litmini.data.labels import MULTI, REGRESSION, SINGLE
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters
from litmini.methods.heads import use_scores
from litmini.tasks.classify import save_classifier, with_score
from litmini.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "is it <|im_end|> broken?"}, {"role": "assistant", "content": "no"}]


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_conversations_have_the_tokens_of_their_template(tiny_dir, tmp_path):
    """Beside texts, and with control tokens in what users say as text."""
    plain = [{"role": "user", "content": "is it broken?"}]
    rows = [{"messages": plain, "label": "b"}, {"text": "is it?", "label": "a"}, {"messages": CHAT, "label": "a"}]
    tokenizer = Tokenizer(tiny_dir)
    examples, _ = load_labelled(data_config(write_rows(tmp_path / "a.jsonl", *rows)), tokenizer, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_dir)
    assert examples[0][0].tolist() == theirs.apply_chat_template(plain)["input_ids"]
    assert examples[1][0].tolist() == theirs("is it?")["input_ids"] and examples.targets.tolist() == [1, 0, 0]
    ends = tokenizer.encode("<|im_end|>", special=False)
    assert examples[2][0].tolist().count(ends[0]) == 2  # of the two turns
    assert examples.records()[2].text == "is it <|im_end|> broken?\nno"


def test_a_conversation_that_the_template_refuses_is_named(tiny_dir, tmp_path):
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    file = write_rows(tmp_path / "a.jsonl", {"text": "x", "label": "a"}, {"messages": CHAT, "label": "b"})
    with pytest.raises(UserError, match=r"a.jsonl:2: .*no system turn"):
        load_labelled(data_config(file), Tokenizer(base), 0)


@pytest.mark.parametrize(
    ("labels", "asked", "found", "targets"),
    [
        ([1, 0, 1], "auto", SINGLE, [1, 0, 1]),
        ([1, 0.5, 3], "auto", REGRESSION, [1, 0.5, 3]),
        ([1, 0, 3], REGRESSION, REGRESSION, [1, 0, 3]),
        (["1", "0.5", "3"], REGRESSION, REGRESSION, [1, 0.5, 3]),
        ([["b", 1], [], ["a"]], "auto", MULTI, [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([["b"], ["a"]], MULTI, MULTI, [[0, 1], [1, 0]]),
    ],
)
def test_labels_say_what_is_learned(tiny_dir, tmp_path, labels, asked, found, targets):
    file = write_rows(tmp_path / "a.jsonl", *({"text": "x", "label": label} for label in labels))
    examples, _ = load_labelled(data_config(file), Tokenizer(tiny_dir), 0, asked)
    assert examples.problem_type == found and examples.targets.tolist() == targets


@pytest.mark.parametrize(
    ("labels", "asked", "expected"),
    [
        ([0.5, 1.0], SINGLE, "a.jsonl:1: label is 0.5, expected the name of one class"),
        (["a", "b"], MULTI, "a.jsonl:1: label is 'a', expected a list of labels"),
        ([1.5, "b"], REGRESSION, "a.jsonl:2: label is 'b', expected a number"),
        ([["a"], ["b"]], REGRESSION, "a.jsonl:1: label is ['a'], expected a number"),
        ([["a"], ["b"]], SINGLE, "a.jsonl:1: label is ['a'], expected the name of one class"),
    ],
)
def test_other_labels_than_asked_for(tiny_dir, tmp_path, labels, asked, expected):
    file = write_rows(tmp_path / "a.jsonl", *({"text": "x", "label": label} for label in labels))
    with pytest.raises(UserError, match=re.escape(expected)):
        load_labelled(data_config(file), Tokenizer(tiny_dir), 0, asked)


def test_cells_of_csv(tiny_dir, tmp_path):
    (tmp_path / "a.csv").write_text('text,label\nx,"[""a"", ""b""]"\ny,[]\n')
    (tmp_path / "b.csv").write_text("text,label\nx,0.5\ny,2\n")
    tokenizer = Tokenizer(tiny_dir)
    assert load_labelled(data_config(tmp_path / "a.csv"), tokenizer, 0)[0].targets.tolist() == [[1, 1], [0, 0]]
    values, _ = load_labelled(data_config(tmp_path / "b.csv"), tokenizer, 0, REGRESSION)
    assert values.targets.tolist() == [0.5, 2]
    names, _ = load_labelled(data_config(tmp_path / "b.csv"), tokenizer, 0)
    assert names.names == ["0.5", "2"]


@pytest.mark.parametrize(
    ("kind", "label", "expected"),
    [
        (SINGLE, "toys", "val.jsonl:1: 'toys'"),
        (MULTI, ["fruit", "toys"], "val.jsonl:1: 'fruit', 'toys'"),
        (SINGLE, ["fruit"], "val.jsonl:1: label is ['fruit'], expected the name of one class"),
        (MULTI, "fruit", "val.jsonl:1: label is 'fruit', expected a list"),
        (REGRESSION, "much", "val.jsonl:1: label is 'much', expected a number"),
    ],
)
def test_validation_labels_that_do_not_fit(tiny_dir, tmp_path, kind, label, expected):
    train = write_labelled(tmp_path / "train.jsonl", kind)
    val = write_rows(tmp_path / "val.jsonl", {"text": "x", "label": label})
    with pytest.raises(UserError, match=re.escape(expected)):
        load_labelled(data_config(train, val_path=str(val)), Tokenizer(tiny_dir), 0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_from_data_to_what_is_loaded_elsewhere(tiny_dir, tmp_path, capfd, kind, lora):
    """Training lowers the loss; baselines stand beside it; adapter, merged, converted and verified scores agree."""
    files = write_labelled(tmp_path / "train.jsonl", kind, 4), write_labelled(tmp_path / "val.jsonl", kind, 2, 5)
    method = ["--lora.rank", 4] if lora else ["--lora", "null"]
    weights = [] if kind == REGRESSION else ["--classes.weights", "balanced"]
    rate = ["--train.max_steps", 25, "--optim.lr", "3e-3", "--seed", 3]
    out = run(capfd, *words(tiny_dir, files, tmp_path / "run", *method, *weights, *rate))
    results = json.loads((tmp_path / "run/manifest.json").read_text())["results"]
    assert results["val_loss_after"] < 0.85 * results["val_loss_before"]
    rows = results["classification"]
    assert len(rows) == 4 and not any(isinstance(row, str) for row in rows.values())
    key = "r2" if kind == REGRESSION else "accuracy"
    assert results[f"{key}_after"] == rows["this model after training"][key]
    assert all(name in out for name in rows) and "On the 12 validation examples" in out
    report = (tmp_path / "run/report.html").read_text()
    assert all(name in report for name in rows) and ("reliability" in report) == (kind != REGRESSION)

    final, loading = tmp_path / "run/final", transformers.AutoModelForSequenceClassification.from_pretrained
    config = transformers.AutoConfig.from_pretrained(final)
    assert config.problem_type == kind and config.num_labels == (1 if kind == REGRESSION else 3)
    ids = torch.randint(3, 512, (1, 9), generator=torch.Generator().manual_seed(2))
    if lora:
        given = ["--checkpoint_dir", tiny_dir, "--adapter_dir", final]
        theirs: Any = peft.PeftModel.from_pretrained(loading(tiny_dir, config=config, dtype=torch.float32), final)
        ours, _ = litmini.load(tiny_dir, final, dtype="fp32")
    else:
        given = ["--checkpoint_dir", final]
        theirs, (ours, _) = loading(final, dtype=torch.float32), litmini.load(final, dtype="fp32")
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert_close(ours.eval()(ids)[:, -1], expected)

    measured = tmp_path / "measured.json"
    shown = run(capfd, *given, "--classify", files[1], "--dtype", "fp32", "--out", measured, script="evaluate")
    again = json.loads(measured.read_text())["classify"]
    assert again["problem_type"] == kind and f"12 texts of {files[1]}" in shown
    for name, value in rows["this model after training"].items():
        if isinstance(value, float) and name != "temperature":
            assert again[name] == pytest.approx(value, abs=1e-4), name
    for script, more in (("serve", []), ("generate", ["--prompt", "a"]), ("evaluate", ["--perplexity", files[1]])):
        assert f"{final} is a classifier" in run(capfd, *given, *more, status=1, script=script)
    place = tmp_path / "other"
    if lora:
        said = run(capfd, *given, "--out_dir", place, script="merge_adapter")
        assert "merged and unmerged: scores differ by at most" in said
    else:
        run(capfd, final, "--out_dir", place, script="convert_to_hf")
    whole = loading(place, dtype=torch.float32)
    assert whole.config.id2label == config.id2label and whole.config.problem_type == kind
    with torch.no_grad():
        assert_close(whole.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)
    checked = run(capfd, *([tiny_dir, "--adapter_dir", final] if lora else [place]), script="verify")
    assert f"scores = {'peft' if lora else 'transformers'}, fp32" in checked and "FAILED" not in checked
    assert "skipped" not in checked and "packed = unpacked" in checked


@pytest.mark.parametrize("kind", TYPES)
def test_a_preview_of_every_problem_type(tiny_dir, tmp_path, capfd, kind):
    """And weights as they are typed."""
    files = write_labelled(tmp_path / "train.jsonl", kind, 4), write_labelled(tmp_path / "val.jsonl", kind)
    more = [] if kind == REGRESSION else ["--classes.weights", "{fruit: 2, tools: 0.5}"]
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--dry_run", "--show_masks", 1, *more))
    shown = {SINGLE: "class fruit", MULTI: "labels fruit", REGRESSION: "value 0.5"}[kind]
    assert f"{shown}\napples and pears" in out and "peak memory of the process" in out and "cannot be" not in out
    assert f"labels: {kind}" in out


def test_settings_and_data_that_do_not_fit(tiny_dir, files, tmp_path, capfd):
    both = words(tiny_dir, (files, files), tmp_path / "x")
    assert "there is no class toys" in run(capfd, *both, "--classes.weights", "{toys: 2}", status=1)
    assert "expected balanced" in run(capfd, *both, "--classes.weights", "heavy", status=2)
    error = run(capfd, *both, "--classes.problem_type", MULTI, status=1)
    assert "texts.jsonl:1: label is 'fruit', expected a list of labels: --classes.problem_type is multi" in error
    assert not (tmp_path / "x").exists()


def test_a_run_without_validation_data_says_so(tiny_dir, files, tmp_path, capfd):
    given = words(tiny_dir, (files, files), tmp_path / "run", "--data.val_path", "null", "--train.max_steps", 1)
    assert "no validation data, so nothing is measured" in run(capfd, *given)


def test_the_data_of_the_quickstart_are_what_their_script_writes(tmp_path):
    made = runpy.run_path(str(ROOT / "scripts/examples/make_classifier_data.py"))
    for name, sentences, things, copies, seed in (
        ("train", made["TRAIN"], made["THINGS"], 5, 1),
        ("heldout", made["VALIDATION"], made["NEW_THINGS"], 2, 2),
    ):
        made["write"](tmp_path / name, sentences, things, copies, seed)
        assert (tmp_path / name).read_bytes() == (ROOT / f"config_hub/classifier/{name}.jsonl").read_bytes()
    lines = [{line for label in made[key].values() for line in label} for key in ("TRAIN", "VALIDATION")]
    assert not lines[0] & lines[1] and not set(made["THINGS"]) & set(made["NEW_THINGS"])


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral", "falcon"])
@pytest.mark.parametrize("has_names", [True, False])
def test_merged_scores_of_other_families(tokenizer_dir, tmp_path, model_type, has_names):
    """Tied heads, heads of their own, other layouts on disk; and an adapter of PEFT's, without the names of its classes."""
    base = make_family(model_type, tmp_path / "base", tokenizer_dir)
    torch.manual_seed(0)
    model: Any = load_model(base, torch.float32)
    use_scores(model, 3)
    lora = with_score(LoraConfig(rank=4))
    add_adapters(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    (tmp_path / "final").mkdir()
    config = FinetuneClassifierConfig(checkpoint_dir=str(base), out_dir="x", data=LabelledDataConfig("x"), lora=lora)
    data: Any = SimpleNamespace(names=["a", "b", "c"], tokenizer=Tokenizer(base))
    save_classifier(model, tmp_path / "final", config, data, MULTI)
    if not has_names:
        (tmp_path / "final/config.json").unlink()
    export(base, tmp_path / "merged", tmp_path / "final", torch.float32)
    theirs: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert theirs.config.id2label[2] == ("c" if has_names else "LABEL_2")
    assert theirs.config.problem_type == (MULTI if has_names else SINGLE)
    ids, labels = torch.randint(3, 512, (2, 9)), torch.full((2, 9), -100)
    labels[:, -1] = 0
    with torch.no_grad():
        expected, _ = model.eval()(ids, labels=labels)
        assert_close(theirs.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)
        ours, _ = litmini.load(tmp_path / "merged", dtype="fp32")
        assert_close(ours.eval()(ids, labels=labels)[0], expected)


def test_evaluate_refuses_what_is_no_classifier(tiny_dir, files, capfd):
    error = run(capfd, "--checkpoint_dir", tiny_dir, "--classify", files, status=1, script="evaluate")
    assert f"{tiny_dir} is no classifier: it gives tokens" in error
    error = run(capfd, "--checkpoint_dir", tiny_dir, "--classify", "a", "--reward", "b", status=2, script="evaluate")
    assert "give one of them" in error


@pytest.fixture
def files(tmp_path) -> Path:
    return write_labelled(tmp_path / "texts.jsonl", SINGLE)
