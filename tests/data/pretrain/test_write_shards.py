"""Text: files of every kind, token shards, splits, resuming after an interruption, and errors in text."""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer as FastTokenizer

from litmini.data.pretrain import text as documents
from litmini.data.pretrain import write_shards as corpus
from litmini.data.pretrain.text import Source, find_sources, read_pieces
from litmini.data.pretrain.tokenize import TokenizerSpec, tokenizer_hash
from litmini.data.pretrain.train_tokenizer import END, train_tokenizer, write_tokenizer
from litmini.data.pretrain.write_shards import Shards, prepare
from litmini.errors import UserError

TEXTS = [f"Document {i}: " + "the cat sat on the mat.\n" * (i % 7) + "naïve ☃\n" * (i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    directory = write_tokenizer(train_tokenizer(TEXTS, "bpe", 300, []), tmp_path_factory.mktemp("t") / "tokenizer")
    return FastTokenizer.from_file(str(directory / "tokenizer.json"))


def spec(fast, **changes) -> TokenizerSpec:
    return TokenizerSpec(tokenizer=fast.to_str(), begin=[], end=0, **changes)


def jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def made(directory, sources, what, workers=1, **more):
    return prepare(sources, what, directory, workers, lambda path: None, say=lambda text: None, **more)


def tokens(directory, split="train"):
    index = json.loads((directory / "index.json").read_text())
    return np.concatenate(
        [np.fromfile(directory / s["file"], index["dtype"]) for s in index["splits"][split]["shards"]]
    )


def joined(source, **options):
    """The documents of a file, their pieces put together."""
    found: list[str] = []
    open_ = False
    for piece in read_pieces(source, **options):
        assert piece.first != open_
        found = [*found, piece.text] if piece.first else [*found[:-1], found[-1] + piece.text]
        open_ = not piece.last
    assert not open_
    return found


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    lines = jsonl(tmp_path / "a.jsonl").read_bytes()
    table = pyarrow.table({"id": range(60), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:900]) + gzip.compress(lines[900:]))  # two members
    frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:99], lines[99:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "a.txt").write_text("<|x|>\n".join(TEXTS))
    (tmp_path / "ignored.csv").write_text("no")
    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as remote:
        remote.write(gzip.compress(lines))
    sources = find_sources([str(tmp_path), "memory://bucket", str(tmp_path / "*.txt")])
    names = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.jsonl.gz"]
    assert [s.name.rsplit("/", 1)[-1] for s in sources] == names
    for source in sources:
        assert joined(source, separator="<|x|>\n") == TEXTS, source
        assert source.size > 0 and source.stamp
    assert joined(sources[4]) == ["<|x|>\n".join(TEXTS)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_memory_does_not_grow_with_a_file(tmp_path, name):
    """24 MB, as one document or as many; a piece is a million characters."""
    line = "the cat sat on the mat and looked at another cat\n" * 100
    lines = line if "txt" in name else json.dumps({"text": line}) + "\n"
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        for _ in range(5000):
            file.write(lines)
    (source,) = find_sources([str(tmp_path / name)])
    tracemalloc.start()
    characters = sum(len(piece.text) for piece in read_pieces(source))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 5000 * len(line) > 24e6
    assert peak < 10e6


@pytest.mark.parametrize("piece", [40, 64, 1000])
def test_long_documents_come_in_pieces(tmp_path, monkeypatch, fast, piece):
    monkeypatch.setattr(documents, "PIECE", piece)
    (tmp_path / "a.txt").write_text("\n--sep--\n".join(TEXTS))
    (source,) = find_sources([str(tmp_path / "a.txt")])
    assert joined(source, separator="\n--sep--\n") == TEXTS
    pieces = list(read_pieces(source, separator="\n--sep--\n"))
    assert max(len(p.text) for p in pieces) <= 2 * piece  # what is kept whole, and what was read after it
    whole = [fast.encode(text).ids for text in TEXTS]
    made(tmp_path / "out", [source], spec(fast, separator="\n--sep--\n"))
    assert tokens(tmp_path / "out").tolist() == [i for ids in whole for i in [*ids, 0]]
    (source,) = find_sources([str(jsonl(tmp_path / "b.jsonl"))])
    assert joined(source) == TEXTS


def test_a_separator_is_found_wherever_a_piece_ends(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n--sep--\n".join(TEXTS))
    (source,) = find_sources([str(tmp_path / "a.txt")])
    for piece in range(20, 120):
        monkeypatch.setattr(documents, "PIECE", piece)
        assert joined(source, separator="\n--sep--\n") == TEXTS, piece


def test_shards_hold_each_document_and_its_end(tmp_path, fast):
    sources = find_sources([str(jsonl(tmp_path / "a.jsonl", TEXTS[:20])), str(jsonl(tmp_path / "b.jsonl", TEXTS[20:]))])
    index = made(tmp_path / "one", sources, spec(fast, shard_tokens=1000))
    expected = [i for text in TEXTS for i in [*fast.encode(text).ids, 0]]
    assert tokens(tmp_path / "one").tolist() == expected
    shards = index["splits"]["train"]["shards"]
    assert [s["tokens"] for s in shards[:-1]] == [1000] * (len(expected) // 1000) and shards[-1]["tokens"] < 1000
    assert index["dtype"] == "uint16" and index["statistics"]["documents"] == 60 and index["vocab_size"] == 300
    for shard in shards:
        content = (tmp_path / "one" / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        pages = np.fromfile((tmp_path / "one" / shard["file"]).with_suffix(".crc"), np.uint32)
        assert pages.tolist() == [zlib.crc32(content[at : at + 4096]) for at in range(0, len(content), 4096)]
    assert not list((tmp_path / "one").glob(".*"))
    assert made(tmp_path / "one", sources, spec(fast, shard_tokens=1000)) == index  # nothing is done again
    with pytest.raises(UserError, match="one holds another corpus"):
        made(tmp_path / "one", sources[:1], spec(fast, shard_tokens=1000))


def test_more_processes_give_the_same_bytes(tmp_path, fast, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 300)
    sources = find_sources([str(jsonl(tmp_path / "a.jsonl"))])
    for workers in (1, 2):
        made(tmp_path / str(workers), sources, spec(fast, val_fraction=0.3, shard_tokens=700), workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("after", range(1, 14, 3))
@pytest.mark.parametrize("half", [False, True])
def test_an_interrupted_preparation_resumes(tmp_path, fast, monkeypatch, after, half):
    """Wherever it stops: in the middle of a shard, after one, with shards finished that were not committed."""
    monkeypatch.setattr(corpus, "BATCH", 300)
    sources = find_sources([str(jsonl(tmp_path / "a.jsonl", TEXTS[:20])), str(jsonl(tmp_path / "b.jsonl", TEXTS[20:]))])
    what = spec(fast, val_fraction=0.3, shard_tokens=700)
    made(tmp_path / "whole", sources, what)
    monkeypatch.setattr(corpus, "COMMIT_SECONDS", 0.0)
    calls, write = [], Shards.write

    def failing(self, content):
        calls.append(1)
        if len(calls) == after + 2:  # the last commit is that of the batch before
            monkeypatch.setattr(corpus, "COMMIT_SECONDS", 1e9)
        if len(calls) == after + 9:
            write(self, content[: len(content) // 4 * 2] if half else content)
            self.flush()
            raise KeyboardInterrupt
        write(self, content)

    monkeypatch.setattr(Shards, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", sources, what)
    monkeypatch.setattr(Shards, "write", write)
    assert not (tmp_path / "cut/index.json").exists()
    if half:  # what version 0.1.0 left is resumed, too
        progress = tmp_path / "cut/progress.json"
        progress.write_text(progress.read_text().replace('"is_validation"', '"held_out"'))
    said = []
    prepare(sources, what, tmp_path / "cut", 1, lambda path: None, say=said.append)
    assert "resuming" in said[0] and "after 0 documents" not in said[0]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_killed_preparation_leaves_no_process_behind(fast):
    code = (
        "import itertools, multiprocessing, sys, time\n"
        "from litmini.data.pretrain.text import Piece\n"
        "from litmini.data.pretrain.tokenize import TokenizerSpec, encode_all\n"
        "batches = (([(Piece('text', True, True), False)], i) for i in itertools.count())\n"
        "running = encode_all(batches, TokenizerSpec(sys.stdin.read(), [], 0), 2)\n"
        "next(running)\n"
        "print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin and parent.stdout
    parent.stdin.write(fast.to_str())
    parent.stdin.close()
    children = [Path(f"/proc/{pid}/stat") for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(c.exists() and c.read_text().split()[2] != "Z" for c in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_resuming_with_other_text_is_refused(tmp_path, fast, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 300)
    (source,) = find_sources([str(jsonl(tmp_path / "a.jsonl"))])
    bad = [*TEXTS[:50], None]
    (broken,) = find_sources([str(jsonl(tmp_path / "b.jsonl", bad))])
    with pytest.raises(UserError, match="b.jsonl:51: 'text' is NoneType"):
        made(tmp_path / "out", [source, broken], spec(fast))
    (fixed,) = find_sources([str(jsonl(tmp_path / "b.jsonl", TEXTS[:50]))])
    saved = shutil.copytree(tmp_path / "out", tmp_path / "saved")
    made(tmp_path / "out", [source, fixed], spec(fast))  # it had not come to that file at its last commit
    assert len(tokens(tmp_path / "out")) > 0
    with pytest.raises(UserError, match="begun with other settings, another tokenizer or other text"):
        made(saved, [fixed, source], spec(fast))
    with pytest.raises(UserError, match="begun with other settings"):
        made(saved, [source, fixed], spec(fast, val_fraction=0.1))


def test_validation_documents_are_chosen_by_their_text(tmp_path, fast):
    texts = [f"text number {i % 500}" for i in range(1000)]  # each twice
    (source,) = find_sources([str(jsonl(tmp_path / "a.jsonl", texts))])
    made(tmp_path / "out", [source], spec(fast, val_fraction=0.2))
    ids = [tokens(tmp_path / "out", split).tolist() for split in corpus.SPLITS]
    sides = [fast.decode(side, skip_special_tokens=False).split(END)[:-1] for side in ids]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert not set(sides[0]) & set(sides[1])
    assert 0.15 < len(sides[1]) / 1000 < 0.25
    (same,) = find_sources([str(jsonl(tmp_path / "b.jsonl", texts[::-1]))])
    made(tmp_path / "again", [same], spec(fast, val_fraction=0.2))
    assert sorted(tokens(tmp_path / "again", "val")) == sorted(tokens(tmp_path / "out", "val"))


def test_text_cannot_spell_special_tokens(tmp_path, fast):
    (source,) = find_sources([str(jsonl(tmp_path / "a.jsonl", [f"one{END}two"]))])
    prepare([source], TokenizerSpec(fast.to_str(), begin=[7, 8], end=0), tmp_path / "out", 1, lambda p: None)
    ids = tokens(tmp_path / "out").tolist()
    assert ids[:2] == [7, 8] and ids.count(0) == 1 and ids[-1] == 0
    assert fast.decode(ids[2:-1]) == f"one{END}two"


def test_the_tokenizer_travels_with_its_tokens(tmp_path, fast):
    (source,) = find_sources([str(jsonl(tmp_path / "a.jsonl"))])
    prepare([source], spec(fast), tmp_path / "out", 1, lambda p: (p / "tokenizer.json").write_text(fast.to_str()))
    index = json.loads((tmp_path / "out/index.json").read_text())
    settings = json.loads(fast.to_str())
    other_form = json.dumps({**dict(reversed(settings.items())), "padding": {"length": 3}}, indent=1)
    assert tokenizer_hash(other_form) == index["tokenizer_sha256"]
    settings["model"]["merges"].pop()
    assert tokenizer_hash(json.dumps(settings)) != index["tokenizer_sha256"]


BAD = {
    "a.jsonl": (b'{"text": "fine"}\n{"text": "\xff"}\n', r"a.jsonl:2 is not UTF-8 text"),
    "b.txt": (b"fine\nfine\n\xe9t\xe9", r"b.txt:3 is not UTF-8 text"),
    "c.jsonl": (b'{"text": "fine"}\n{"text": \n', r"c.jsonl:2: not valid JSON"),
    "d.jsonl": (b'{"body": "fine"}\n', r"d.jsonl:1: no 'text', found body; .* --text_key"),
    "e.jsonl": (b'{"text": "\\ud800"}\n', r"e.jsonl:1: 'text' holds half a character"),
    "f.jsonl": (b"[1]\n", r"f.jsonl:1: no 'text', found list"),
    "g.jsonl.gz": (gzip.compress(b'{"text": "fine"}\n')[:-9], r"g.jsonl.gz cannot be read"),
    "h.jsonl.zst": (b"no zstd at all", r"h.jsonl.zst cannot be read"),
    "i.parquet": (b"no parquet at all", r"i.parquet is not valid Parquet"),
    "j.txt": (b" \n", r"1 of 1 documents are empty \(the first: document 1, in .*j.txt\).*--max_empty 1.000"),
    "k.jsonl": (b"", r"no document is left to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_named(tmp_path, fast, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        made(tmp_path / "out", find_sources([str(tmp_path / name)]), spec(fast))
    assert not (tmp_path / "out/index.json").exists()


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.csv").write_text("a")
    for name, message in {
        "empty": "empty holds no .txt, .jsonl, .parquet file",
        "*.txt": "holds no .txt",
        "notes.csv": "notes.csv: expected .txt, .jsonl, .parquet",
        "nothing.txt": "text not found",
    }.items():
        with pytest.raises(UserError, match=message):
            find_sources([str(tmp_path / name)])
    with pytest.raises(UserError, match="nosuch://bucket cannot be listed"):
        find_sources(["nosuch://bucket"])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has no column 'text'; there are body"):
        list(read_pieces(Source(str(tmp_path / "a.parquet"), 1, "")))


def test_a_few_empty_documents_are_left_out(tmp_path, fast):
    texts = [*TEXTS[:30], " \n", *TEXTS[30:]]
    (source,) = find_sources([str(jsonl(tmp_path / "a.jsonl", texts))])
    index = made(tmp_path / "out", [source], spec(fast), max_empty=0.05)
    assert index["statistics"]["empty"] == 1
    assert (tokens(tmp_path / "out") == 0).sum() == 60


def test_characters_are_tokens(tmp_path):
    fast = train_tokenizer(["banana\n", "abc"], "characters", 100, [])
    assert fast.get_vocab_size() == 2 + len("abcn\n")
    assert fast.decode(fast.encode("cab\n ban").ids) == "cab\nban"  # a space was not there to learn
    assert fast.encode("z").tokens == ["<|unknown|>"]
    assert train_tokenizer(["banana\n", "abc"], "characters", 4, []).get_vocab_size() == 4
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], "characters", 100, [])


def test_bpe_writes_any_text(tmp_path):
    fast = train_tokenizer(TEXTS, "bpe", 320, ["<|im_start|>"])
    assert fast.get_vocab_size() == 320 and fast.token_to_id(END) == 0 and fast.token_to_id("<|im_start|>") == 1
    for text in ("never seen: ☂ \x00 日本", *TEXTS):
        assert fast.decode(fast.encode(text).ids) == text
    with pytest.raises(UserError, match="--vocab_size 100"):
        train_tokenizer(TEXTS, "bpe", 100, [])
    write_tokenizer(fast, tmp_path / "t")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert theirs(TEXTS[5])["input_ids"] == fast.encode(TEXTS[5]).ids
    assert theirs.eos_token_id == 0


def test_shards_are_never_written_through_links_and_leave_other_files(tmp_path):
    home = tmp_path / "thesis.txt"
    home.write_text("mine")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/.train-00000.bin.partial").symlink_to(home)
    shards = Shards(tmp_path / "corpus", "train", 2, 8)
    with pytest.raises(UserError, match=r"partial is a link, expected a shard"):
        shards.write(b"1234")
    with pytest.raises(UserError, match=r"partial is a link, expected a shard"):
        shards.restore({"done": [], "size": 0, "documents": 0})
    assert home.read_text() == "mine"
    (tmp_path / "corpus/.train-00000.bin.partial").unlink()
    for name in ("my-train-1.bin.bak", "train-00000.bin.old", "train-00007.bin"):
        (tmp_path / "corpus" / name).write_text("mine")
    shards.restore({"done": [], "size": 0, "documents": 0})
    shards.write(b"0123456789abcdef")
    left = {path.name for path in (tmp_path / "corpus").iterdir()}
    assert left == {"my-train-1.bin.bak", "train-00000.bin.old", "train-00000.bin", "train-00000.crc"}
