"""Sequences of token shards: the permutation, epochs, mixtures, ranks, isolated documents, damage."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from numerics import ulps

from litmini.data.pretrain.read_shards import Corpus, Shard
from litmini.data.pretrain.text import find_sources
from litmini.data.pretrain.tokenize import TokenizerSpec
from litmini.data.pretrain.train_tokenizer import train_tokenizer
from litmini.data.pretrain.windows import BLOCK, TokenWindows, permute
from litmini.data.pretrain.write_shards import prepare
from litmini.errors import UserError
from litmini.models import llama
from litmini.ops.cross_entropy import IGNORE

LENGTH = 16


def make(directory, texts, **changes):
    directory.mkdir()
    fast = train_tokenizer([chr(i) for i in range(32, 127)], "characters", 200, [])
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        find_sources([str(directory / "a.jsonl")]),
        TokenizerSpec(fast.to_str(), [], 0, **changes),
        directory / "tokens",
        1,
        lambda path: (path / "tokenizer.json").write_text(fast.to_str()),
    )
    return directory / "tokens"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    random = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in random.integers(32, 127, size)) for size in random.integers(1, 90, 400)]
    return make(tmp_path_factory.mktemp("corpus") / "c", texts, val_fraction=0.2, shard_tokens=2000)


def all_tokens(directory, split="train"):
    index = json.loads((directory / "index.json").read_text())
    return [np.fromfile(directory / s["file"], index["dtype"]).astype(int) for s in index["splits"][split]["shards"]]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 4096, 5000])
def test_the_permutation_is_one(count):
    locations = permute(np.arange(count), count, (1, 2))
    assert sorted(locations.tolist()) == list(range(count))
    assert [int(permute(np.array([i]), count, (1, 2))[0]) for i in range(min(count, 50))] == locations[:50].tolist()
    if count > 16:
        assert (permute(np.arange(count), count, (1, 3)) != locations).mean() > 0.8


def test_the_permutation_looks_random():
    """Over many keys every number comes to every place equally often, and neighbours do not stay neighbours."""
    count, keys = 40, 1500
    seen = np.zeros((count, count))
    following = 0
    for key in range(keys):
        locations = permute(np.arange(count), count, (key,))
        seen[np.arange(count), locations] += 1
        following += (np.diff(locations) == 1).sum()
    chi_square = ((seen - keys / count) ** 2 / (keys / count)).sum() / (count - 1) ** 2
    assert chi_square == pytest.approx(1, abs=0.12)  # four standard deviations of a random table's
    assert following / keys == pytest.approx((count - 1) / count, abs=0.1)  # four
    large = permute(np.arange(10**5), 10**5, (0,))
    assert abs(np.corrcoef(np.arange(10**5), large)[0, 1]) < 0.02


def test_the_order_never_changes():
    """A resumed run, and a run that is repeated years later, have the rows that they had."""
    assert permute(np.arange(8), 1000, (1337, 0, 0)).tolist() == [554, 432, 323, 725, 98, 637, 138, 852]


def test_an_epoch_has_every_row_once(directory):
    windows = TokenWindows([Corpus(directory)], "train", LENGTH, seed=3)
    parts = [t[: (len(t) - 1) // LENGTH * LENGTH].reshape(-1, LENGTH) for t in all_tokens(directory)]
    rows = {tuple(row) for part in parts for row in part.tolist()}
    assert len(windows) == len(rows) == sum(map(len, parts))
    epochs = []
    for epoch in range(2):
        numbers = range(epoch * len(windows), (epoch + 1) * len(windows))
        found = [tuple(row) for batch in windows.batches(numbers, 7) for row in batch["tokens"].tolist()]
        assert len(found) == len(rows) and set(found) == rows
        epochs.append(found)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != epochs[0]
    again = TokenWindows([Corpus(directory)], "train", LENGTH, seed=3)
    assert again.batch([5, len(windows) + 5])["tokens"].tolist() == [list(epochs[0][5]), list(epochs[1][5])]
    assert again.epochs(3 * len(windows)) == [3.0]


def test_labels_are_the_next_tokens(directory):
    windows = TokenWindows([Corpus(directory)], "train", LENGTH, seed=3)
    batch = windows.batch([0, 1, 2])
    assert batch.keys() == {"tokens", "labels"} and batch["tokens"].dtype == torch.int64
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    for row in range(3):
        shard, start = windows.locate(row)
        file = np.fromfile(shard.file, np.uint16)
        assert batch["labels"][row].tolist() == file[start + 1 : start + LENGTH + 1].tolist()


def test_ranks_share_the_rows_and_read_no_others(directory, monkeypatch):
    whole = torch.cat(
        [b["tokens"] for b in TokenWindows([Corpus(directory)], "train", LENGTH, 3).batches(range(10, 23), 4)]
    )
    for world in (2, 3):
        rows = {}
        for rank in range(world):
            windows, reads = TokenWindows([Corpus(directory)], "train", LENGTH, 3), []
            read = Shard.read
            with monkeypatch.context() as patch:
                patch.setattr(Shard, "read", lambda s, *a, seen=reads, real=read: seen.append(a) or real(s, *a))
                batches = list(windows.batches(range(10, 23), 2, rank, world))
            mine = range(10, 23)[rank::world]
            assert len(reads) == len(mine)
            assert len(batches) == -(-13 // (2 * world))
            tokens = torch.cat([b["tokens"] for b in batches])
            rows |= dict(zip(mine, tokens, strict=False))
            for padded in batches[-(-len(mine) // 2) :]:
                assert (padded["labels"] == IGNORE).all() and (padded["documents"] == 0).all()
        assert torch.equal(torch.stack([rows[n] for n in range(10, 23)]), whole)


def test_a_mixture_has_its_shares_in_every_block(tmp_path, directory):
    other = make(tmp_path / "other", ["x" * 2000] * 2)
    corpora = [Corpus(directory), Corpus(other)]
    windows = TokenWindows(corpora, "train", LENGTH, seed=1, weights=[3.0, 1.0])
    for block in (0, 2):
        from_other = [windows.locate(row)[0].file.parent == other for row in range(block * BLOCK, (block + 1) * BLOCK)]
        assert sum(from_other) == BLOCK // 4
        assert 0.15 < np.mean(from_other[:400]) < 0.35  # and they are mixed
    count = sum((s.tokens - 1) // LENGTH for s in corpora[1].splits["train"])
    locations = [windows.locate(row) for row in range(2 * BLOCK)]
    starts = [start for shard, start in locations if shard.file.parent == other]
    for epoch in range(3):  # each corpus has epochs of its own
        assert sorted(starts[epoch * count : (epoch + 1) * count]) == [i * LENGTH for i in range(count)]
    assert windows.epochs(4 * BLOCK)[1] == pytest.approx(BLOCK / count)
    together = TokenWindows(corpora, "train", LENGTH, seed=1)
    assert len(together) == len(windows) == windows.count
    with pytest.raises(UserError, match="less than 1 of 4096 sequences"):
        TokenWindows(corpora, "train", LENGTH, seed=1, weights=[1e6, 1.0])


def test_isolated_documents(directory):
    """The loss of a row is that of its documents one by one; what ends one does not predict the next."""
    windows = TokenWindows([Corpus(directory)], "train", LENGTH, seed=3, isolate=True)
    batch = windows.batch([*range(12)])
    torch.manual_seed(0)
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    with torch.no_grad():
        loss, count = model(**batch)
    expected, targets = 0.0, 0
    plain = TokenWindows([Corpus(directory)], "train", LENGTH, seed=3).batch([*range(12)])
    for tokens, labels in zip(batch["tokens"].tolist(), plain["labels"].tolist(), strict=True):
        document: list[int] = []
        for token in [*tokens, labels[-1], None]:
            if token is not None:
                document.append(token)
            if not token:  # an end token, or the end of the row
                loss_sum, size = alone(model, document)
                expected, targets, document = expected + loss_sum, targets + size, []
    assert int(count) == targets < batch["tokens"].numel()
    assert float(loss) == pytest.approx(expected, rel=ulps())
    assert (batch["documents"][:, 0] == 1).all() and (batch["positions"][:, 0] == 0).all()


@torch.no_grad()
def alone(model, document):
    """The loss of one document by itself, and how many targets it has."""
    if len(document) < 2:
        return 0.0, 0
    ids = torch.tensor([document])
    logits = model(ids[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")), len(document) - 1


def test_a_limit_takes_a_sample_of_the_rows(directory):
    whole = TokenWindows([Corpus(directory)], "val", LENGTH, 0)
    some = TokenWindows([Corpus(directory)], "val", LENGTH, 0, limit=5)
    assert len(some) == 5 < len(whole)
    assert torch.equal(some.batch([*range(5)])["tokens"], whole.batch([*range(5)])["tokens"])
    assert len(TokenWindows([Corpus(directory)], "val", LENGTH, 0, limit=10**9)) == len(whole)


def test_opening_a_corpus_reads_no_tokens(tmp_path):
    """So that it takes as long for a terabyte: here, 20 GB that take no room on the disk."""
    directory = make(tmp_path / "big", ["text"])
    index = json.loads((directory / "index.json").read_text())
    file, tokens = directory / "train-00000.bin", 10**10
    os.truncate(file, 2 * tokens)
    index["splits"]["train"]["shards"][0]["tokens"] = tokens
    (directory / "index.json").write_text(json.dumps(index))
    windows = TokenWindows([Corpus(directory)], "train", 1024, seed=0)
    assert len(windows) == (tokens - 1) // 1024
    shard, start = windows.locate(10**7)
    assert start % 1024 == 0 and 0 <= start < tokens
    assert "mapped" not in vars(shard)


@pytest.mark.parametrize(
    "damage", ["bit", "truncated", "missing", "checksums", "tokenizer", "format", "unfinished", "none"]
)
def test_damage_is_named(directory, tmp_path, damage):
    copy = shutil.copytree(directory, tmp_path / "copy")
    file = copy / "train-00001.bin"
    if damage == "bit":
        content = bytearray(file.read_bytes())
        content[3000] ^= 4
        file.write_bytes(content)
        message = r"train-00001.bin is damaged: bytes 0 to 4,000 fail their checksum"
    elif damage == "truncated":
        os.truncate(file, 3998)
        message = r"train-00001.bin has 3,998 bytes, index.json says 4,000"
    elif damage == "missing":
        file.unlink()
        message = "train-00001.bin is missing"
    elif damage == "checksums":
        os.truncate(file.with_suffix(".crc"), 0)
        message = "train-00001.crc has 0 checksums, expected 1"
    elif damage == "tokenizer":
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(text.replace('"~"', '"☃"'))
        message = "tokenizer.json is not the tokenizer that made these shards"
    elif damage == "format":
        (copy / "index.json").write_text("{}")
        message = "index.json has format None"
    else:
        (copy / "index.json").unlink()
        message = "is no corpus. Make one"
        if damage == "unfinished":
            (copy / "progress.json").write_text("{}")
            message = "is an unfinished corpus"
    with pytest.raises(UserError, match=message):
        windows = TokenWindows([Corpus(copy)], "train", LENGTH, seed=0)
        list(windows.batches(range(len(windows)), 8))


def test_a_corpus_smaller_than_a_row(directory):
    with pytest.raises(UserError, match=r"the longest train shard has 2,000 tokens, a sequence needs 2,001"):
        TokenWindows([Corpus(directory)], "train", 2000, seed=0)
