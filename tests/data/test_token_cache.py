"""Tokens on disk: the same by any number of processes, never stale, never half, and memory that does not grow with data."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenized import tokenize

from litmini.config.finetune import DataConfig
from litmini.data import readers, token_cache
from litmini.data.dataset import Examples, load_data
from litmini.data.encode import ENTRY, Part
from litmini.data.formats import read_examples
from litmini.data.readers import read_chunks
from litmini.data.token_cache import cache_directory, tokenize_file
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


def write(file: Path, count: int, start: int = 0) -> str:
    """Examples of several lengths; each hundredth has no answer, so no target."""
    with file.open("w") as opened:
        for i in range(start, start + count):
            answer = "" if i % 100 == 99 else f"It is {i}. " * (i % 7 + 1)
            turns = [{"role": "user", "content": f"Say {i}"}] + [{"role": "assistant", "content": answer}] * bool(
                answer
            )
            opened.write(json.dumps({"messages": turns}) + "\n")
    return str(file)


def everything(data: Examples) -> list[tuple[list[int], list[int]]]:
    return [(inputs.tolist(), labels.tolist()) for inputs, labels in (data[i] for i in range(len(data)))]


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir())


def test_tokens_do_not_depend_on_processes_or_cache(
    tokenizer: Tokenizer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, by one process, by three, and read back: equal, in order, drops counted."""
    monkeypatch.setattr(readers, "CHUNK", 100)
    path = write(tmp_path / "a.jsonl", 2500)
    config = DataConfig(path, max_seq_len=60, max_dropped=0.02)
    expected = tokenize(read_examples(path, True), tokenizer, config, "training")
    assert expected.dropped == 25 and expected.statistics["truncated_examples"] > 0
    for workers in (1, 3):
        for name in entries(cache) if cache.exists() else []:
            (cache / name / "counts.json").unlink()
        tokenize_file(path, tokenizer, config, "training", workers)
        train, _, _ = load_data(config, tokenizer, 0)
        assert everything(train) == everything(expected) and train.statistics == expected.statistics
        assert (train.table["number"] == [i for i in range(2500) if i % 100 != 99]).all()
    assert len(entries(cache)) == 1


def test_what_decides_tokens_decides_the_entry(tokenizer: Tokenizer, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    other = tmp_path / "other.jinja"
    other.write_text(str(tokenizer.chat_template).replace("<|im_end|>\n", "<|im_end|>"))
    load_data(DataConfig(path), tokenizer, 0)
    load_data(DataConfig(path, max_dropped=0.5, weights=[2.0], val_fraction=0.1, pack=False), tokenizer, 7)
    (tmp_path / "copy.jsonl").write_bytes(Path(path).read_bytes())
    load_data(DataConfig(str(tmp_path / "copy.jsonl")), tokenizer, 0)
    assert len(entries(cache)) == 1, "the same content with other uses"
    for count, make in enumerate(
        [
            lambda: load_data(DataConfig(path, max_seq_len=20, max_dropped=1.0), tokenizer, 0),
            lambda: load_data(DataConfig(path, train_on="all"), tokenizer, 0),
            lambda: load_data(DataConfig(path), Tokenizer(tokenizer.directory, str(other)), 0),
            lambda: load_data(DataConfig(write(tmp_path / "a.jsonl", 40, start=1)), tokenizer, 0),
        ],
        2,
    ):
        make()
        assert len(entries(cache)) == count
    assert (
        everything(load_data(DataConfig(path), tokenizer, 0)[0])[0]
        != everything(load_data(DataConfig(str(tmp_path / "copy.jsonl")), tokenizer, 0)[0])[0]
    )


def test_an_entry_is_used_and_a_damaged_one_made_again(
    tokenizer: Tokenizer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(write(tmp_path / "a.jsonl", 40))
    expected = everything(load_data(config, tokenizer, 0)[0])
    made = []
    original = token_cache._write
    monkeypatch.setattr(token_cache, "_write", lambda *words: made.append(1) or original(*words))
    assert everything(load_data(config, tokenizer, 0)[0]) == expected and not made
    for name, damage in (
        ("inputs.i32", lambda p: p.write_bytes(p.read_bytes()[:-4])),
        ("table.npy", lambda p: p.write_bytes(p.read_bytes()[:100])),
        ("counts.json", lambda p: p.write_text("{")),
        ("labels.i32", lambda p: p.unlink()),
    ):
        (entry,) = cache.iterdir()
        damage(entry / name)
        made.clear()
        assert everything(load_data(config, tokenizer, 0)[0]) == expected and made, name


def test_processes_that_come_at_once_agree(tokenizer: Tokenizer, tmp_path: Path, cache: Path) -> None:
    config = DataConfig(write(tmp_path / "a.jsonl", 300), max_dropped=0.02)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: everything(load_data(config, tokenizer, 0)[0]), range(4)))
    assert all(one == found[0] for one in found) and len(entries(cache)) == 1


def test_nothing_is_kept_of_bad_data(tokenizer: Tokenizer, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2500)
    with Path(path).open("a") as opened:
        opened.write('{"text": "another form"}\n{"messages"\n')
    with pytest.raises(UserError, match=r"(?s)a.jsonl:2501: is text, but .*a.jsonl:2502: not valid JSON"):
        tokenize_file(path, tokenizer, DataConfig(path), "training", workers=2)
    assert entries(cache) == []


def test_a_directory_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(UserError, match="LITMINI_CACHE"):
        load_data(DataConfig(write(tmp_path / "a.jsonl", 4)), tokenizer, 0)


def test_leftovers_of_the_dead_go_after_a_day(tokenizer: Tokenizer, tmp_path: Path, cache: Path) -> None:
    for name, age in ((".old.x", 90_000), (".new.x", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age, time.time() - age))
    load_data(DataConfig(write(tmp_path / "a.jsonl", 4)), tokenizer, 0)
    assert (cache / ".new.x").exists() and not (cache / ".old.x").exists()


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LITMINI_CACHE")
    assert cache_directory() == Path.home() / ".cache/litmini"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_memory_does_not_grow_with_the_data(
    tokenizer: Tokenizer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """60 MB of records and 80 MB of tokens go through a few MB."""
    path = tmp_path / f"a.{kind}"
    record = json.dumps({"text": "a" * 3000})
    path.write_text("[" + (record + ",\n") * 19_999 + record + "]" if kind == "json" else (record + "\n") * 20_000)
    part = Part(np.ones(100_000, np.int32), np.ones(100_000, np.int32), np.zeros(1, ENTRY), records=1)
    part.table["size"] = 100_000

    def fresh(*words: object) -> Iterator[Part]:
        for _ in range(100):
            yield replace(part, inputs=part.inputs.copy(), labels=part.labels.copy(), table=part.table.copy())

    monkeypatch.setattr(token_cache, "_parts", fresh)
    tracemalloc.start()
    try:
        assert sum(len(chunk.locations) for chunk in read_chunks(str(path))) == 20_000
        file = tokenize_file(str(path), tokenizer, DataConfig(str(path)), "training")
        assert file.inputs.nbytes == 40_000_000 and file.labels[::100_000].sum() == 100
        assert (file.table["start"] == np.arange(100) * 100_000).all()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


CODE = """
import sys
from litmini.config.finetune import DataConfig
from litmini.data.token_cache import tokenize_file
from litmini.tokenizer import Tokenizer
tokenize_file(sys.argv[1], Tokenizer(sys.argv[2]), DataConfig(sys.argv[1]), "training", workers=2)
"""


def test_a_kill_leaves_no_process_and_no_entry(tokenizer_dir: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "mug and rug for Oslo, please. " * 60}) + "\n") * 20_000)
    command = [sys.executable, "-c", CODE, str(tmp_path / "a.jsonl"), str(tokenizer_dir)]
    victim = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    children: list[str] = []
    while len(children) < 2:
        assert victim.poll() is None
        time.sleep(0.05)
        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert all(name.startswith(".") for name in entries(cache))


def test_several_data_sets_are_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each keeps its own form; the validation fraction is of all; every file is in the manifest by hash."""
    a, b = write(tmp_path / "a.jsonl", 30), str(tmp_path / "b.jsonl")
    Path(b).write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(10)))
    train, val, val_examples = load_data(DataConfig([a, b], val_fraction=0.25), tokenizer, 0)
    assert val is not None and (len(train), len(val)) == (30, 10) and set(train.files) == {a, b}
    assert np.bincount(train.table["set"]).sum() == 30 and {0, 1} == set(val.table["set"])
    for i, example in enumerate(val_examples):
        text = tokenizer.apply_template(example.messages) if example.messages else example.text + "<|im_end|>"
        assert val[i][0].tolist() == tokenizer.encode(text, special=False)[:-1]
    assert load_data(DataConfig([a, b], val_fraction=0.25), tokenizer, 0, max_examples=3)[2] == val_examples[:3]
    with pytest.raises(UserError, match=r"data.weights is \[1.0\]"):
        DataConfig([a, b], weights=[1.0])
