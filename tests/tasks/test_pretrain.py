"""pretrain.py, from text to a model that generate.py runs and transformers loads; its models, optimizers and configs."""

import ast
import csv
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from numerics import assert_close, ulps
from safetensors.torch import load_file, save_file
from torch import nn

import litmini
from litmini.checkpoints.config import read_config
from litmini.cli import parse
from litmini.config.pretrain import PretrainConfig
from litmini.config.training import OptimConfig
from litmini.errors import UserError
from litmini.models import FAMILIES, gpt2, llama, use_model_file
from litmini.ops.cross_entropy import IGNORE, ZLossHead, linear_cross_entropy
from litmini.runs.training_state import load_state, save_state
from litmini.tasks.pretrain import blueprint, use_z_loss
from litmini.training.optimizer import learning_rate, make_optimizer
from litmini.training.setup import Progress

ROOT = Path(__file__).parents[2]
OWN_FILE = ROOT / "scripts/examples/llama_gelu.py"
CONFIGS = sorted((ROOT / "config_hub/pretrain").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _forget_model_files(monkeypatch):
    monkeypatch.setattr("litmini.models.FAMILIES", dict(FAMILIES))


def run(script, *words, status=0):
    """A script's command line in this process; returns stdout, or stderr if it fails."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(ROOT / "scripts" / script), *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert exit_.value.code == status, out.getvalue() + err.getvalue()
    return err.getvalue() if status else out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a tokenizer and a corpus, made by the scripts."""
    place = tmp_path_factory.mktemp("place")
    lines = [json.loads(line)["messages"] for line in (ROOT / "config_hub/quickstart/train.jsonl").open()]
    with (place / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": m[0]["content"] + "\n" + m[1]["content"]}) + "\n" for m in lines)
    run("train_tokenizer.py", place / "text.jsonl", "--out_dir", place / "tokenizer", "--vocab_size", 400)
    words = [place / "text.jsonl", "--tokenizer", place / "tokenizer", "--val_fraction", 0.1, "--workers", 1]
    assert "train: " in run("prepare_data.py", *words, "--out_dir", place / "corpus", "--shard_tokens", 5000)
    return place


def settings(place, name, *words, model="llama/tiny"):
    return [
        *("--model", model, "--data.path", place / "corpus", "--out_dir", place / name, "--data.max_seq_len", 64),
        *("--precision", "32-true", "--optim.lr", 1e-2, "--train.max_steps", 10, "--train.global_batch_size", 6),
        *("--train.micro_batch_size", 2, "--eval.samples", 0, "--data.val_rows", 4, *words),
    ]


def losses(out_dir):
    rows = list(csv.DictReader((Path(out_dir) / "metrics.csv").open()))
    return [(r["step"], r["tokens"], r["loss"], r["lr"], r["grad_norm"], r["val_loss"]) for r in rows]


@pytest.fixture(scope="module")
def whole(place):
    return run("pretrain.py", *settings(place, "whole", "--train.save_every", 3, "--train.eval_every", 4))


def test_weights_from_16_bits_are_dithered_before_pretraining_continues(place, whole):
    """Products in bf16 see the same weights, and small updates from the first step on."""
    base = place / "in-bf16"
    shutil.copytree(place / "whole/final", base)
    tensors = load_file(base / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    words = ("--precision", "bf16-mixed", "--optim.lr", 1e-30, "--optim.weight_decay", 0, "--train.max_steps", 1)
    run("pretrain.py", *settings(place, "spread", *words, model=base))
    final = load_file(place / "spread/final/model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(final[name].bfloat16(), tensor.bfloat16()), name
        if tensor.dim() == 2:
            assert (final[name] != tensor.bfloat16().float()).float().mean() > 0.9, name


def test_from_text_to_a_model_that_others_load(place, whole):
    import transformers

    final = place / "whole/final"
    results = json.loads((place / "whole/manifest.json").read_text())
    assert results["results"]["val_loss_after"] < results["results"]["val_loss_before"] - 1
    assert results["results"]["tokens"] == 10 * 6 * 64
    assert results["data"].keys() == {str(place / "corpus/index.json")}
    assert "steps of 6 sequences of 64 tokens" in whole and "epochs of" in whole
    model, tokenizer = litmini.load(final, dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final)
    tokens = torch.tensor([tokenizer.encode("Write this order as one line of JSON")])
    with torch.no_grad():
        assert_close(theirs(tokens).logits, model(tokens))
    assert theirs.generation_config.eos_token_id == tokenizer.stop_ids[0] == 0
    answer = run(
        "generate.py", "--checkpoint_dir", final, "--prompt", "Write", "--max_new_tokens", 5, "--dtype", "fp32"
    )
    assert answer.strip() == litmini.generate(model, tokenizer, "Write", max_new_tokens=5).strip()
    assert transformers.AutoTokenizer.from_pretrained(final)("Write this")["input_ids"] == tokenizer.encode(
        "Write this"
    )


def test_killed_and_resumed_equals_undisturbed(place, whole):
    """Requirement 22: bit by bit, also over an epoch's end."""
    words = settings(place, "killed", "--train.save_every", 3, "--train.eval_every", 4)
    victim = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/pretrain.py"), *map(str, words)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list((place / "killed").glob("step-*")) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    _, error = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {error.decode()[-1000:]}"
    assert "resuming from" in run("pretrain.py", *words, "--resume", "auto")
    assert losses(place / "killed") == losses(place / "whole")
    assert_same(place / "killed/final/model.safetensors", place / "whole/final/model.safetensors")
    assert_same(
        place / "killed/step-000009/training_state.safetensors", place / "whole/step-000009/training_state.safetensors"
    )


def assert_same(one, two):
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_pretraining_continues_from_a_checkpoint(place, whole):
    words = settings(
        place, "more", "--train.max_steps", 2, "--data.isolate_documents", "true", model=place / "whole/final"
    )
    run("pretrain.py", *words, "--z_loss", 1e-4, "--optim.name", "muon")
    results = json.loads((place / "more/manifest.json").read_text())
    before = json.loads((place / "whole/manifest.json").read_text())["results"]["val_loss_after"]
    assert results["results"]["val_loss_before"] == pytest.approx(before, abs=0.2)  # isolated rows differ a little
    assert results["base"]["checkpoint_dir"] == str(place / "whole/final")
    assert "unknown setting" not in run("pretrain.py", *words, "--out_dir", place / "dry", "--dry_run", "true")
    assert not (place / "dry").exists()
    error = run("pretrain.py", *words, "--out_dir", place / "x", "--model.n_layers", 3, status=1)
    assert "is a checkpoint: its shape is fixed, so --model.n_layers cannot be" in error


def test_a_mixture(place, tmp_path):
    words = [place / "text.jsonl", "--tokenizer", place / "tokenizer", "--val_fraction", 0.5, "--workers", 1]
    run("prepare_data.py", *words, "--out_dir", place / "second")
    paths = f"[{place / 'corpus'}, {place / 'second'}]"
    words = settings(place, "mixture", "--train.max_steps", 2, "--data.path", paths, "--data.weights", "[1, 3]")
    shown = run("pretrain.py", *words)
    epochs = json.loads((place / "mixture/manifest.json").read_text())["statistics"]["epochs"]
    assert list(epochs) == [str(place / "corpus"), str(place / "second")]
    assert all(f"{count:.2f} epochs of {path}" in shown for path, count in epochs.items())
    assert "data.weights is [1.0]" in run_fails(*settings(place, "x", "--data.weights", "[1]", "--data.path", paths))


def run_fails(*words):
    err = io.StringIO()
    with redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        parse(PretrainConfig, "doc", argv=[str(word) for word in words])
    assert exit_.value.code == 2
    return err.getvalue()


def test_a_model_file_of_ones_own(place, whole, tmp_path):
    out = place / "own"
    words = settings(place, "own", "--train.max_steps", 2, "--model.n_layers", 1, model=f"{OWN_FILE}:tiny")
    run("pretrain.py", *words)
    assert json.loads((out / "final/config.json").read_text())["model_type"] == "llama_gelu"
    generate = ["--checkpoint_dir", out / "final", "--prompt", "Write", "--max_new_tokens", 3]
    del litmini.models.FAMILIES["llama_gelu"]  # as in a new process
    error = run("generate.py", *generate, status=1)
    assert "model_type 'llama_gelu' is not implemented" in error and "--model_file FILE.py" in error
    run("generate.py", *generate, "--model_file", OWN_FILE)
    shown = run("convert_to_hf.py", out / "final", "--out_dir", tmp_path / "hf", "--model_file", OWN_FILE)
    assert "transformers cannot load it" in shown
    assert_same(tmp_path / "hf/model.safetensors", out / "final/model.safetensors")


@pytest.mark.parametrize("part", ["RMSNorm", "rotate", "Attention", "Block"])
def test_the_rest_of_the_model_file_is_that_of_llama(part):
    sources = []
    for file in (OWN_FILE, ROOT / "litmini/models/llama.py"):
        text = file.read_text()
        (node,) = [n for n in ast.parse(text).body if getattr(n, "name", None) == part]
        sources.append(str(ast.get_source_segment(text, node)).replace("bias=config.attn_bias", "bias=False"))
    assert sources[0] == sources[1]


def test_the_model_file_differs_from_llama_as_it_says():
    """With SwiGLU put back, the example is llama.py: the same tensors give the same logits."""
    spec = importlib.util.spec_from_file_location("example", OWN_FILE)
    example = sys.modules["example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.MLP = llama.MLP
    config = llama.PRESETS["tiny"]
    fields = {**vars(example.PRESETS["tiny"]), "ffn_dim": config.ffn_dim}
    own = example.Config(**fields)
    object.__setattr__(own, "mlp_bias", False)
    models = [llama.Model(config), example.Model(own)]
    models[0].init_weights(torch.Generator().manual_seed(0))
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(0, 512, (2, 30))
    assert torch.equal(models[0](tokens), models[1](tokens))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (models[0], example_model(example))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def example_model(example):
    fresh = runpy.run_path(str(OWN_FILE))
    return fresh["Model"](fresh["PRESETS"]["tiny"])


BROKEN = {
    "lacks.py": ("import torch\n", "lacks.py lacks Config, PRESETS, config_from_hf, config_to_hf, Model"),
    "syntax.py": ("x = 1\nif:\n", "syntax.py:2 fails: SyntaxError"),
    "fails.py": ("x = 1\n\ny = x / 0\n", "fails.py:3 fails: ZeroDivisionError: division by zero"),
    "same.py": (
        OWN_FILE.read_text().replace('"llama_gelu"', '"llama"'),
        "model_type 'llama', expected a name that none",
    ),
    "none.py": (
        re.sub(r"PRESETS = \{.*?\n\}", "PRESETS = {}", OWN_FILE.read_text(), flags=re.DOTALL),
        "no preset in PRESETS",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_file_is_named(tmp_path, name):
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        use_model_file(str(tmp_path / name))


def plan(model, **fields):
    return blueprint(PretrainConfig(out_dir="o", model=model, model_fields=fields, data={"path": "d"}))


def test_models_by_name():
    assert plan("llama/tiny").config == llama.PRESETS["tiny"]
    assert plan("gemma3/tiny").module is plan("gemma3_text/tiny").module
    assert plan("gpt2/openai-community/gpt2").config == gpt2.PRESETS["openai-community/gpt2"]
    changed = plan("llama/tiny", n_layers=6, rope_theta=500_000, tied=True, window=None).config
    assert (changed.n_layers, changed.rope_theta, changed.tied, changed.dim) == (6, 5e5, True, 64)
    one, two = (plan("llama/tiny").model(torch.float32, seed=seed) for seed in (1, 1))
    other = plan("llama/tiny").model(torch.float32, seed=2)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("lama/tiny", {}, "no family 'lama'.*FAMILY/PRESET"),
        ("llama/huge", {}, "no preset 'huge'; there are: tiny"),
        ("llama/tiny", {"n_layer": 2}, "unknown setting 'model.n_layer': did you mean 'n_layers'"),
        ("llama/tiny", {"zzz": 2}, "no field model.zzz; there are vocab_size"),
        ("llama/tiny", {"n_layers": "many"}, "model.n_layers is 'many', expected int"),
        ("llama/tiny", {"window": 1.5}, "model.window is 1.5, expected int or null"),
        ("llama/tiny", {"n_heads": 3}, "n_heads 3 is not a multiple of n_kv_heads 2"),
        ("nothing.py:tiny", {}, "model file not found: nothing.py"),
    ],
)
def test_models_that_are_not_there(model, fields, message):
    with pytest.raises(UserError, match=message):
        plan(model, **fields)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.vocab_size", 300], r"vocabulary of 400, the model one of 300.*--model.vocab_size 400"),
        (
            ["--data.max_seq_len", 512],
            r"context 256 tokens: use --data.max_seq_len 256 or less, or --model.max_positions 512",
        ),
        (["--data.path", "nowhere"], r"nowhere is no corpus. Make one: python scripts/prepare_data.py"),
        (["--data.max_seq_len", 20000, "--model.max_positions", 20000], r"a sequence needs 20,001"),
    ],
)
def test_what_does_not_fit_is_refused(place, words, message):
    error = run("pretrain.py", *settings(place, "refused", *words), status=1)
    assert re.search(message, error), error
    assert not (place / "refused").exists()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


DAMAGE = {
    "truncated": (
        lambda c: os.truncate(c / "train-00000.bin", 9000),
        r"train-00000.bin has 9,000 bytes, index.json says",
    ),
    "flipped": (
        lambda c: [flip(c / f"train-0000{i}.bin") for i in (0, 1)],
        r"train-0000.\.bin is damaged: bytes .* checksum",
    ),
    "no shard": (lambda c: (c / "train-00001.bin").unlink(), r"train-00001.bin is missing"),
    "no checksums": (
        lambda c: [f.unlink() for f in c.glob("train*.crc")],
        r"train-0000.\.crc has 0 checksums, expected",
    ),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), r"tokenizer of a corpus not found: .*tokenizer.json"),
    "other tokenizer": (
        lambda c: edit(c / "tokenizer.json", lambda t: t["model"]["merges"].pop()),
        r"is not the tokenizer",
    ),
    "no index": (lambda c: (c / "index.json").write_text("{"), r"index.json is not valid JSON"),
    "half an index": (lambda c: edit(c / "index.json", lambda i: i.pop("splits")), r"index.json is damaged \(KeyError"),
    "strange tokens": (lambda c: edit(c / "index.json", lambda i: i.update(dtype="float64")), r"index.json is damaged"),
    "few tokens": (
        lambda c: edit(c / "index.json", lambda i: i.update(vocab_size=60)),
        r"bin holds token \d+, but index.json has vocab_size 60",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_corpus_is_named(place, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(shutil.copytree(place / "corpus", tmp_path / "c"))
    words = settings(place, "x", "--data.path", tmp_path / "c", "--train.max_steps", 30, "--out_dir", tmp_path / "x")
    error = run("pretrain.py", *words, status=1)
    assert re.search(f"error: .*{message}", error), error
    assert str(tmp_path / "c") in error and "Traceback" not in error


TEXT = {
    "a.txt": (b"fine\n\xff", r"a.txt:2 is not UTF-8 text"),
    "b.jsonl": (
        b'{"text": "fine"}\n{"text": " "}\n',
        r"1 of 2 documents are empty \(the first: document 2, in .*b.jsonl\)",
    ),
    "c.jsonl.gz": (b"no gzip", r"c.jsonl.gz cannot be read"),
    "d.jsonl": (b'{"body": "fine"}\n', r"d.jsonl:1: no 'text', found body"),
    "e.csv": (b"text\nfine\n", r"e.csv: expected .txt, .jsonl, .parquet"),
}


@pytest.mark.parametrize("name", TEXT)
def test_bad_text_is_named_on_the_command_line(place, tmp_path, name):
    content, message = TEXT[name]
    (tmp_path / name).write_bytes(content)
    words = [tmp_path / name, "--tokenizer", place / "tokenizer", "--out_dir", tmp_path / "out", "--workers", 1]
    error = run("prepare_data.py", *words, status=1)
    assert re.search(f"^error: .*{message}", error, re.M), error
    assert not (tmp_path / "out/index.json").exists()


def test_another_tokenizer_is_refused(place, whole, tiny_dir, tokenizer_dir):
    error = run("pretrain.py", *settings(place, "x", model=tiny_dir), status=1)
    assert f"was not made with the tokenizer of {tiny_dir}" in error and f"--tokenizer {tiny_dir}" in error
    words = [place / "text.jsonl", "--tokenizer", tokenizer_dir, "--out_dir", place / "other", "--workers", 1]
    run("prepare_data.py", *words)
    both = f"[{place / 'corpus'}, {place / 'other'}]"
    assert "different tokenizers" in run("pretrain.py", *settings(place, "x", "--data.path", both), status=1)
    run("pretrain.py", *settings(place, "x", "--data.path", place / "other", "--dry_run", "true", model=tiny_dir))


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    config = OptimConfig(name="muon", lr=0.01, weight_decay=0.1)

    def tiny():
        model = llama.Model(llama.PRESETS["tiny"])
        model.init_weights(torch.Generator().manual_seed(0))
        return model

    def loss(model):
        tokens = torch.arange(60).view(2, 30)
        return model(tokens, labels=tokens)[0] / 60

    ours, theirs = tiny(), tiny()
    together = make_optimizer(ours, config)
    inside = [p for n, p in theirs.named_parameters() if ".layers." in n and p.dim() == 2]
    decayed, plain = (
        [theirs.lm_head.weight, theirs.model["embed_tokens"].weight],
        [p for p in theirs.parameters() if p.dim() < 2],
    )
    assert len(inside) == 2 * 7
    apart = [
        torch.optim.Muon(inside, 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            0.01,
            (0.9, 0.95),
            fused=True,
        ),
    ]
    for step in range(3):
        for model, optimizers in ((ours, [together]), (theirs, apart)):
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 / (step + 1)
            loss(model).backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_, theirs_), name


def test_muon_is_saved_and_restored(tmp_path):
    model, other = (llama.Model(llama.PRESETS["tiny"]) for _ in range(2))
    optimizers = [make_optimizer(m, OptimConfig(name="muon", lr=0.01)) for m in (model, other)]

    def step(model, optimizer):
        tokens = torch.arange(60).view(2, 30)
        optimizer.zero_grad()
        model(tokens, labels=tokens)[0].backward()
        optimizer.step()

    step(model, optimizers[0])
    save_state(tmp_path, Progress(step=1), model, optimizers[0])
    load_state(tmp_path, other, optimizers[1])
    for _ in range(2):
        step(model, optimizers[0])
        step(other, optimizers[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    names = load_file(tmp_path / "training_state.safetensors")
    assert any(n.startswith("momentum_buffer/") for n in names) and any(n.startswith("exp_avg/") for n in names)


def test_warm_up_stable_decay():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule="wsd", decay_fraction=0.25)
    rates = [learning_rate(step, 40, config) for step in range(41)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:31] == [1.0] * 27
    assert rates[30:] == pytest.approx([1.0 - 0.09 * i for i in range(11)])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_z_loss_is_in_the_gradients_only(softcap):
    torch.manual_seed(0)
    plain = nn.Linear(8, 30, bias=False)
    head = ZLossHead(plain, 0.01)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    labels = torch.randint(0, 30, (2, 5))
    labels[0, :2] = IGNORE
    loss, count = linear_cross_entropy(hidden, head, labels, softcap)
    loss.backward()
    found = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = plain.weight.grad = None
    logits = plain(hidden[labels != IGNORE])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entropy = nn.functional.cross_entropy(logits, labels[labels != IGNORE], reduction="sum")
    (entropy + 0.01 * logits.logsumexp(-1).square().sum()).backward()
    assert float(loss.detach()) == pytest.approx(float(entropy.detach()), rel=ulps()) and int(count) == 8
    assert_close(found[0], hidden.grad)
    assert_close(found[1], plain.weight.grad)


def test_z_loss_keeps_a_tied_head_tied():
    model = gpt2.Model(gpt2.PRESETS["tiny"])
    names = [name for name, _ in model.named_parameters()]
    use_z_loss(model, 1e-4)
    assert type(model.lm_head) is ZLossHead and model.lm_head.weight is model.transformer["wte"].weight
    assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(UserError, match="not a linear without bias"):
        use_z_loss(nn.Sequential(nn.Linear(2, 2)), 1e-4)


def test_runs_in_one_picture(place, whole):
    shown = run("plot_runs.py", place / "whole", place / "whole", "--out_file", place / "both.png")
    last = json.loads((place / "whole/manifest.json").read_text())["results"]["val_loss_after"]
    assert f"{place / 'whole'}: last validation loss {last:.4f}" in shown
    assert (place / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "metrics of a run not found" in run("plot_runs.py", place, "--out_file", place / "none.png", status=1)
    assert "Format 'xyz'" in run("plot_runs.py", place / "whole", "--out_file", place / "a.xyz", status=1)


def test_the_benchmark_trains_the_same_model_twice(place):
    words = settings(place, "benchmark", "--train.max_steps", 40, "--train.micro_batch_size", 6, model="gpt2/tiny")
    shown = run("../scripts/bench/pretraining.py", *words)
    sides = re.findall(r"(litmini|plain) +([\d,]+) parameters, .* validation loss ([\d.]+)", shown)
    assert [side[0] for side in sides] == ["litmini", "plain"] and sides[0][1] == sides[1][1]
    assert float(sides[0][2]) == pytest.approx(float(sides[1][2]), abs=0.5) and float(sides[0][2]) < 5


SIZES = {"char": 0.81, "gpt2_124m": 124, "llama_160m": 162, "qwen3_like": 113, "gemma_like": 108}  # million


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.name)
def test_research_configurations(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(PretrainConfig, "doc", argv=["--config", str(file)])
    found = blueprint(config)
    assert config.data.max_seq_len <= found.config.max_positions
    with torch.device("meta"):
        size = sum(p.numel() for p in found.module.Model(found.config).parameters())
    assert size / 1e6 == pytest.approx(SIZES.get(file.stem, 0.617), rel=0.01)
    assert config.train.global_batch_size % config.train.micro_batch_size == 0


def test_read_config_knows_own_families_after_use(tmp_path):
    module = use_model_file(str(OWN_FILE))
    (tmp_path / "config.json").write_text(json.dumps(module.config_to_hf(module.PRESETS["tiny"])))
    assert read_config(tmp_path) == (module, module.PRESETS["tiny"])
