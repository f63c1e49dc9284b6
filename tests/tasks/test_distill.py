"""Distillation: its divergences against TRL's, its gradients, what a teacher expects on disk, and whole runs of the script."""

import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_close, assert_gradients_close, difference
from safetensors.torch import load_file, save_file
from script_runs import run_script, without_charts
from tiny import make_family
from trl.experimental.gkd import GKDTrainer
from two import command, run_two, values

from litmini.checkpoints.hf import load_model
from litmini.config.distill import DistillConfig
from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, load_data
from litmini.data.distill import PromptSequences, TaughtSequences, prompt_size, row_starts
from litmini.data.prompts import completion_batch
from litmini.generation.rollouts import completion_seed, sample
from litmini.methods.teacher_head import use_hidden_head, use_student_head
from litmini.ops.cross_entropy import IGNORE, original_head
from litmini.ops.divergence import generalized_jsd, top_k_divergence, top_k_log_probs
from litmini.tasks import distill_teacher
from litmini.tasks.distill import Distillation
from litmini.tasks.distill_sampling import StudentSampling
from litmini.tokenizer import Tokenizer

trl_jsd = GKDTrainer.generalized_jsd_loss


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    without_charts(monkeypatch)
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A teacher of another family, of the same tokenizer, whose distributions are far from even."""
    directory = make_family("qwen3", tmp_path_factory.mktemp("teacher") / "model", tokenizer_dir)
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * (1 if "norm" in name else 4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    texts = [(f"What is {i} plus {i % 7}?" + " Please." * (i % 3), f"It is {i + i % 7}.") for i in range(40)]
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in texts))
    return file


# Divergences


def logits(n: int = 12, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, n, vocab, generator=generator)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [0.9, 2.0])
def test_the_jensen_shannon_divergence_is_that_of_trl(beta, temperature):
    student, teacher = logits()
    labels = torch.zeros(12, dtype=torch.int64)
    labels[::3] = IGNORE
    theirs = trl_jsd(student[None], teacher[None], labels[None], beta, temperature, reduction="sum")
    (wanted,) = torch.autograd.grad(theirs, student)
    each = generalized_jsd(student, teacher, beta, temperature)[labels != IGNORE]
    (found,) = torch.autograd.grad(each.sum(), student)
    assert float(each.sum().detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert (found - wanted).abs().max() <= 1e-6 and wanted.abs().max() > 1e-2


def test_over_all_tokens_the_divergence_of_the_top_k_is_the_whole():
    student, teacher = logits()
    ids, log_probs = top_k_log_probs(teacher, 50, 1.5)
    found = top_k_divergence(student, ids, log_probs, 1.5)
    whole = trl_jsd(student, teacher, None, 0, 1.5, reduction="none").sum(-1)
    assert_close(found, whole)
    wanted = torch.autograd.grad(whole.sum(), student)[0]
    assert_close(torch.autograd.grad(found.sum(), student)[0], wanted)


@pytest.mark.parametrize("k", [1, 5, 30])
def test_other_tokens_count_as_one(k):
    student, teacher = logits()
    ids, log_probs = top_k_log_probs(teacher, k, 2.0)
    found = top_k_divergence(student, ids, log_probs, 2.0)
    p, q = ((one / 2).softmax(-1) for one in (teacher, student))
    p, q = ([*one.gather(1, ids).T, 1 - one.gather(1, ids).sum(1)] for one in (p, q))
    wanted = sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    assert (found - wanted).abs().max() < 1e-5
    whole = trl_jsd(student, teacher, None, 0, 2.0, reduction="none").sum(-1)
    assert (found < whole).all() and (found > 0).all()
    equal = teacher.clone().requires_grad_()
    nothing = top_k_divergence(equal, ids, log_probs, 2.0)
    assert nothing.abs().max() < 1e-5 and torch.autograd.grad(nothing.sum(), equal)[0].abs().max() < 1e-5


# The objective


def micro_batch(rows: int = 5, vocab: int = 512) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(rows):
        ids = torch.randint(3, vocab, (9 + i,), generator=generator).tolist()
        found.append((ids, 3 + i % 4))
    batch = completion_batch(found)
    return {name: batch[name] for name in ("tokens", "positions", "documents", "labels")}


def config_of(**settings: Any) -> Any:
    return SimpleNamespace(distill=DistillConfig(teacher_dir="t", **settings))


def students(tokenizer_dir: Path, tmp_path: Path, family: str = "llama") -> Any:
    directory = tmp_path / family
    if not directory.exists():
        make_family(family, directory, tokenizer_dir)
    return load_model(directory, torch.float32).train()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", ["offline", "on_policy"])
def test_loss_and_gradients_are_those_of_whole_logits(tokenizer_dir, teacher_dir, tmp_path, mode, family):
    """In chunks, with a trained and tied head; gemma2 caps its logits. The teacher has fewer rows than the student."""
    model, plain = (students(tokenizer_dir, tmp_path, family) for _ in range(2))
    teacher = load_model(teacher_dir, torch.float32).eval()
    batch, vocab = micro_batch(), 500
    mask = batch["labels"] != IGNORE
    inputs = {name: batch[name] for name in ("tokens", "positions", "documents")}
    with torch.no_grad():
        theirs = teacher(**inputs)[mask][:, :vocab]
    config = config_of(mode=mode, temperature=1.5, beta=0.3, kl_weight=0.7, top_k=7)
    use_student_head(model)
    objective = Distillation(config, model, vocab)
    own = plain(**inputs)[mask]
    if mode == "offline":
        ids, log_probs = top_k_log_probs(theirs, 7, 1.5)
        batch |= {"teacher_ids": ids, "teacher_log_probs": log_probs}
        divergence = top_k_divergence(own, ids, log_probs, 1.5).sum()
        entropy = torch.nn.functional.cross_entropy(own, batch["labels"][mask], reduction="sum")
        wanted = 0.7 * 1.5**2 * divergence + 0.3 * entropy
    else:
        head = use_hidden_head(teacher)
        objective.use_teacher(teacher, head)
        divergence = wanted = trl_jsd(own[:, :vocab], theirs, None, 0.3, 1.5, reduction="sum")
    wanted.backward()
    loss = objective.loss(model, batch)
    loss.backward()
    assert_close(loss.detach(), wanted.detach())
    with original_head(model):
        assert_gradients_close(gradients(model), gradients(plain))
    measured = objective.metrics(objective.take_sums().tolist())
    assert measured["divergence"] == pytest.approx(float(divergence.detach()) / int(mask.sum()), rel=1e-4)
    assert objective.metrics(objective.take_sums().tolist()) == {}
    # in evaluation mode, the cross entropy of the labels
    with torch.no_grad():
        loss, wanted = objective.loss(model.eval(), batch), plain.eval()(**batch_without_teacher(batch))[0]
    assert_close(loss, wanted)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def batch_without_teacher(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("teacher")}


@pytest.mark.parametrize("mode", ["offline", "on_policy"])
def test_micro_batches_add_up(tokenizer_dir, teacher_dir, tmp_path, mode):
    """Also one without labels."""
    teacher = load_model(teacher_dir, torch.float32).eval()
    head = use_hidden_head(teacher)
    found = []
    for size in (5, 1):
        model = students(tokenizer_dir, tmp_path)
        use_student_head(model)
        objective = Distillation(config_of(mode=mode, top_k=3), model, 512)
        objective.use_teacher(teacher, head)
        batch = micro_batch()
        batch["labels"][2] = IGNORE
        total = 0.0
        for start in range(0, 5, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            with torch.no_grad():
                hidden, _ = teacher(**part)
            ids, log_probs = top_k_log_probs(head.logits(hidden, 512), 3, 1.0)
            loss = objective.loss(model, part | {"teacher_ids": ids, "teacher_log_probs": log_probs})
            loss.backward()
            total += float(loss.detach())
        with original_head(model):
            found.append((total, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_gradients_close(found[1][1], found[0][1])


# Runs


def run(capfd: Any, *arguments: object, status: int = 0) -> str:
    return run_script(capfd, "finetune_distill", *arguments, status=status)


def words(tiny_dir: Path, teacher_dir: Path, data: Path, out_dir: Path, *more: object, steps: int = 4) -> list[str]:
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", data, "--data.val_fraction", 0.2]
    fixed += ["--distill.teacher_dir", teacher_dir, "--precision", "32-true", "--optim.lr", "1e-2", "--lora", "null"]
    fixed += ["--train.global_batch_size", 6, "--train.micro_batch_size", 2, "--train.max_steps", steps]
    fixed += ["--data.max_seq_len", 64, "--eval.samples", 1, "--eval.max_new_tokens", 2, "--train.eval_every", 2]
    fixed += ["--distill.max_completion_length", 6, "--distill.top_k", 16]
    return list(map(str, [*fixed, *more]))


ON_POLICY = ("--distill.mode", "on_policy", "--distill.lmbda", 0.6)


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        moody = ("tokens_per_second", "mfu", "memory_mib")
        return [{k: v for k, v in row.items() if k not in moody} for row in csv.DictReader(file)]


def test_an_offline_run(tiny_dir, teacher_dir, data, tmp_path, capfd, monkeypatch):
    loaded: list[Any] = []
    load = distill_teacher.load_teacher
    monkeypatch.setattr(distill_teacher, "load_teacher", lambda *given: loaded.append(given) or load(*given))
    out = run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", steps=12))
    (directory,) = (tmp_path / "cache").glob("teacher-*")
    size = (directory / "rows.bin").stat().st_size
    assert (
        f"16 most probable tokens at each of {size // (16 * 2 + 17 * 2)} supervised tokens: {size / 1e6:.2f} MB" in out
    )
    rows = metrics(tmp_path / "run")
    assert float(rows[-1]["divergence"]) < 0.8 * float(rows[0]["divergence"]), "the student comes closer"
    for row in rows:
        both = 0.9 * float(row["divergence"]) + 0.1 * float(row["cross_entropy"])
        assert float(row["loss"]) == pytest.approx(both, rel=1e-5)
    results = json.loads((tmp_path / "run/manifest.json").read_text())
    assert str(teacher_dir) in results["data"] and results["results"]["val_loss_before"] > 5
    # another run on the same data reads what the first has written, and another temperature is another entry
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "again", "--optim.lr", 1e-3, steps=1))
    assert len(loaded) == 1
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "warm", "--distill.temperature", 2, steps=1))
    assert len(loaded) == 2


def test_without_its_divergence_it_is_plain_finetuning(tiny_dir, teacher_dir, data, tmp_path, capfd):
    """And before training, the validation loss is the same."""
    both = words(tiny_dir, teacher_dir, data, tmp_path / "run", "--distill.kl_weight", 0)
    run(capfd, *both)
    i = [i for i, word in enumerate(both) if word.startswith(("--distill", "--lora"))]
    plain = [word for n, word in enumerate(both) if n not in i and n - 1 not in i]
    run_script(capfd, "finetune_full", *plain, "--out_dir", tmp_path / "plain")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain"), strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert float(ours[name] or 0) == pytest.approx(float(theirs[name] or 0), rel=1e-4), name
    first, other = (
        json.loads((tmp_path / name / "manifest.json").read_text())["results"]["val_loss_before"]
        for name in ("run", "plain")
    )
    assert first == other


def test_an_on_policy_run(tiny_dir, teacher_dir, data, tmp_path, capfd):
    out = run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", *ON_POLICY, steps=24))
    assert "each process holds the teacher, too: 164,288 parameters, in 32 bits" in out
    rows = metrics(tmp_path / "run")
    own = [row for row in rows if row["length"]]
    assert 8 <= len(own) <= 20, "a share of the steps is on the data's completions"
    assert all(0 < float(row["length"]) <= 6 and 0 <= float(row["truncated"]) <= 1 for row in own)
    assert all(float(row["loss"]) == pytest.approx(float(row["divergence"]), rel=1e-6) for row in rows)
    divergences = [float(row["divergence"]) for row in own]
    assert sum(divergences[-4:]) < 0.9 * sum(divergences[:4]), divergences
    assert not (tmp_path / "cache").is_dir() or not list((tmp_path / "cache").glob("teacher-*"))


@pytest.mark.parametrize("more", [(), ON_POLICY], ids=["offline", "on_policy"])
def test_two_processes_equal_one(tiny_dir, teacher_dir, data, tmp_path, capfd, monkeypatch, more):
    """Also where each holds a shard of the student."""
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "one", *more))
    for name in ("ddp", "fsdp"):
        monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / f"cache-{name}"))
        two = words(tiny_dir, teacher_dir, data, tmp_path / name, *more, "--devices", 2, "--strategy", name)
        values(run_two(command, "finetune_distill", *two))
        for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / name), strict=True):
            for column in a:
                assert float(b[column] or 0) == pytest.approx(float(a[column] or 0), rel=1e-3, abs=1e-5), column
        ours, theirs = (load_file(tmp_path / which / "final/model.safetensors") for which in ("one", name))
        assert max(difference(theirs[key], ours[key]) for key in ours) <= 1e-3
    if not more:
        files = sorted(tmp_path.glob("cache*/teacher-*/rows.bin"))
        one, *others = (np.fromfile(file, np.int8) for file in files)
        assert len(files) > 1 and all((one == other).mean() > 0.99 for other in others)


def test_resumed_equals_undisturbed(tiny_dir, teacher_dir, data, tmp_path, capfd):
    """On-policy, with an adapter, in 16 bits; `test_fault_table.py` has the other mode."""
    more = [
        *ON_POLICY,
        "--lora",
        "{rank: 4}",
        "--lora.dropout",
        0.1,
        "--precision",
        "bf16-mixed",
        "--train.save_every",
        1,
    ]
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "whole", *more, "--train.keep_last", 9))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("final", "step-000004", "step-000003"):
        shutil.rmtree(tmp_path / "run" / name)
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", *more, "--resume", "auto"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("run", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_preview(tiny_dir, teacher_dir, data, tmp_path, capfd):
    for more in ((), ON_POLICY):
        out = run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", *more, "--dry_run"))
        assert "per micro-step" in out and not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("teacher-*"))
    out = run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", "--distill.beta", 0.1, "--show_masks", 1))
    assert "ineffective settings: distill.beta, distill.max_completion_length\n" in out


def test_completions_of_a_step(teacher_dir, data, tokenizer_dir):
    """Each is that of its own prompt, and those of like lengths are together; another step has others."""
    model = load_model(teacher_dir, torch.float32).train()
    tokenizer = Tokenizer(tokenizer_dir)
    examples, _, _ = load_data(DataConfig(str(data), max_seq_len=64), tokenizer, 0)
    sequences = PromptSequences(examples, 64, False, 0)
    settings = config_of(mode="on_policy", max_completion_length=5)
    settings.train, settings.seed = SimpleNamespace(micro_batch_size=2), 3
    found: list[Any] = []
    sampling = StudentSampling(settings, tokenizer, sequences)
    assert not sampling.is_due(0), "there is no model yet"
    fabric = SimpleNamespace(global_rank=0, world_size=1, autocast=nullcontext)
    sampling.begin(SimpleNamespace(module=model, fabric=fabric), SimpleNamespace(add_completions=found.extend))
    batches = sampling.batches(7, range(4, 9))
    assert [len(batch["tokens"]) for batch in batches] == [2, 2, 1] and len(found) == 5 and model.training
    rows = [
        (tokens, labels) for batch in batches for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)
    ]
    lengths = []
    for n, (tokens, labels) in zip(sampling.numbers, rows, strict=True):
        prompt = sequences.prompt(sequences.sequence(n)[0])
        (alone,) = sample(model.eval(), [prompt], [completion_seed(3, 7, n)], tokenizer.stop_ids, 1.0, 5, 1)
        whole = prompt + alone.ids
        assert tokens[: len(whole) - 1].tolist() == whole[:-1] and labels[labels != IGNORE].tolist() == alone.ids
        lengths.append(len(whole))
    assert lengths == sorted(lengths)
    other = sampling.batches(8, range(4, 9))
    assert any(a["labels"].tolist() != b["labels"].tolist() for a, b in zip(batches, other, strict=True))


# What the teacher expects, on disk


class Stop(Exception):
    pass


def test_rows_are_those_of_the_teacher_also_after_an_interruption(
    tiny_dir, teacher_dir, data, tmp_path, capfd, monkeypatch
):
    found: list[TaughtSequences] = []
    use = TaughtSequences.use
    monkeypatch.setattr(TaughtSequences, "use", lambda self, *given: found.append(self) or use(self, *given))
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "whole", steps=1))
    sequences = found[0]
    teacher = load_model(teacher_dir, torch.float32).eval()
    starts = row_starts(sequences.examples)
    for i in (0, 3, len(sequences.examples) - 1):
        inputs, labels = sequences.examples[i]
        with torch.no_grad():
            logits = teacher(torch.from_numpy(inputs.astype(np.int64))[None])[0][labels != IGNORE]
        ids, log_probs = top_k_log_probs(logits, 16, 1.0)
        rows = sequences.rows[starts[i] : starts[i + 1]]
        assert (rows["ids"] == ids.numpy()).all()
        assert np.abs(rows["log_probs"] - log_probs.numpy()).max() < 5e-3
    batch = sequences.batch([[3, 0], [5]])
    assert len(batch["teacher_ids"]) == int((batch["labels"] != IGNORE).sum())
    assert (batch["teacher_ids"][: starts[4] - starts[3]].numpy() == sequences.rows[starts[3] : starts[4]]["ids"]).all()
    # interrupted after three micro-batches, two of which are on disk
    (whole,) = (tmp_path / "cache").glob("teacher-*/rows.bin")
    expected = whole.read_bytes()
    shutil.rmtree(tmp_path / "cache")
    compute, calls = distill_teacher._Rows._rows, []

    def interrupted(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Stop
        return compute(self, *given)

    monkeypatch.setattr(distill_teacher, "SAVE_EVERY", 2)
    monkeypatch.setattr(distill_teacher._Rows, "_rows", interrupted)
    with pytest.raises(Stop):
        run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run"))
    (file,) = (tmp_path / "cache").glob("teacher-*/rows.bin")
    assert json.loads((file.parent / "progress.json").read_text()) == {"sequences": 4}
    before = len(calls)
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", steps=1))
    assert len(calls) - before == -(-(len(sequences) - 4) // 2) and file.read_bytes() == expected
    # a damaged one is made again
    file.write_bytes(expected[:-1])
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "third", steps=1))
    assert file.read_bytes() == expected


def test_prompts_are_what_comes_before_the_last_completion():
    labels = np.array([IGNORE, 5, 6, IGNORE, IGNORE, 7, 8, IGNORE])
    assert prompt_size(labels) == 6 and prompt_size(labels[:4]) == 2 and prompt_size(np.array([1, 2])) == 1


def test_the_longest_batch_has_completions_of_full_length():
    arrays = [(np.arange(8, dtype=np.int32), np.array([IGNORE, IGNORE, IGNORE, 4, 5, 6, 7, 8], np.int32))]
    entry = np.zeros(1, [("set", int), ("start", int), ("size", int), ("file", int)])
    entry["size"] = 8
    sequences = PromptSequences(Examples(arrays, entry), 8, False, 0)
    assert sequences.prompt(0) == [0, 1, 2, 3]
    assert sequences.longest_batch(2)["tokens"].shape == (1, 8)
    sequences.longest_completion = 9
    batch = sequences.longest_batch(2)
    assert batch["tokens"].shape == (2, 12) and int((batch["labels"] != IGNORE).sum()) == 18


# Mistakes


def test_a_teacher_with_another_vocabulary(tiny_dir, teacher_dir, data, tmp_path, capfd):
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    names = {i: token for token, i in vocabulary.items()}
    vocabulary[names[500]], vocabulary[names[501]] = 501, 500
    (other / "tokenizer.json").write_text(json.dumps(content))
    error = run(capfd, *words(tiny_dir, other, data, tmp_path / "run"), status=1)
    assert f"{other} has another vocabulary than {tiny_dir}: 2 tokens differ" in error and "500" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--distill.teacher_dir", "nowhere/else"], "nowhere/else"),
        (["--distill.lmbda", 2], "out of range: distill.lmbda is 2.0"),
        (["--distill.mode", "on_policy", "--data.train_on", "all"], "has none"),
        (["--distill.mode", "on_policy", "--distill.max_completion_length", 5000], "leave no room for a completion"),
    ],
)
def test_settings_that_are_refused(tiny_dir, teacher_dir, data, tmp_path, capfd, more, says):
    status = 2 if "range" in says or "none" in says else 1
    wrong = run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", *more), status=status)
    assert says in wrong and "Traceback" not in wrong


def test_a_disk_that_is_too_small(tiny_dir, teacher_dir, data, tmp_path, capfd, monkeypatch):
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("litmini.system.shutil.disk_usage", lambda _: full)
    assert "too little disk" in run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run"), status=1)


def test_a_run_is_not_resumed_with_another_teacher(tiny_dir, teacher_dir, data, tmp_path, capfd):
    run(capfd, *words(tiny_dir, teacher_dir, data, tmp_path / "run", "--train.save_every", 1))
    for name in ("final", "step-000004"):
        shutil.rmtree(tmp_path / "run" / name)
    tensors = load_file(teacher_dir / "model.safetensors")
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    save_file({k: v * 2 for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    same = words(tiny_dir, other, data, tmp_path / "run", "--train.save_every", 1, "--resume", "auto")
    assert "distill.teacher_dir" in run(capfd, *same, status=1)
