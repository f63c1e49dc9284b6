"""Reward models: their loss against TRL's trainer, results that transformers and PEFT load, and ranking validation pairs."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from numerics import assert_close, assert_gradients_close, difference, ulps
from preference_parts import examples_of, sequences, write_pairs
from safetensors.torch import load_file
from script_runs import run_script, without_charts
from tiny import make_family
from trl.trainer.reward_trainer import RewardTrainer
from two import command, run_two, values

import litmini
from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.config.preference import FinetuneRewardConfig, RewardConfig, RewardDataConfig
from litmini.errors import UserError
from litmini.evaluation.intervals import wilson
from litmini.evaluation.rewards import RewardModel
from litmini.methods.adapters import add_adapters
from litmini.methods.heads import use_scores
from litmini.tasks.classify import save_classifier, with_score
from litmini.tasks.reward import BradleyTerry
from litmini.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("pairs")
    train, val = write_pairs(place / "train.jsonl"), write_pairs(place / "val.jsonl", 10, first=40)
    rows = [{**json.loads(line), "margin": i % 3 / 2} for i, line in enumerate(train.open())]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train, val


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    if "learns" not in request.node.name:
        without_charts(monkeypatch)


def run(capfd: Any, *arguments: object, status: int = 0, script: str = "finetune_reward") -> str:
    return run_script(capfd, script, *arguments, status=status)


def words(tiny_dir: Path, files: tuple[Path, Path], out_dir: Path, *more: object) -> list[str]:
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", files[0], "--data.val_path", files[1]]
    fixed += ["--data.max_seq_len", 80, "--precision", "32-true", "--optim.lr", "3e-3"]
    fixed += ["--train.global_batch_size", 3, "--train.micro_batch_size", 1, "--train.max_steps", 4]
    return list(map(str, [*fixed, *more]))


def model_of(base: Path, lora: bool = False) -> Any:
    """With other values of all that is trained, as after training."""
    model, generator = load_model(base, torch.float32), torch.Generator().manual_seed(1)
    use_scores(model, 1)
    if lora:
        add_adapters(model, with_score(LoraConfig(rank=4)))
    else:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def step(
    config: RewardConfig, model: Any, batches: list[Any]
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    objective = BradleyTerry(config)
    model.zero_grad()
    losses = [objective.loss(model, batch) for batch in batches]
    units = sum(map(objective.count, batches))
    (sum(losses) / units).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(sum(losses).detach()) / units, gradients, objective.metrics(objective.take_sums().tolist())


def save(model: Any, base: Path, directory: Path, **settings: Any) -> Path:
    directory.mkdir()
    data: Any = SimpleNamespace(names=("reward",), tokenizer=Tokenizer(base))
    config = FinetuneRewardConfig(checkpoint_dir=str(base), out_dir="x", data=RewardDataConfig("x"), **settings)
    save_classifier(model, directory, config, data)
    return directory


def documents(data: Any) -> list[list[int]]:
    found = []
    for i in range(len(data)):
        ids, first = data[i][0].tolist(), data.documents(i)[0]
        found += [ids[:first], ids[first:]]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_loss_gradients_and_metrics_are_those_of_reward_trainer(tmp_path, tokenizer_dir, files, family, center):
    base = make_family(family, tmp_path / "base", tokenizer_dir)
    model, examples = model_of(base), examples_of(files[0], base, "scored", 80)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        save(model, base, tmp_path / "saved", lora=None), dtype=torch.float32, attn_implementation="eager"
    ).train()
    assert theirs.config.num_labels == 1 and theirs.config.id2label == {0: "reward"}
    assert theirs.config.problem_type == "regression"
    for module in theirs.modules():  # as TRL's `disable_dropout`
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = documents(examples)
    rows = rows[::2] + rows[1::2]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    kept = {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens")}
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=center or None), _metrics={"train": kept}, model=theirs,
        _total_train_tokens=0, maybe_activation_offload_context=torch.enable_grad(), aux_loss_enabled=False, _tp_size=1,
    )  # fmt: skip
    margins = torch.from_numpy(examples.table["margin"].copy())
    total = RewardTrainer.compute_loss(trainer, theirs, {"input_ids": ids, "attention_mask": mask, "margin": margins})
    total.backward()
    data = sequences(examples, 80, pack=True)
    mean, gradients, found = step(RewardConfig(center), model, list(data.batches(range(len(data)), 3)))
    assert mean == pytest.approx(float(total), rel=CLOSE)
    assert found["accuracy"] == pytest.approx(kept["accuracy"][0], rel=CLOSE)
    assert found["margin"] == pytest.approx(kept["margin"][0], rel=CLOSE, abs=CLOSE)
    assert found["reward_chosen"] + found["reward_rejected"] == pytest.approx(2 * kept["mean_reward"][0], abs=CLOSE)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    if family != "gpt2":  # whose linears are transposed there
        assert_gradients_close(gradients, expected, CLOSE / torch.finfo(torch.float32).eps)
    else:
        assert_close(gradients["score.weight"], expected["score.weight"])


def test_one_micro_batch_of_eight_equals_eight_of_one(tiny_dir, files):
    model, examples = model_of(tiny_dir, lora=True), examples_of(files[0], tiny_dir, "scored", 80)
    rows, packed = sequences(examples, 80), sequences(examples, 80, pack=True)
    packed.length = 250
    mean, gradients, measured = step(RewardConfig(0.1), model, list(rows.batches(range(8), 8)))
    pairs = [packed.batch([[2 * i, 2 * i + 1] for i in range(4)]), packed.batch([[]])]
    for batches in (list(rows.batches(range(8), 1)), pairs):
        again, found, others = step(RewardConfig(0.1), model, batches)
        assert again == pytest.approx(mean, rel=ulps()) and others == pytest.approx(measured, rel=1e-4, abs=1e-6)
        assert_gradients_close(found, gradients)


def test_the_score_is_at_the_last_token_of_what_the_template_writes(tiny_dir, files):
    examples, tokenizer = examples_of(files[0], tiny_dir, "scored", 80), Tokenizer(tiny_dir)
    row = json.loads(files[0].open().readline())
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]
    assert documents(examples)[1] == tokenizer.encode(tokenizer.apply_template(turns), special=False)
    assert "[\n]" in examples.show_masks(tokenizer, 1), "as transformers' apply_chat_template ends"


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        moody = ("tokens_per_second", "mfu", "memory_mib")
        return [{k: v for k, v in row.items() if k not in moody} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_run_learns_and_its_result_gives_equal_scores_elsewhere(tiny_dir, files, tmp_path, capfd, kind):
    more = {"full": ["--lora", "null"], "lora": ["--lora.rank", 4], "qlora": ["--lora.rank", 4, "--quantize.bits", 4]}
    out = run(capfd, *words(tiny_dir, files, tmp_path / "run", *more[kind], "--train.max_steps", 20))
    results = json.loads((tmp_path / "run/manifest.json").read_text())["results"]
    assert results["val_loss_before"] == pytest.approx(math.log(2), rel=0.2) and "--reward PAIRS.jsonl" in out
    assert results["val_loss_after"] < results["val_loss_before"] and results["accuracy_after"] >= 0.7
    final, loading = tmp_path / "run/final", transformers.AutoModelForSequenceClassification.from_pretrained
    config = transformers.AutoConfig.from_pretrained(final)
    if kind == "full":
        theirs: Any = loading(final, dtype=torch.float32)
        ours, _ = litmini.load(final, dtype="fp32")
        given = ["--checkpoint_dir", final]
    else:
        theirs = peft.PeftModel.from_pretrained(loading(tiny_dir, config=config, dtype=torch.float32), final)
        ours, _ = litmini.load(tiny_dir, adapter_dir=final, dtype="fp32")
        given = ["--checkpoint_dir", tiny_dir, "--adapter_dir", final]
    ids = torch.randint(3, 512, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_close(ours.eval()(ids)[:, -1], theirs.eval()(input_ids=ids, attention_mask=ids > 0).logits)
    if kind == "qlora":
        return
    file = tmp_path / "ranked.json"
    out = run(capfd, *given, "--reward", files[1], "--dtype", "fp32", "--out", file, script="evaluate")
    ranked = json.loads(file.read_text())["reward"]
    assert ranked["accuracy"] == pytest.approx(results["accuracy_after"]) and ranked["pairs"] == 10
    assert ranked["chosen"] - ranked["rejected"] == pytest.approx(results["margin_after"], rel=1e-4)
    low, high = ranked["interval"]
    assert 0 < low < ranked["accuracy"] <= high <= 1 and f"95% interval {low:.1%} to {high:.1%}" in out
    for script, more_ in (("generate", ["--prompt", "a"]), ("serve", []), ("evaluate", ["--perplexity", files[1]])):
        error = run(capfd, *given, *more_, status=1, script=script)
        assert f"{final} is a classifier or a reward model: it gives scores" in error
    if kind == "full":
        run(capfd, final, "--out_dir", tmp_path / "converted", script="convert_to_hf")
        again, _ = litmini.load(tmp_path / "converted", dtype="fp32")
        with torch.no_grad():
            assert torch.equal(again.eval()(ids), ours(ids))
        assert "scores = transformers, fp32" in run(capfd, final, script="verify")
    else:
        run(capfd, *given, "--out_dir", tmp_path / "merged", script="merge_adapter")
        merged = loading(tmp_path / "merged", dtype=torch.float32).eval()
        assert merged.config.num_labels == 1 and merged.config.id2label == {0: "reward"}
        with torch.no_grad():
            assert_close(merged(input_ids=ids, attention_mask=ids > 0).logits, ours(ids)[:, -1])


def test_scores_of_completions_are_those_of_ranking(tiny_dir, files, tmp_path, capfd):
    """As a reward of policy optimization gets them: by text or messages, in a batch, by an adapter that names its base."""
    run(capfd, *words(tiny_dir, files, tmp_path / "run", "--precision", "bf16-true"))
    final, file = tmp_path / "run/final", tmp_path / "ranked.json"
    run(
        capfd,
        "--checkpoint_dir",
        tiny_dir,
        "--adapter_dir",
        final,
        "--reward",
        files[1],
        "--out",
        file,
        script="evaluate",
    )
    ranked, rows = json.loads(file.read_text())["reward"], [json.loads(line) for line in files[1].open()]
    model = RewardModel(str(final))
    for name in ("chosen", "rejected"):
        given: list[Any] = [(row["prompt"], row[name]) for row in rows]
        given[::2] = [([{"role": "user", "content": prompt}], text) for prompt, text in given[::2]]
        scores = model.score(given, batch_size=3)
        assert sum(scores) / len(scores) == pytest.approx(ranked[name], rel=0.02, abs=0.01)
    assert math.isnan(model.score([("long " * 600, "x")])[0])
    with pytest.raises(UserError, match="is no reward model"):
        RewardModel(str(tiny_dir))


def test_evaluate_refuses_what_is_no_reward_model(tiny_dir, files, capfd):
    error = run(capfd, "--checkpoint_dir", tiny_dir, "--reward", files[1], status=1, script="evaluate")
    assert f"{tiny_dir} is no reward model: it gives tokens" in error
    error = run(capfd, "--checkpoint_dir", tiny_dir, "--reward", "a", "--perplexity", "b", status=2, script="evaluate")
    assert "--reward takes a reward model" in error


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5) == pytest.approx((0.566, 1.0), abs=1e-3)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "single completions are for"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "1: chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": "c " * 99}, "1: a conversation is longer than data.max_seq_len"),
    ],
)
def test_bad_pairs_are_named(tiny_dir, files, tmp_path, capfd, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    error = run(capfd, *words(tiny_dir, (tmp_path / "a.jsonl", files[1]), tmp_path / "x"), status=1)
    assert expected in error and re.search(r"a.jsonl:1", error)


def test_a_preview_trains_nothing(tiny_dir, files, tmp_path, capfd):
    out = run(capfd, *words(tiny_dir, files, tmp_path / "x", "--dry_run", "--show_masks", 1))
    assert "--- example 1, chosen: " in out and "peak memory of the process" in out and "cannot be est" not in out
    assert not (tmp_path / "x").exists()


@pytest.mark.xdist_group("two")
def test_two_processes_equal_one(tiny_dir, files, tmp_path, capfd):
    one, two = (words(tiny_dir, files, tmp_path / name, "--train.eval_every", 2) for name in ("one", "two"))
    run(capfd, *one)
    values(run_two(command, "finetune_reward", *two, "--devices", 2, "--strategy", "fsdp"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "val_loss", "margin", "val_accuracy"):
            assert float(b[name] or 0) == pytest.approx(float(a[name] or 0), rel=1e-3, abs=1e-5), name
    ours, theirs = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys() and max(difference(theirs[name], ours[name]) for name in ours) <= 1e-3


def test_resumed_equals_undisturbed(tiny_dir, files, tmp_path, capfd):
    more = ["--train.save_every", 2, "--train.eval_every", 2]
    run(capfd, *words(tiny_dir, files, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/step-000004")
    run(capfd, *words(tiny_dir, files, tmp_path / "run", *more, "--resume", "auto"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("run", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
