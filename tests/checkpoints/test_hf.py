"""Checkpoints in and out: what is damaged is named, and what was there is never lost."""

import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import litmini.checkpoints.safetensors_io
from litmini.checkpoints import hf as checkpoint
from litmini.checkpoints.hf import check_checkpoint_dir, load_model, parse_dtype, save_model, save_trained
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.errors import UserError
from litmini.files import read_json, write_atomically, write_json
from litmini.models import llama

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tiny(tiny_dir, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "tiny"))


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(directory)
    return str(error.value)


def change_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v != "DROP"}))


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_missing_directory_lists_those_there_are_and_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(Path("checkpoints/acme/tiny"))
    assert "checkpoint directory not found: checkpoints/acme/tiny" in message
    assert "There are no checkpoints in checkpoints/ yet" in message
    assert message.endswith("python scripts/download.py acme/tiny")
    Path("checkpoints/org/other").mkdir(parents=True)
    Path("checkpoints/org/other/config.json").write_text("{}")
    assert "Checkpoints here: checkpoints/org/other" in refused(Path("checkpoints/acme/tiny"))


def test_an_incomplete_directory_names_all_that_lacks(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    assert "it lacks config.json, tokenizer.json, model.safetensors" in refused(tmp_path / "empty")
    write_json(tiny / INDEX, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    assert "it lacks model-1.safetensors, model-2.safetensors" in refused(tiny)
    (tiny / "config.json").unlink()
    assert "it lacks config.json, model-1" in refused(tiny)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"garbage that is no safetensors file at all",
        struct.pack("<Q", 2**62) + b"{}",
        header({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}),
        header({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [2**40, 2**40 + 8]}}) + b"\0" * 8,
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}) + b"\0" * 8,
        b"\x02\0\0\0\0\0\0\0[]",
    ],
    ids=["empty", "zeros", "garbage", "long header", "no data", "short", "outside", "dtype", "negative", "list"],
)
def test_a_weight_file_that_lies_is_named(tiny, content):
    (tiny / "model.safetensors").write_bytes(content)
    message = refused(tiny)
    assert str(tiny / "model.safetensors") in message and "damaged" in message


def test_a_truncated_weight_file_is_named(tiny):
    whole = (tiny / "model.safetensors").read_bytes()
    for size in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tiny / "model.safetensors").write_bytes(whole[:size])
        assert str(tiny / "model.safetensors") in refused(tiny)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "outside its directory: ../model.safetensors"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its directory: /etc/passwd"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "outside its directory"),
        ({"weight_map": {"a": ".."}}, "it lacks .."),
        ({"weight_map": {"a": 5}}, "has no weight_map of file names"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "holds a JSON list"),
        ({"weight_map": {}}, "missing model.embed_tokens.weight"),
    ],
)
def test_an_index_that_lies_is_refused(tiny, index, expected):
    (tiny / INDEX).write_text(json.dumps(index))
    message = refused(tiny)
    assert expected in message and str(tiny) in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null"])
def test_a_broken_config_is_named(tiny, content):
    (tiny / "config.json").write_bytes(content)
    assert f"{tiny / 'config.json'} " in refused(tiny)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "DROP"}, "model_type '' is not implemented; there are: deepseek_v3, falcon, gemma"),
        ({"model_type": "gpt9"}, "model_type 'gpt9' is not implemented; there are: deepseek_v3, falcon, gemma"),
        ({"model_type": ["llama"]}, "config.json"),
        (
            {"vision_config": {}, "audio_config": {"a": 1}},
            "multimodal model (audio_config) whose text part is not there",
        ),
        (
            {"model_type": "gemma3", "vision_config": {"a": 1}, "text_config": {"model_type": "gemma3_text"}},
            "the text part is not in the weights beside it: expected tensors language_model.model.*",
        ),
        ({"hidden_size": "DROP"}, "lacks the key 'hidden_size'"),
        ({"hidden_act": "gelu"}, "not implemented in llama.py: hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the key 'factor'"),
        ({"rope_parameters": "linear"}, "config.json"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 0, "head_dim": "DROP"}, "config.json"),
        ({"num_attention_heads": 3}, "n_heads 3 is not a multiple of n_kv_heads 2"),
        ({"hidden_size": "64"}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"hidden_size": 2.5}, "config.json"),
        ({"num_hidden_layers": "two"}, "config.json"),
        ({"num_hidden_layers": None}, "config.json"),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(tiny, changes, expected):
    change_config(tiny, **changes)
    message = refused(tiny)
    assert expected in message and str(tiny / "config.json") in message


def test_all_tensors_that_do_not_fit_are_in_one_error(tiny):
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    tensors["strange.bias"] = torch.zeros(5)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # old exports have these
    save_file(tensors, tiny / "model.safetensors")
    listed = refused(tiny).split("\n  ")
    assert listed[0] == f"the weights in {tiny} do not fit its config.json:"
    assert sorted(listed[1:]) == [
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight has shape (3, 4), config.json implies (128, 64)",
        "model.layers.0.self_attn.q_proj.weight is int8, expected floating point",
        "unexpected strange.bias (5,)",
    ]


def test_a_tensor_in_two_shards_is_an_error(tiny):
    (tiny / "model.safetensors").rename(tiny / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, tiny / "b.safetensors")
    write_json(tiny / INDEX, {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    assert "model.norm.weight occurs twice" in refused(tiny)


def test_long_lists_of_problems_are_cut(tiny):
    save_file({f"t{i}": torch.zeros(1) for i in range(100)}, tiny / "model.safetensors")
    assert len(refused(tiny).splitlines()) == 22


def test_nothing_in_a_checkpoint_is_run(tiny):
    assert load_model(tiny).training is False
    (tiny / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, tiny / "pytorch_model.bin")
    assert "it lacks model.safetensors" in refused(tiny)


# Writing aside


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, error, there):
    target = tmp_path / "run" / "x"
    if there:
        target.mkdir(parents=True)
        (target / "a").write_text("old")
    with pytest.raises(error), write_atomically(target) as aside:
        (aside / "a").write_text("new")
        raise error
    assert list(tmp_path.rglob("*")) == ([tmp_path / "run", target, target / "a"] if there else [tmp_path / "run"])
    assert not there or (target / "a").read_text() == "old"


def test_success_replaces_all_and_leaves_nothing_beside(tmp_path):
    target = tmp_path / "x"
    for content in ("one", "two"):
        with write_atomically(target) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / content).write_text(content)
        assert tree(tmp_path) == {f"x/sub/{content}": content.encode()}


def test_everything_is_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1])
    monkeypatch.setattr(Path, "rename", lambda p, to: (events.append(f"rename {to.name}"), rename(p, to))[1])
    with write_atomically(tmp_path / "x") as aside:
        (aside / "a").write_text("a")
    at = events.index("rename x")
    assert {str(aside / "a"), str(aside)} <= set(events[:at]) and str(tmp_path) in events[at:]


DIES = """
import os, sys
from pathlib import Path
from litmini.files import write_atomically
rename, count = Path.rename, []
def die(path, target):  # between the two renames
    count.append(rename(path, target)) or os.kill(os.getpid(), 9)
Path.rename = die
with write_atomically(Path(sys.argv[1])) as aside:
    (aside / "half").touch()
"""


@pytest.mark.parametrize("look", ["check", "write"])
def test_death_between_the_two_renames_is_mended_at_the_next_look(tiny, look):
    assert subprocess.run([sys.executable, "-c", DIES, str(tiny)]).returncode == -signal.SIGKILL
    assert not tiny.exists()
    if look == "check":
        assert check_checkpoint_dir(tiny) == tiny
        assert len(list(tiny.parent.iterdir())) == 2  # who only reads deletes nothing
    else:
        with pytest.raises(RuntimeError), write_atomically(tiny):
            raise RuntimeError
        assert list(tiny.parent.iterdir()) == [tiny]
    assert (tiny / "config.json").is_file() and not (tiny / "half").exists()


def write_version(target: Path, version: int) -> None:
    with write_atomically(target) as aside:
        for i in range(20):
            (aside / f"part-{i}").write_text(f"{version} " * 100)


def version_there(target: Path) -> int:
    """The version of a directory of `write_version`, which is whole."""
    checkpoint.restore(target)  # as any reader does
    files = tree(target)
    versions = {word for content in files.values() for word in content.split()}
    assert len(files) == 20 and len(versions) == 1 and {len(content.split()) for content in files.values()} == {100}
    return int(versions.pop())


def in_child(work) -> int:
    """Run `work` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_sigkill_at_random_moments_leaves_one_whole_version(tmp_path):
    target, moments = tmp_path / "x", random.Random(0)
    write_version(target, 0)
    last = 0
    for round_ in range(1, 21):
        child = in_child(lambda n=round_: [write_version(target, n * 10**6 + i) for i in range(10**6)])
        time.sleep(moments.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert version_there(target) >= last
        last = version_there(target)
    write_version(target, 7)
    assert version_there(target) == 7 and len(list(tmp_path.iterdir())) == 1


def test_sigkill_before_each_change_on_disk_leaves_one_whole_version(tmp_path):
    target = tmp_path / "x"
    finished = killed = 0
    while not finished:
        write_version(target, 1)

        def work(at=killed) -> None:
            left = iter(range(at + 1))
            changes = {"os.fsync", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "open"}

            def audit(event: str, arguments: tuple) -> None:
                if event in changes and next(left, None) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
            write_version(target, 2)

        _, status = os.waitpid(in_child(work), 0)
        finished, killed = status == 0, killed + 1
        assert version_there(target) in ((2,) if finished else (1, 2))
    assert killed > 50


# Saving


def test_shards_equal_the_single_file(tiny_dir, tmp_path):
    tensors = load_file(tiny_dir / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_model(sharded, read_json(tiny_dir / "config.json"), tensors.items(), tiny_dir, max_shard_bytes=60_000)
    names = [p.name for p in shards(sharded)]
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert not (sharded / "model.safetensors").exists() and not list(sharded.glob("shard-*"))
    held = [sum(tensor.nbytes for _, tensor in read_tensors([file])) for file in shards(sharded)]
    assert max(held) <= max(60_000, max(t.nbytes for t in tensors.values()))
    assert sum(held) == sum(t.nbytes for t in tensors.values())
    again = dict(read_tensors(shards(sharded)))
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)
    index = read_json(sharded / INDEX)
    assert index["metadata"]["total_size"] == sum(held)
    for name, file in index["weight_map"].items():
        assert name in dict(read_tensors([sharded / file]))
    states = [load_model(d, torch.float32).state_dict() for d in (tiny_dir, sharded)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[int] = []

    def stream():
        for i in range(12):
            tensor = torch.zeros(1000)
            alive.append(i)
            weakref.finalize(tensor, alive.remove, i)
            assert len(alive) <= 2, alive  # the one that comes, and the one before it
            yield f"t{i}", tensor
            del tensor

    empty = [(f"t{i}", torch.empty(1000, device="meta")) for i in range(12)]
    save_model(tmp_path, {}, stream(), max_shard_bytes=16_000, empty=empty)
    assert len(shards(tmp_path)) == 3


def test_files_are_those_of_safetensors(tmp_path):
    """To the byte; with dtypes of several sizes, odd and empty shapes, and tensors that are not contiguous."""
    tensors = {
        f"{i}.{n}": torch.rand(n, 3).to(t) for i, t in enumerate((torch.bfloat16, torch.float32)) for n in (5, 0)
    }
    tensors |= {"b.t": torch.rand(4, 7).T, "scalar": torch.tensor(1.5), "long": torch.arange(3)}
    names = ["scalar", "0.5", "b.t", "1.5", "long", "0.0", "1.0"]  # in any order
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", {}, ((name, tensors[name]) for name in names))
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rounding_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(litmini.checkpoints.safetensors_io, "PIECE", 100)
    tensor = torch.randn(37, 11)
    empty = [("a", torch.empty(37, 11, dtype=torch.bfloat16, device="meta"))]
    save_model(tmp_path, {}, [("a", tensor)], empty=empty)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor.bfloat16())


def test_what_cannot_be_saved_is_known_before_a_byte_is_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a occurs twice"):
        save_model(tmp_path, {}, [("a", torch.zeros(1))] * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 399}))
    with pytest.raises(UserError, match=r"too little disk: 0\.00 GB are still to come and 0\.00 GB are free in"):
        save_model(tmp_path, {}, [("a", torch.zeros(100))])
    assert not list(tmp_path.iterdir())


def test_the_dtype_in_config_is_that_of_most_bytes(tmp_path):
    tensors = {"a": torch.zeros(100, dtype=torch.bfloat16), "b": torch.zeros(10), "c": torch.zeros(20)}
    save_model(tmp_path, {"model_type": "llama", "dtype": "float32"}, tensors.items())
    assert read_json(tmp_path / "config.json") == {"model_type": "llama", "dtype": "bfloat16"}


def test_files_follow_the_umask(tmp_path):
    code = (
        "import os, sys; os.umask(0o027)\nfrom pathlib import Path\nimport torch\n"
        "from litmini.checkpoints.hf import save_model\n"
        "from litmini.files import write_atomically\n"
        "with write_atomically(Path(sys.argv[1])) as aside: save_model(aside, {}, [('a', torch.zeros(1))])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "x").iterdir()}
    assert modes == {"model.safetensors": "0o640", "config.json": "0o640"}
    assert oct((tmp_path / "x").stat().st_mode & 0o777) == "0o750"


def save_tied(directory: Path, tokenizer_dir: Path) -> nn.Module:
    config = dataclasses.replace(llama.PRESETS["tiny"], tied=True)
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(1))
    directory.mkdir()
    hf = {**llama.config_to_hf(config), "torch_dtype": "float32", "of_mine": [1, 2]}
    tensors = ((name, p.detach().bfloat16()) for name, p in model.named_parameters())
    save_model(directory, hf, tensors, side_files=tokenizer_dir)
    return model


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path, tokenizer_dir):
    base, out = tmp_path / "base", tmp_path / "out"
    save_tied(base, tokenizer_dir)
    model = load_model(base, torch.float32)
    assert model.lm_head.weight is model.model["embed_tokens"].weight
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 2**-12)  # less than bf16 resolves
    with write_atomically(out) as aside:
        save_trained(model, aside, base)
    tensors = dict(read_tensors(shards(out)))
    assert "lm_head.weight" not in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}  # as trained, the base is in bf16
    assert torch.equal(tensors["model.embed_tokens.weight"], model.lm_head.weight)
    raw = read_json(out / "config.json")
    assert raw["tie_word_embeddings"] and raw["of_mine"] == [1, 2] and raw["dtype"] == "float32"
    assert "torch_dtype" not in raw
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_second_copy_of_a_tied_head_is_read_past(tmp_path, tokenizer_dir):
    save_tied(tmp_path / "base", tokenizer_dir)
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base/model.safetensors")
    model = load_model(tmp_path / "base")
    assert model.lm_head.weight is model.model["embed_tokens"].weight


FULL_DISK = """
import resource, signal, sys
from dataclasses import dataclass
from pathlib import Path
from litmini.cli import command

@dataclass
class C:
    out_dir: str

def main(config):
    import torch
    from litmini.checkpoints.hf import save_model
    from litmini.files import write_atomically
    with write_atomically(Path(config.out_dir)) as aside:
        save_model(aside, {}, [(f"t{i}", torch.zeros(100_000)) for i in range(4)], max_shard_bytes=SHARD)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
command(main, C, "doc")
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    target = tmp_path / "step-000002"
    words = [sys.executable, "-c", FULL_DISK.replace("SHARD", "400_000"), "--out_dir", str(target)]
    assert subprocess.run(words).returncode == 0
    before = tree(tmp_path)
    words[2] = FULL_DISK.replace("SHARD", "10**9")  # one file, larger than may be
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1, done.stderr
    assert tree(tmp_path) == before and len(before) == 6


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"ü": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"ü": 1} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_dtypes():
    assert parse_dtype("bf16") is torch.bfloat16 and parse_dtype("fp32") is torch.float32
    with pytest.raises(UserError, match="expected bf16 or fp32"):
        parse_dtype("fp16")
