"""The loop: weights of tokens, schedule, ranks, evaluation, exact resume, signals."""

import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from numerics import Float64, assert_gradients_as_accurate, assert_gradients_close, ulps
from safetensors.torch import load_file
from torch import nn
from training_parts import Listening, make_setup

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.config.training import OptimConfig, TrainConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters
from litmini.methods.lora import LoRALinear
from litmini.models import llama
from litmini.ops.cross_entropy import IGNORE
from litmini.training import loop
from litmini.training.loop import evaluate, fit, memory_warmup
from litmini.training.low_memory import checkpoint_activations
from litmini.training.objective import LanguageModeling
from litmini.training.optimizer import learning_rate, make_optimizer
from litmini.training.setup import Progress

ROOT = Path(__file__).parents[2]
DATA = ROOT / "config_hub/quickstart"


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def ragged(rows: int, length: int = 24) -> dict[str, torch.Tensor]:
    """A batch whose rows have 1 to 20 targets each."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 512, (rows, length), generator=generator)
    labels = torch.roll(tokens, -1, 1)
    for row in range(rows):
        labels[row, : length - 1 - (row * 7) % 20] = IGNORE
    return {
        "tokens": tokens,
        "positions": torch.arange(length).expand(rows, length).contiguous(),
        "documents": torch.ones(rows, length, dtype=torch.int64),
        "labels": labels,
    }


def split(batch, size):
    parts = range(0, len(batch["tokens"]), size)
    return [{k: v[i : i + size] for k, v in batch.items()} for i in parts]


def run(fabric, model, micro_batches, steps=1, rate=1.0, gradients=None, **options):
    """`steps` of plain SGD; returns (metrics, progress). The gradients of each step are added to the list `gradients`."""
    plain = make_optimizer(model, OptimConfig(name="sgd"))
    if gradients is not None:
        plain.register_step_pre_hook(
            lambda *_: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()}) or None
        )
    wrapped, optimizer = fabric.setup(model, plain)
    recorder = options.setdefault("recorder", Listening(checkpoint=lambda p: "step"))
    options.setdefault("max_grad_norm", None)
    setup = make_setup(fabric, wrapped, optimizer, [micro_batches] * steps, rate, **options)
    return recorder.rows, fit(setup, LanguageModeling())


def tiny_model():
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_accumulation_weighs_tokens_not_micro_batches(fabric):
    """Requirement 1: gradients of 8x1, 1x8 and 3 + 3 + 2 with ragged masks agree."""
    batch, gradients, losses = ragged(8), [], []
    for size in (8, 1, 3):
        rows, _ = run(fabric, tiny_model(), split(batch, size), gradients=gradients)
        losses.append(rows[0]["loss"])
    plain = tiny_model().double()
    with Float64():
        expected = nn.functional.cross_entropy(plain(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
    expected.backward()
    exact = {name: p.grad for name, p in plain.named_parameters()}
    for found in gradients:
        assert_gradients_as_accurate(found, gradients[0], exact)
        assert_gradients_close(found, gradients[0], 16)
    assert losses == pytest.approx([float(expected)] * 3, rel=ulps(16))


def test_a_micro_batch_without_targets_changes_nothing(fabric):
    """Requirement 4."""
    batch = ragged(4)
    empty = {**ragged(2), "labels": torch.full((2, 24), IGNORE)}
    results = []
    for micro_batches in ([batch], [batch, empty], [empty, batch]):
        model = tiny_model()
        rows, progress = run(fabric, model, micro_batches)
        assert progress.targets == int((batch["labels"] != IGNORE).sum())
        results.append((rows[0]["loss"], torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, weights in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(weights, results[0][1])


def test_evaluation_does_not_depend_on_batch_size(fabric):
    """Requirement 3."""
    model, batch = tiny_model(), ragged(8)
    losses = [evaluate(fabric, model, LanguageModeling(), split(batch, size)) for size in (8, 3, 1)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=ulps(16))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule):
    """Requirement 23: a pure function of the step; warm-up starts above zero."""
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=schedule)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates == [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    middle = {"cosine": 0.55, "linear": 0.55, "constant": 1.0}[schedule]
    assert rates[12] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] >= 0.1


def test_schedule_moves_once_a_step_whatever_the_accumulation(fabric):
    seen = []
    for size in (8, 1):
        config = OptimConfig(lr=0.1, warmup_steps=2)
        model = tiny_model()
        wrapped, optimizer = fabric.setup(model, make_optimizer(model, config))
        setup = make_setup(fabric, wrapped, optimizer, [split(ragged(8), size)] * 5, optim=config)
        fit(setup, LanguageModeling())
        seen.append([row["lr"] for row in setup.recorder.rows])
    assert seen[0] == seen[1] == [learning_rate(step, 5, OptimConfig(lr=0.1, warmup_steps=2)) for step in range(5)]


def test_gradients_are_clipped_together(fabric):
    model = tiny_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    rows, _ = run(fabric, model, [ragged(4)], max_grad_norm=0.01)
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert rows[0]["grad_norm"] > 0.1
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_is_not_taken(fabric):
    model = tiny_model()
    model.model["norm"].weight.data[0] = math.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match="step 1: loss nan.*not finite"):
        run(fabric, model, [ragged(2)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), before[name].nan_to_num(7))


def test_vectors_do_not_decay():
    groups = make_optimizer(tiny_model(), OptimConfig(weight_decay=0.1)).param_groups
    assert [(g["weight_decay"], {p.dim() for p in g["params"]}) for g in groups] == [(0.1, {2}), (0.0, {1})]


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(in_backward=True, max_grad_norm=None)])
def test_a_memory_warmup_leaves_no_trace(fabric, optim):
    results = []
    for warmed_up in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), dropout=0.3)
        wrapped, optimizer = fabric.setup(model, make_optimizer(model, optim))
        setup = make_setup(fabric, wrapped, optimizer, [[ragged(4)]] * 2, 1e-2)
        if warmed_up:
            memory_warmup(setup, LanguageModeling(), ragged(4))
            assert all(p.grad is None for p in model.parameters())
        fit(setup, LanguageModeling())
        norms = [metrics["grad_norm"] for metrics in setup.recorder.rows]
        results.append(torch.cat([*(p.detach().flatten() for p in model.parameters()), torch.tensor(norms)]))
    assert torch.equal(*results)


def add_lora(model, dropout=0.0):
    add_adapters(model, LoraConfig(rank=4, dropout=dropout))
    return model


def test_dropout_is_a_function_of_the_step(fabric, monkeypatch):
    """What happens between steps (evaluation, sampling) does not change the run."""
    results = []
    for disturb in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), dropout=0.3)
        wrapped, optimizer = fabric.setup(model, make_optimizer(model, OptimConfig()))

        def validate(*_, disturb=disturb):
            torch.rand(7 if disturb else 1)
            return {"loss": 0.0}

        monkeypatch.setattr(loop, "validate", validate)
        train = TrainConfig(eval_every=1)
        fit(make_setup(fabric, wrapped, optimizer, [[ragged(4)]] * 3, 1e-2, train, seed=5), LanguageModeling())
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
    assert any(m.dropout.p for m in model.modules() if isinstance(m, LoRALinear))


def test_recomputed_activations_give_equal_gradients_with_dropout(fabric):
    """Requirement 16."""
    gradients, saved = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), dropout=0.5).requires_grad_(True)
        if recompute:
            checkpoint_activations(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            run(fabric, model, split(ragged(4), 2), gradients=gradients)
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_leaves(fabric, number):
    saved = []

    def log(row):
        if row["step"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(UserError, match=r"(SIGTERM|interrupted): stopped after step 2.*--resume auto"):
        recorder = Listening(log, lambda p: saved.append(dataclasses.replace(p)) or "there")
        run(fabric, tiny_model(), [ragged(2)], steps=10, rate=1e-3, recorder=recorder)
    assert [p.step for p in saved] == [2]


@pytest.mark.parametrize("stopped", [None, 3])
def test_patience(fabric, stopped, monkeypatch):
    """Two evaluations without a lower validation loss end the run; resumed in between, it ends at the same step."""
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.9, 5: 1.9, 6: 2.2, 7: 1.0}
    progress = Progress()
    monkeypatch.setattr(loop, "validate", lambda *_: {"loss": losses[progress.step]})
    settings = dict(train=TrainConfig(eval_every=1, patience=2), rate=1e-3)
    if stopped:
        run(fabric, tiny_model(), [ragged(2)], steps=stopped + 1, progress=progress, **settings)
        progress.step -= 1
        progress = Progress(**dataclasses.asdict(progress))
    run(fabric, tiny_model(), [ragged(2)], steps=20, progress=progress, **settings)
    assert (progress.step, progress.best_step, progress.best_val_loss) == (6, 4, 1.9)


def test_patience_is_a_function_of_what_is_saved(fabric, monkeypatch):
    """A run resumed from any checkpoint, also that of the step that decided, ends after the same step."""
    losses = {1: float("nan"), 2: 2.0, 3: 2.5, 4: 1.9, 5: float("nan"), 6: 2.2, 7: 1.0}
    settings = dict(train=TrainConfig(eval_every=1, patience=2, save_every=1), rate=1e-3)
    saved = []
    progress = Progress()
    monkeypatch.setattr(loop, "validate", lambda *_: {"loss": losses[progress.step]})
    recorder = Listening(checkpoint=lambda p: saved.append(dataclasses.asdict(p)))
    run(fabric, tiny_model(), [ragged(2)], steps=20, progress=progress, recorder=recorder, **settings)
    assert (progress.step, progress.best_step, progress.best_val_loss) == (6, 4, 1.9) and len(saved) == 6
    for state in saved:
        progress = Progress(**state)
        run(fabric, tiny_model(), [ragged(2)], steps=20, progress=progress, **settings)
        assert (progress.step, progress.best_step) == (6, 4)


def command(script, tiny_dir, out_dir, *words):
    return [
        *(sys.executable, str(ROOT / f"scripts/{script}.py"), "--checkpoint_dir", str(tiny_dir)),
        *("--out_dir", str(out_dir), "--data.path", str(DATA / "train.jsonl"), "--data.max_seq_len", "256"),
        *("--data.val_path", str(DATA / "heldout.jsonl"), "--precision", "32-true", "--optim.lr", "1e-2"),
        *("--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--eval.samples", "0"),
        *("--train.max_steps", "12", *words),
    ]


def test_resuming_with_other_settings_is_refused(tiny_dir, tmp_path):
    words = ["--train.save_every", "1", "--train.max_steps", "2"]
    subprocess.run(
        command("finetune_lora", tiny_dir, tmp_path / "run", *words), check=True, capture_output=True, timeout=900
    )
    shutil.rmtree(tmp_path / "run/final")
    words += ["--resume", "auto", "--seed", "2", "--optim.lr", "1e-3", "--train.log_every", "2"]
    done = subprocess.run(command("finetune_lora", tiny_dir, tmp_path / "run", *words), capture_output=True, text=True)
    assert done.returncode == 1
    assert "seed: 1337 -> 2" in done.stderr
    assert "optim.lr: 0.01 -> 0.001" in done.stderr
    assert "log_every" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tiny_model_overfits_and_stops(tiny_dir, tmp_path):
    """Requirement 5: the end of the turn is learnt, through the whole way of the data."""
    import litmini

    data = tmp_path / "one.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Send 5 mugs"}]}\n'
    )
    words = [
        "--data.path",
        str(data),
        "--data.val_path",
        str(data),
        "--data.max_seq_len",
        "32",
        "--train.max_steps",
        "60",
    ]
    words += ["--eval.exact_match", "true", "--optim.lr", "3e-3", "--train.global_batch_size", "1"]
    done = subprocess.run(command("finetune_full", tiny_dir, tmp_path / "run", *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exact match  0% -> 100%" in done.stdout
    model, tokenizer = litmini.load(tmp_path / "run/final", dtype="fp32")
    assert litmini.generate(model, tokenizer, "Hi", max_new_tokens=200) == "Send 5 mugs"


def test_adamw8bit_trains_and_resumes(fabric, tmp_path):
    from litmini.runs.training_state import load_state, save_state

    def start():
        torch.manual_seed(0)
        config = dataclasses.replace(llama.PRESETS["tiny"], dim=128, head_dim=32)  # small tensors stay in 32 bits
        model = llama.Model(config)
        model.init_weights(torch.Generator().manual_seed(0))
        return model, *fabric.setup(model, make_optimizer(model, OptimConfig(name="adamw8bit")))

    def go(wrapped, optimizer, progress, steps):
        setup = make_setup(fabric, wrapped, optimizer, [[ragged(4)]] * steps, progress=progress)
        fit(setup, LanguageModeling())
        return setup.recorder.rows

    model, wrapped, optimizer = start()
    rows = go(wrapped, optimizer, Progress(), 4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    model, wrapped, optimizer = start()
    progress = Progress()
    go(wrapped, optimizer, progress, 2)
    save_state(tmp_path, progress, model, optimizer)
    assert any(t.dtype == torch.uint8 for t in load_file(tmp_path / "training_state.safetensors").values())
    model, wrapped, optimizer = start()
    go(wrapped, optimizer, load_state(tmp_path, model, optimizer), 4)
    assert torch.equal(whole, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_full_state_is_of_this_model(fabric, tiny_dir, tmp_path):
    from litmini.runs.training_state import load_state, save_state

    model = add_lora(load_model(tiny_dir, torch.float32))
    save_state(tmp_path, Progress(), model, make_optimizer(model, OptimConfig()))
    other = load_model(tiny_dir, torch.float32)
    with pytest.raises(UserError, match="to another model"):
        load_state(tmp_path, other, make_optimizer(other, OptimConfig()))


def test_memory_of_a_step_is_kept_for_the_next():
    """Else the system clears each page again. 64 MiB are 16,384 pages; counted in a fresh process, in the third use."""
    code = """
import ctypes, resource, sys
from litmini.distributed.fabric import keep_memory
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallopt"):
    sys.exit("no glibc")
if sys.argv[1] == "kept":
    keep_memory()
libc.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 20)))
    libc.memset(block, 1, ctypes.c_size_t(64 << 20))
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    counts = {}
    for word in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True)
        if "no glibc" in done.stderr:
            pytest.skip("another allocator")
        counts[word] = int(done.stdout)
    assert counts["kept"] < 1000 < 10_000 < counts["given back"]
