"""Classification: its data, its objective, and results that transformers and PEFT load with the same scores."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from lightning_fabric import Fabric
from numerics import assert_close, assert_gradients_close, difference, ulps
from safetensors.torch import load_file
from script_runs import run_script
from tiny import make_family
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from two import command, run_two, values

from litmini.checkpoints.classifier import UNSCORED
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter
from litmini.config.classify import FinetuneClassifierConfig, LabelledDataConfig
from litmini.config.finetune import LoraConfig
from litmini.config.preference import FinetuneRewardConfig, RewardDataConfig
from litmini.data.labelled import load_labelled
from litmini.data.packing import PackedDataset
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters
from litmini.methods.heads import use_scores
from litmini.models import FAMILIES
from litmini.ops.cross_entropy import IGNORE
from litmini.tasks import classify, reward
from litmini.tasks.classify import Classification, save_classifier, with_score
from litmini.tokenizer import Tokenizer
from litmini.training.setup import on_device

ROOT = Path(__file__).parents[2]
TEXTS = {
    "fruit": ["apples and pears", "a ripe plum", "plums from Oslo, with cherries", "one pear"],
    "tools": ["a hammer", "nails and a hammer", "saws, nails and screws for Lisbon", "one saw"],
    "weather": ["rain", "snow in Oslo and rain in Lisbon", "a storm with hail", "sun"],
}


def write(file: Path, copies: int = 1, first: int = 0) -> Path:
    rows = [
        {"text": f"{text}, number {i}", "label": label}
        for i in range(first, first + copies)
        for label, texts in TEXTS.items()
        for text in texts
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Training and validation files."""
    place = tmp_path_factory.mktemp("texts")
    return write(place / "train.jsonl", 5), write(place / "val.jsonl", 1, first=7)


def words(tiny_dir: Path, files: tuple[Path, Path], out_dir: Path, *more: object) -> list[str]:
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", files[0], "--data.val_path", files[1]]
    fixed += ["--data.max_seq_len", 64, "--precision", "32-true", "--optim.lr", "1e-2"]
    fixed += ["--train.global_batch_size", 3, "--train.micro_batch_size", 1, "--train.max_steps", 4]
    return list(map(str, [*fixed, *more]))


def run(capfd: Any, *arguments: object, status: int = 0, script: str = "finetune_classifier") -> str:
    return run_script(capfd, script, *arguments, status=status)


def data_config(path: object, **settings: Any) -> LabelledDataConfig:
    return LabelledDataConfig(str(path), **{"max_seq_len": 64, **settings})


def classifier(tiny_dir: Path, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model = load_model(tiny_dir, torch.float32)
    use_scores(model, 3)
    if lora:
        add_adapters(model, with_score(LoraConfig(rank=4)))
    return model


def moved(model: Any) -> Any:
    """With other values of all that is trained, as after training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = [Classification().loss(model, batch) for batch in batches]
    sum(losses).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(sum(losses).detach()), found


def test_texts_have_one_label_at_their_last_token(tiny_dir, files):
    tokenizer = Tokenizer(tiny_dir)
    train, val = load_labelled(data_config(files[0], val_path=str(files[1])), tokenizer, 0)
    assert train.names == val.names == ["fruit", "tools", "weather"] and len(train) == 60 and len(val) == 12
    for i, row in enumerate(map(json.loads, files[0].open())):
        ids, labels = train[i]
        assert ids.tolist() == tokenizer.encode(row["text"]) and not (labels[:-1] != IGNORE).any()
        assert train.names[labels[-1]] == row["label"]
    assert train.statistics["classes"] == {"fruit": 20, "tools": 20, "weather": 20}
    batch = PackedDataset(train, 64, True, 0).batch([[0, 4, 8], []])
    at = (batch["labels"] != IGNORE).nonzero()
    assert batch["labels"][at[:, 0], at[:, 1]].tolist() == [0, 1, 2] and at[:, 0].tolist() == [0, 0, 0]
    ends = np.cumsum([len(train[i][0]) for i in (0, 4, 8)]) - 1
    assert at[:, 1].tolist() == ends.tolist()


def test_long_texts_keep_their_first_tokens(tiny_dir, files):
    tokenizer = Tokenizer(tiny_dir)
    train, _ = load_labelled(data_config(files[0], max_seq_len=5), tokenizer, 0)
    first = json.loads(files[0].open().readline())["text"]
    assert train[0][0].tolist() == tokenizer.encode(first)[:5] and train[0][1][-1] == 0
    assert train.statistics["truncated_examples"] > 0


def test_a_fraction_is_split_off(tiny_dir, files):
    train, val = load_labelled(data_config(files[0], val_fraction=0.25), Tokenizer(tiny_dir), 0)
    assert (len(train), len(val)) == (45, 15)
    assert sorted([*train.locations(range(45)), *val.locations(range(15))]) == sorted(
        f"{files[0]}:{line}" for line in range(1, 61)
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, -1], ["-1", "9", "10"]),
        ([True, False], ["false", "true"]),
        (["b", "a", 3], ["3", "a", "b"]),
        (["2", 10], ["2", "10"]),
    ],
)
def test_names_of_classes(tiny_dir, tmp_path, labels, names):
    rows = [json.dumps({"text": "x", "label": label}) + "\n" for label in labels]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    assert load_labelled(data_config(tmp_path / "a.jsonl"), Tokenizer(tiny_dir), 0)[0].names == names


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}'], "train.jsonl:1: found text; expected text and label, or messages and label"),
        (['{"text": "a", "label": null}'], "train.jsonl:1: label is NoneType, expected the name or number of a class"),
        (['{"text": "a", "label": {"x": 1}}'], "label is dict"),
        (['{"text": "a", "label": [["x"]]}'], "label is list"),
        (['{"text": "a", "label": ["x", "x"]}'], "label has one name twice"),
        (['{"text": "a", "label": NaN}'], "train.jsonl:1: "),
        (['{"text": "a", "messages": [], "label": "x"}'], "has text and messages; expected one of them"),
        (['{"messages": [{"role": "user", "content": " "}], "label": "x"}'], "messages say nothing"),
        (['{"messages": [{"role": "who", "content": "a"}], "label": "x"}'], "role 'who'"),
        (
            ['{"text": "a", "label": "x"}', '{"text": "b", "label": ["y"]}'],
            "train.jsonl:1: label is 'x', expected a list",
        ),
        (
            ['{"text": "a", "label": 0.5}', '{"text": "b", "label": "y"}'],
            "train.jsonl:2: label is 'y', expected a number",
        ),
        (
            ['{"text": "a", "label": ["x"]}', '{"text": "b", "label": 0.5}'],
            "train.jsonl:2: label is 0.5, expected a list",
        ),
        (['{"text": "a", "label": 0.5}'] * 2, "is 0.5; expected two different ones or more"),
        (
            ['{"text": "a", "label": ["x"]}', '{"text": "b", "label": []}'],
            "the only label is 'x'; expected two or more",
        ),
        (['{"text": " ", "label": "x"}'], "text is empty"),
        (['{"text": "a", "label": " "}'], "label is empty"),
        (['{"text": "a", "label": "x"}', "{"], "train.jsonl:2: not valid JSON"),
        (['{"text": "a", "label": "x"}'] * 2, "is 'x'; expected two different ones or more"),
        (['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'], "val.jsonl:1: 'fruit'"),
    ],
)
def test_bad_data_is_named(tiny_dir, files, tmp_path, lines, expected):
    bad = tmp_path / "train.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=re.escape(expected)):
        load_labelled(data_config(bad, val_path=str(files[1])), Tokenizer(tiny_dir), 0)


def test_a_split_without_one_of_the_classes_is_refused(tiny_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(UserError, match=r"val_fraction 0.5 leaves no training example of [xy]"):
        load_labelled(data_config(tmp_path / "a.jsonl", val_fraction=0.5), Tokenizer(tiny_dir), 0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("pack", [False, True], ids=["rows", "packed"])
def test_one_micro_batch_of_eight_equals_eight_of_one(tiny_dir, files, lora, pack):
    """And eight texts in four packed sequences equal eight rows; a micro-batch without a text adds nothing."""
    model = moved(classifier(tiny_dir, lora)).train()
    data = PackedDataset(load_labelled(data_config(files[0]), Tokenizer(tiny_dir), 0)[0], 64, pack, 0)
    rows = [[i] for i in range(0, 40, 5)]
    pairs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    together = [data.batch(pairs if pack else rows)]
    apart = [data.batch([row]) for row in rows]
    assert sum(map(Classification().count, together)) == sum(map(Classification().count, apart)) == 8
    loss, expected = gradients(model, together)
    again, found = gradients(model, [*apart, data.batch([[]])])
    assert again == pytest.approx(loss, rel=ulps())
    assert_gradients_close(found, expected)


def test_a_batch_without_a_text_is_zero_with_a_graph(tiny_dir, files):
    model = classifier(tiny_dir).train()
    data = PackedDataset(load_labelled(data_config(files[0]), Tokenizer(tiny_dir), 0)[0], 64, True, 0)
    loss, found = gradients(model, [data.batch([[]])])
    assert loss == 0 and found.keys() >= {"score.weight"} and not any(g.any() for g in found.values())


def test_batches_as_a_gpu_gets_them(tiny_dir, files):
    """With the bounds of their documents and the positions of their labels."""
    model = moved(classifier(tiny_dir)).eval()
    data = PackedDataset(load_labelled(data_config(files[0]), Tokenizer(tiny_dir), 0)[0], 64, True, 0)
    batch = data.batch([[0, 5], [9]])
    ready = on_device(batch, torch.device("cpu"), "sdpa")
    with torch.no_grad():
        assert_close(Classification().loss(model, ready), Classification().loss(model, batch))


def settings_of(base: Path, **more: Any) -> FinetuneClassifierConfig:
    return FinetuneClassifierConfig(checkpoint_dir=str(base), out_dir="x", data=LabelledDataConfig("x"), **more)


def padded() -> dict[str, torch.Tensor]:
    """Texts of three lengths, padded on the right with the tokenizer's <|endoftext|>, as transformers gets them."""
    tokens = torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(12) < torch.tensor([[12], [7], [1]])
    return {"input_ids": tokens.where(mask, 0), "attention_mask": mask.long()}


def our_scores(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """At the last token of each text, alone in its batch."""
    rows = [ids[mask.bool()] for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    with torch.no_grad():
        return torch.cat([model(row[None], labels=last_only(row[None]))[0] for row in rows])


def last_only(tokens: torch.Tensor) -> torch.Tensor:
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -1] = 0
    return labels


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_scores_of_transformers(model_type, tokenizer_dir, tmp_path):
    assert (model_type in UNSCORED) == (model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    if model_type in ("glm4_moe_lite", "mistral", "olmo3"):
        pytest.skip("no tiny preset of its own: the same file as another")
    base = make_family(model_type, tmp_path / "base", tokenizer_dir)
    if model_type in UNSCORED:
        pairs: Any = FinetuneRewardConfig(checkpoint_dir=str(base), out_dir="x", data=RewardDataConfig("x"))
        for prepare, config in ((classify.prepare_data, settings_of(base)), (reward.prepare_data, pairs)):
            with pytest.raises(UserError, match=f"'{model_type}', of which transformers has no sequence classifier"):
                prepare(Fabric(accelerator="cpu", devices=1), config)
        return
    model, given = load_model(base, torch.float32), padded()
    use_scores(model, 3)
    moved(model)
    (tmp_path / "final").mkdir()
    data: Any = SimpleNamespace(names=["a", "b", "c"], tokenizer=Tokenizer(base))
    save_classifier(model, tmp_path / "final", settings_of(base, lora=None), data)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "final", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.num_labels == 3 and theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert theirs.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert theirs.config.problem_type == "single_label_classification"
    with torch.no_grad():
        assert_close(our_scores(model, given), theirs.eval()(**given).logits)


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        moody = ("tokens_per_second", "mfu", "memory_mib")
        return [{k: v for k, v in row.items() if k not in moody} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_run_learns_and_its_result_loads_elsewhere(tiny_dir, files, tmp_path, capfd, kind):
    more = {"full": ["--lora", "null"], "lora": ["--lora.rank", 4], "qlora": ["--lora.rank", 4, "--quantize.bits", 4]}
    out = run(
        capfd,
        *words(
            tiny_dir,
            files,
            tmp_path / "run",
            *more[kind],
            "--train.max_steps",
            30,
            "--seed",
            3,
            "--train.eval_every",
            15,
        ),
    )
    results = json.loads((tmp_path / "run/manifest.json").read_text())["results"]
    assert results["val_loss_before"] == pytest.approx(np.log(3), rel=0.1)
    assert results["val_loss_after"] < 0.6 * results["val_loss_before"]
    assert results["accuracy_after"] >= 0.75 > results["accuracy_before"]
    assert f"validation accuracy     {results['accuracy_before']:.1%} -> {results['accuracy_after']:.1%}" in out
    assert results["texts"] > 0 and "target_tokens" not in results
    row = metrics(tmp_path / "run")[14]
    assert 0 <= float(row["val_accuracy"]) <= 1 and 0 <= float(row["accuracy"]) <= 1
    assert "3 classes: fruit 20, tools 20, weather 20" in out and f"{tmp_path}/run/final --classify" in out
    assert "validation accuracy" in (tmp_path / "run/report.html").read_text()
    final, given = tmp_path / "run/final", padded()
    config = transformers.AutoConfig.from_pretrained(final)
    assert config.id2label == {0: "fruit", 1: "tools", 2: "weather"}
    loading = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load_model(tiny_dir, torch.float32)
    if kind == "full":
        theirs: Any = loading(final, dtype=torch.float32)
        weights = load_file(final / "model.safetensors")
        assert "score.weight" in weights and "lm_head.weight" not in weights
        use_scores(model, 3)
        model.load_state_dict(weights)
    else:
        adapter = json.loads((final / "adapter_config.json").read_text())
        assert adapter["task_type"] == "SEQ_CLS" and adapter["modules_to_save"] == ["score"]
        theirs = peft.PeftModel.from_pretrained(loading(tiny_dir, config=config, dtype=torch.float32), final)
        use_scores(model, 3)
        load_adapter(model, final)
    with torch.no_grad():
        assert_close(our_scores(model.eval(), given), theirs.eval()(**given).logits)


def test_a_preview_trains_nothing(tiny_dir, files, tmp_path, capfd):
    """The memory is that of scores, and examples are shown with their class, not with a token of its number."""
    for lora in ("null", None):
        more = ["--lora", lora] if lora else []
        out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--dry_run", "--show_masks", 2, *more))
        assert "class fruit\napples and pears, number [0]" in out and out.count("--- example") == 2
        assert "peak memory of the process" in out and "per micro-step" in out and "cannot be estimated" not in out
    assert not (tmp_path / "x").exists()


def test_settings_without_effect_are_named(tiny_dir, files, tmp_path, capfd):
    more = ["--data.train_on", "all", "--train.sample_every", 2, "--eval.exact_match", "true"]
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--dry_run", *more))
    assert "ineffective settings: data.train_on" in out and "train.sample_every, eval.exact_match" in out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lora", "null", "--quantize.bits", "4"], "quantize.bits 4 needs adapters"),
        (["--lora.rank", "-1"], "out of range: lora.rank is -1"),
        (["--lora.rnk", "1"], "did you mean 'lora.rank'?"),
    ],
)
def test_settings_that_are_refused(tiny_dir, files, tmp_path, capfd, more, expected):
    assert expected in run(capfd, *words(tiny_dir, files, tmp_path / "x", *more), status=2)


@pytest.mark.xdist_group("two")
@pytest.mark.parametrize(("strategy", "lora"), [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_two_processes_equal_one(tiny_dir, files, tmp_path, capfd, strategy, lora):
    more = ["--train.eval_every", 2, *(["--lora.rank", 4] if lora else ["--lora", "null"])]
    one, two = (words(tiny_dir, files, tmp_path / name, *more) for name in ("one", "two"))
    run(capfd, *one)
    values(run_two(command, "finetune_classifier", *two, "--devices", 2, "--strategy", strategy))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        for name in ("loss", "grad_norm", "val_loss"):
            assert float(b[name] or 0) == pytest.approx(float(a[name] or 0), rel=ulps()), name
    results = [json.loads((tmp_path / name / "manifest.json").read_text())["results"] for name in ("one", "two")]
    assert results[0]["accuracy_after"] == results[1]["accuracy_after"]
    one_, two_ = ([*each["classification"].values()] for each in results)
    assert one_[:2] == two_[:2]  # baselines
    for a, b in zip(one_[2:], two_[2:], strict=True):
        assert a["confusion"] == b["confusion"] and a["roc_auc"] == pytest.approx(b["roc_auc"], abs=1e-3)
        assert a["ece"] == pytest.approx(b["ece"], abs=1e-3)
    (file,) = (path.name for path in (tmp_path / "one/final").glob("*.safetensors"))
    ours, theirs = (load_file(tmp_path / name / "final" / file) for name in ("one", "two"))
    assert ours.keys() == theirs.keys() and any("score" in name for name in ours)
    assert max(difference(theirs[name], ours[name]) for name in ours) <= 1e-3


def test_resumed_equals_undisturbed(tiny_dir, files, tmp_path, capfd):
    more = ["--train.save_every", 2, "--lora.rank", 4, "--lora.dropout", 0.2, "--train.eval_every", 2]
    run(capfd, *words(tiny_dir, files, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/step-000004")
    run(capfd, *words(tiny_dir, files, tmp_path / "run", *more, "--resume", "auto"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("run", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    results = [json.loads((tmp_path / name / "manifest.json").read_text())["results"] for name in ("run", "whole")]
    for key in ("accuracy_before", "accuracy_after", "val_loss_after"):
        assert results[0][key] == results[1][key]
