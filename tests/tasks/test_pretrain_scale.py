"""Pretraining in several processes: they do what one does, see each row once and save while they train. Remote corpora."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from numerics import difference, ulps
from safetensors.torch import load_file
from two import ROOT, command, run_two, values

from litmini.data.pretrain.read_shards import Corpus
from litmini.data.pretrain.text import find_sources
from litmini.data.pretrain.tokenize import TokenizerSpec
from litmini.data.pretrain.windows import TokenWindows
from litmini.data.pretrain.write_shards import prepare
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer

pytestmark = pytest.mark.xdist_group("two")  # in one test process, which has one server of processes
STEPS, BATCH = 6, 8
DDP, FSDP = (["--devices", 2, "--strategy", name] for name in ("ddp", "fsdp"))
HSDP = ["--devices", 2, "--num_nodes", 2, "--strategy", "hsdp"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_dir):
    """A corpus of some 30 rows of 32 tokens to train on, for six steps of 8."""
    place = tmp_path_factory.mktemp("scale")
    lines = (ROOT / "config_hub/quickstart/train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines[:60]]
    (place / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = TokenizerSpec((tokenizer_dir / "tokenizer.json").read_text(), [], 2, val_fraction=0.3, shard_tokens=500)
    sources = find_sources([str(place / "a.jsonl")])
    prepare(sources, spec, place / "corpus", 1, Tokenizer(tokenizer_dir).save, say=lambda text: None)
    return place


def words(place, name, *more):
    fixed = ["--model", "llama/tiny", "--data.path", place / "corpus", "--out_dir", place / name]
    fixed += ["--data.max_seq_len", 32, "--precision", "32-true", "--optim.lr", 1e-2, "--optim.weight_decay", 0.1]
    fixed += ["--train.max_steps", STEPS, "--train.global_batch_size", BATCH, "--train.micro_batch_size", 1]
    fixed += ["--eval.samples", 1, "--eval.max_new_tokens", 2, "--train.eval_every", 2, "--train.save_every", 3]
    return [str(word) for word in [*fixed, "--train.keep_last", 9, *more]]


def logged(rows_file, *arguments):
    """pretrain.py, noting each row that is trained on, of this process."""
    batch = TokenWindows.batch

    def noting(self, rows):
        if self.split == "train":
            with open(rows_file, "a") as file:
                file.writelines(f"{row}\n" for row in rows)
        return batch(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenWindows, "batch", noting)
        command("pretrain", *arguments)


def train(place, name, *more, devices=1, nodes=1, rows=None):
    """Run it, in one process or several; returns what it said and the rows that each step went over."""
    file = place / f"{name}-{time.monotonic_ns()}.rows"
    arguments = words(place, name, *more)
    if devices * nodes == 1:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [])
            logged(file, *arguments)
        assert end.value.code == 0
        return "", file
    ended = run_two(logged, file, *arguments, devices=devices, nodes=nodes)
    assert all(end.status == 0 for end in ended), "\n".join(end.err for end in ended)
    return ended[0].out, file


def seen(file):
    return sorted(map(int, file.read_text().split()))


def curve(run):
    names = ("step", "tokens", "lr", "loss", "grad_norm", "val_loss")
    rows = csv.DictReader((run / "metrics.csv").open())
    return [[float(row[name] or 0) for name in names] for row in rows]


def product(run):
    return load_file(run / "final/model.safetensors")


def assert_runs_agree(one, other):
    """Counts and rates are equal; losses, norms and weights are, up to the order in which sums are rounded."""
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a[:3] == b[:3]
        assert b[3:] == pytest.approx(a[3:], rel=ulps())
    ours, theirs = product(one), product(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam divides by a gradient's size: where there is next to none, rounding decides on the update
        assert difference(theirs[name], ours[name]) <= 1e-3, name


def forget(run):
    """Make a finished run one that was killed after step 3."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "step-000006")


@pytest.fixture(scope="module")
def one(place):
    _, file = train(place, "one")
    assert seen(file) == list(range(STEPS * BATCH))
    return place / "one"


@pytest.fixture(scope="module")
def shared(place, one):
    """The same of two processes that share the model."""
    said, file = train(place, "fsdp", *FSDP, devices=2)
    assert "parameters are sharded over 2 processes" in said
    assert seen(file) == list(range(STEPS * BATCH))
    return place / "fsdp"


def test_replicas_and_shards_equal_one_process(place, one, shared):
    """Losses, validation losses, norms and weights of two processes, whose steps have four micro-batches each."""
    _, file = train(place, "ddp", *DDP, devices=2)
    assert seen(file) == list(range(STEPS * BATCH))
    assert_runs_agree(one, place / "ddp")
    assert_runs_agree(one, shared)


def test_muon_on_shards_equals_muon_on_one_process(place, one):
    """Its products are in bf16, so sums in another order show: the curves part by thousandths."""
    more = ["--optim.name", "muon", "--train.max_steps", 3]
    train(place, "muon", *more)
    train(place, "muon-fsdp", *more, *FSDP, devices=2)
    for a, b in zip(curve(place / "muon"), curve(place / "muon-fsdp"), strict=True):
        assert b == pytest.approx(a, rel=5e-3)
    assert curve(place / "muon")[2][3] != pytest.approx(curve(one)[2][3], rel=5e-3)


def slurm(*arguments):
    """pretrain.py as `srun` starts it: one task on each of two nodes."""
    rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    os.environ.update(
        SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="2", SLURM_JOB_NAME="train", SLURM_JOB_ID="1"
    )
    os.environ.update(SLURM_PROCID=rank, SLURM_NODEID=rank, SLURM_LOCALID="0", SLURM_NODELIST="localhost")
    os.environ.update(MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
    command("pretrain", *arguments)


def test_started_by_slurm(place, one):
    how = ["--devices", 1, "--num_nodes", 2, "--strategy", "fsdp"]
    ended = run_two(slurm, *words(place, "slurm", *how))
    assert all(end.status == 0 for end in ended), "\n".join(end.err for end in ended)
    assert "parameters are sharded over 2 processes" in ended[0].out and not ended[1].out
    assert_runs_agree(one, place / "slurm")


def test_four_processes_shard_within_nodes_and_replicate_across_them(place, one):
    """hsdp on 2 x 2: each process holds half, and a share is written once."""
    said, file = train(place, "hsdp", *HSDP, devices=2, nodes=2)
    mine, every = re.search(r"over 4 processes: this one holds ([\d.]+) of ([\d.]+) MiB", said).groups()
    assert float(mine) == pytest.approx(float(every) / 2, abs=0.06) and float(every) > 0.4
    assert seen(file) == list(range(STEPS * BATCH))
    assert_runs_agree(one, place / "hsdp")
    sizes = [f.stat().st_size for f in (place / "hsdp/step-000003/training_state").iterdir()]
    whole = (one / "step-000003/training_state.safetensors").stat().st_size
    assert whole < sum(sizes) < 1.3 * whole


def test_resumed_on_other_numbers_every_row_is_seen_once(place, one, shared):
    """After three steps of two processes, four go on, or one, or two. An epoch ends in the first step that they do."""
    whole = curve(shared)
    for how, devices, nodes in ((HSDP, 2, 2), ([], 1, 1), (FSDP, 2, 1)):
        forget(shared)
        _, file = train(place, "fsdp", *how, "--resume", "auto", devices=devices, nodes=nodes)
        assert seen(file) == list(range(3 * BATCH, STEPS * BATCH))
        assert_runs_agree(one, shared)
    assert curve(shared) == whole  # as many as before: to the bit


def test_hsdp_wants_several_of_both(place):
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="found 4 devices on 1 nodes. Use .* fsdp"),
    ):
        from litmini.cli import parse
        from litmini.config.pretrain import PretrainConfig
        from litmini.distributed.fabric import make_fabric

        patch.setattr(sys, "argv", ["pretrain.py"])
        make_fabric(parse(PretrainConfig, "", argv=words(place, "x", "--devices", 4, "--strategy", "hsdp")))


def saved_in_the_background(directory):
    """Train on while shares are being written; returns whether that was possible, and what is read back is what was."""
    from torch import distributed
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh

    from litmini.distributed.fsdp import shard
    from litmini.models import llama
    from litmini.runs.training_state import load_shards, named_state, save_shards

    distributed.init_process_group("gloo")
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    model = shard(model, init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.arange(24).view(2, 12) + distributed.get_rank()

    def step():
        model(tokens, labels=tokens)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = {
        name: value.full_tensor().clone() if value.ndim else value.clone()
        for name, value in named_state(model, optimizer)
    }
    trained, write = threading.Event(), HuggingFaceStorageWriter.write_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", lambda *args: (trained.wait(60), write(*args))[1])
        wait = save_shards(directory, model, optimizer)
        step()  # with gathers and sums among the processes
        written_too_soon = any(directory.glob("*.safetensors"))
        distributed.barrier()  # both have looked
        trained.set()
        wait()
    distributed.barrier()
    after = {name: value.full_tensor() if value.ndim else value for name, value in named_state(model, optimizer)}
    found = dict(load_shards(directory, dict(model.named_parameters())))
    found = {name: value.full_tensor() if value.ndim else value for name, value in found.items()}
    distributed.destroy_process_group()
    same = found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in found)
    return written_too_soon, same, any(torch.equal(found[name], after[name]) for name in found)


def test_shards_are_written_while_training_continues(tmp_path):
    assert values(run_two(saved_in_the_background, tmp_path)) == [(False, True, False)] * 2


def dies_while_saving(*arguments):
    """pretrain.py; rank 1 is killed in the middle of the second save."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    calls, write = [], HuggingFaceStorageWriter.write_data

    def killing(self, plan, planner):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            (Path(self.path) / "half.safetensors").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    HuggingFaceStorageWriter.write_data = killing
    command("pretrain", *arguments)


def test_killed_while_saving_the_last_checkpoint_is_gone_on_from(place, one):
    arguments = words(place, "killed", *FSDP)
    ended = run_two(dies_while_saving, *arguments)
    assert ended[1].status == -signal.SIGKILL and ended[0].status != 0
    run = place / "killed"
    assert (run / "step-000003").is_dir() and not (run / "step-000006").exists()
    said, _ = train(place, "killed", *FSDP, "--resume", "auto", devices=2)
    assert "step-000003, after step 3" in said
    assert_runs_agree(one, run)
    assert not list(run.glob(".*"))


@pytest.fixture
def remote(place):
    """The corpus in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    for file in (place / "corpus").iterdir():
        system.pipe(f"/bucket/corpus/{file.name}", file.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_rows_of_a_remote_corpus_are_those_of_the_local_one(place, remote, monkeypatch):
    fetched: Counter = Counter()
    fetch = type(remote).cat_file

    def counting(self, path, start=None, end=None):
        fetched[path.rsplit(".")[-1]] += 1 if path.endswith(".bin") else 0
        return fetch(self, path, start, end)

    ours, ahead = TokenWindows([Corpus(place / "corpus")], "train", 32, 3), []
    monkeypatch.setattr(type(remote), "cat_file", counting)
    theirs = TokenWindows([Corpus("memory://bucket/corpus/")], "train", 32, 3)
    assert not fetched["bin"]
    (store,) = {shard.store for shard in theirs.shards[0]}
    for step in range(12):
        numbers = range(step * 5, step * 5 + 5)
        for a, b in zip(ours.batches(numbers, 5), theirs.batches(numbers, 5), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
        ahead.append(len(store._pending))  # of the next step
        assert fetched["bin"] <= 5 * (step + 2)  # each row once, at most: these rows are short, and share pages
    assert 0 < max(ahead) <= 5
    assert not list(store.directory.glob("*.bin"))
    held_out = TokenWindows([Corpus("memory://bucket/corpus")], "val", 32, 0)
    list(held_out.batches(range(len(held_out)), 2))
    assert not held_out.shards[0][0].store._pending


def test_damage_in_object_storage_is_named(place, remote):
    def rows():
        windows = TokenWindows([Corpus("memory://bucket/corpus")], "train", 32, 3)
        return list(windows.batches(range(len(windows)), 8))

    def refused(message):
        with pytest.raises(UserError, match=message):
            rows()

    rows()
    name = "/bucket/corpus/train-00001.bin"
    content = remote.cat_file(name)
    remote.pipe(name, content[:500] + b"!" + content[501:])
    refused("memory://bucket/corpus/train-00001.bin is damaged: bytes 0 to 1,000 fail their checksum")
    remote.pipe(name, content[:-2])
    refused("train-00001.bin has 998 bytes, index.json says 1,000")
    remote.pipe(name, content)
    crc = "/bucket/corpus/train-00001.crc"
    remote.rm(crc)
    refused("train-00001.crc is missing")
    remote.rm("/bucket/corpus/index.json")
    refused("memory://bucket/corpus is no corpus: it has no index.json")
    with pytest.raises(UserError, match="nosuch://bucket cannot be listed: ValueError: Protocol not known"):
        Corpus("nosuch://bucket")


def test_training_on_a_remote_corpus(place, one):
    """From a URL: the very curve of files; and it resumes."""
    url = ["--data.path", f"file://{place / 'corpus'}"]
    train(place, "remote", *url)
    assert curve(place / "remote") == curve(one)
    data = json.loads((place / "remote/manifest.json").read_text())["data"]
    assert list(data) == [f"file://{place / 'corpus'}/index.json"]
    forget(place / "remote")
    train(place, "remote", *url, "--resume", "auto")
    assert curve(place / "remote") == curve(one)
