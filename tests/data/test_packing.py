"""Rows and batches: every example once an epoch, nothing across a border, the same on one process as on several."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, load_data
from litmini.data.encode import ENTRY
from litmini.data.packing import Batch, PackedDataset, pack
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

QUICKSTART = Path(__file__).parents[2] / "config_hub/quickstart/train.jsonl"


def make(lengths: list[int] | np.ndarray) -> Examples:
    """Examples whose tokens tell which they are: example i is 1000 * (i + 1) + 0, 1, 2, ...; odd labels are trained."""
    tokens = [1000 * (i + 1) + np.arange(n + 1) for i, n in enumerate(lengths)]
    inputs = np.concatenate([t[:-1] for t in tokens]).astype(np.int32)
    labels = np.concatenate([np.where(t[1:] % 2 == 1, t[1:], IGNORE) for t in tokens]).astype(np.int32)
    table = np.zeros(len(lengths), ENTRY)
    table["size"], table["start"] = lengths, np.cumsum(lengths) - lengths
    return Examples([(inputs, labels)], table)


def epoch(rows: PackedDataset, number: int) -> list[list[int]]:
    return [rows.sequence(n) for n in range(number * len(rows), (number + 1) * len(rows))]


def share(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    """The examples in batches, each as its tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        for tokens, documents in zip(batch["tokens"], batch["documents"], strict=True):
            for i in range(1, int(documents.max()) + 1):
                found[tuple(tokens[documents == i].tolist())] += 1
    return found


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The textbook's best fit decreasing, in O(n²): what is left in each row."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    return sorted(rooms)


def test_pack_is_best_fit() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(random.integers(1, 60))
        lengths = random.integers(1, capacity + 1, size=random.integers(1, 80))
        numbers, bounds = pack(lengths, capacity, balance=False)
        assert sorted(numbers) == list(range(len(lengths))) and bounds[-1] == len(lengths)
        rows = np.split(numbers, bounds[1:-1])
        assert sorted(capacity - lengths[row].sum() for row in rows) == best_fit(lengths.tolist(), capacity)
        assert min(len(row) for row in rows) > 0


def test_pack_many() -> None:
    """100,000 examples; anything quadratic would not come to an end."""
    lengths = np.random.default_rng(0).integers(20, 400, size=100_000)
    _, bounds = pack(lengths, 2048)
    assert lengths.sum() / ((len(bounds) - 1) * 2048) > 0.999


@pytest.mark.parametrize("packed", [True, False])
def test_every_example_once_an_epoch(packed: bool) -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 33, size=200)
    rows = PackedDataset(make(lengths), 64, packed, seed=3)
    epochs = [epoch(rows, number) for number in range(4)]
    for plan in epochs:
        assert sorted(i for row in plan for i in row) == list(range(200))
        assert max(lengths[row].sum() for row in plan) <= 64
        assert len(plan) == len(rows) <= 200 - 100 * packed
    assert len({str(plan) for plan in epochs}) == 4, "another order in each epoch"
    neighbours = [{frozenset(row) for row in plan if len(row) > 1} for plan in epochs]
    if packed:
        assert all(len(a & b) < len(a) / 4 for a, b in pairwise(neighbours))
    for plan, other in ((epoch(PackedDataset(make(lengths), 64, packed, seed=s), 1), s) for s in (3, 4)):
        assert (plan == epochs[1]) == (other == 3), "the seed decides, and nothing else"


def test_a_row_does_not_depend_on_what_was_asked_before() -> None:
    rows = PackedDataset(make(np.random.default_rng(2).integers(1, 30, size=100)), 50, True, seed=0)
    in_order = [rows.sequence(n) for n in range(4 * len(rows))]
    for n in np.random.default_rng(3).permutation(len(in_order))[:60]:
        assert rows.sequence(int(n)) == in_order[n]
        assert PackedDataset(rows.examples, 50, True, seed=0).sequence(int(n)) == in_order[n]


def test_unshuffled_keeps_the_order() -> None:
    rows = PackedDataset(make([3, 1, 2]), 8, False, seed=0, shuffle=False)
    assert epoch(rows, 0) == epoch(rows, 1) == [[0], [1], [2]]
    packed = PackedDataset(make([3, 1, 2, 7]), 8, True, seed=0, shuffle=False)
    assert epoch(packed, 0) == epoch(packed, 5) == [[3, 1], [0, 2]]


def test_waste_is_small() -> None:
    """Under 3% of a row is padding, for lengths like Alpaca's: the bulk short, a tail to 400."""
    lengths = (20 + 380 * np.random.default_rng(0).beta(1.2, 4, size=5_000)).astype(int)
    rows = PackedDataset(make(lengths), 2048, True, seed=0)
    assert lengths.sum() / (len(rows) * 2048) > 0.97


def test_batch_of_packed_rows() -> None:
    """Documents are numbered, positions restart, labels stay within their example, padding is document 0 without any."""
    batch = PackedDataset(make([3, 2, 4]), 8, True, seed=0).batch([[1, 0], [2], []])
    assert batch["tokens"].tolist() == [
        [2000, 2001, 1000, 1001, 1002, 0, 0, 0],
        [3000, 3001, 3002, 3003, 0, 0, 0, 0],
        [0] * 8,
    ]
    assert batch["documents"].tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3], [*range(8)]]
    X = IGNORE
    assert batch["labels"].tolist() == [
        [2001, X, 1001, X, 1003, X, X, X],  # the first example does not predict the second
        [3001, X, 3003, X, X, X, X, X],
        [X] * 8,
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batch_of_unpacked_rows_is_as_long_as_its_longest() -> None:
    rows = PackedDataset(make([3, 2, 4]), 8, False, seed=0)
    assert rows.batch([[1], [0]])["tokens"].tolist() == [[2000, 2001, 0], [1000, 1001, 1002]]
    assert rows.batch([[]])["tokens"].shape == (1, 1) and rows.batch([[]])["documents"].sum() == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_what_one_process_has(packed: bool, world: int) -> None:
    """Whole steps, a partial last one, and one with fewer rows than ranks: all rows once, as many batches everywhere."""
    rows = PackedDataset(make(np.random.default_rng(4).integers(1, 20, size=60)), 32, packed, seed=1)
    n = len(rows)
    for numbers in (range(12), range(12, 24), range(n - 7, n), range(n - 1, n), range(n - 3, n + 9), range(n)):
        for micro in (1, 2, 4):
            ranks = [list(rows.batches(numbers, micro, rank, world)) for rank in range(world)]
            assert {len(batches) for batches in ranks} == {-(-len(numbers) // (micro * world))}
            expected = share([rows.batch([rows.sequence(i)]) for i in numbers])
            assert sum((share(batches) for batches in ranks), Counter()) == expected
            assert share(list(rows.batches(numbers, micro))) == expected
            assert all(1 <= len(batch["tokens"]) <= micro for batches in ranks for batch in batches)
            for batches in ranks:  # nothing but examples has labels
                assert all((batch["labels"][batch["documents"] == 0] == IGNORE).all() for batch in batches)


def test_no_rows_no_batches() -> None:
    assert list(PackedDataset(make([3]), 8, True, seed=0).batches(range(0), 2)) == []


def test_longest_batch() -> None:
    lengths = np.random.default_rng(5).integers(1, 60, size=50)
    rows = PackedDataset(make(lengths), 64, False, seed=0)
    batch = rows.longest_batch(4)
    assert batch is not None
    assert (batch["documents"] > 0).sum(1).tolist() == sorted(lengths.tolist(), reverse=True)[:4]
    longest = max(b["tokens"].shape[1] for b in rows.batches(range(len(rows)), 4))
    assert batch["tokens"].shape == (4, longest) == (4, lengths.max())
    fewer = PackedDataset(make([3, 1]), 8, False, seed=0).longest_batch(4)
    assert fewer is not None and len(fewer["tokens"]) == 2
    assert PackedDataset(make(lengths), 64, True, seed=0).longest_batch(4) is None, "all are as long"


def test_an_example_longer_than_a_row_cannot_be() -> None:
    """`tokenize` truncates it."""
    with pytest.raises(AssertionError, match=r"9\D+8"):
        PackedDataset(make([3, 9]), 8, True, seed=0)


@pytest.mark.parametrize("length", [512, 60])
def test_the_way_from_a_file_to_rows(tokenizer_dir: Path, length: int) -> None:
    """The quickstart's file, whole and cut: every target is in a row, behind the tokens of its own example."""
    config = DataConfig(str(QUICKSTART), max_seq_len=length, max_dropped=1.0)
    train, _, _ = load_data(config, Tokenizer(tokenizer_dir), 0)
    assert (train.statistics["truncated_examples"] > 0) == (length == 60)
    rows = PackedDataset(train, length, True, seed=0)
    batches = list(rows.batches(range(len(rows)), 3))
    targets = [batch["labels"] != IGNORE for batch in batches]
    assert sum(int(target.sum()) for target in targets) == train.statistics["trained_tokens"] > 0
    for batch, target in zip(batches, targets, strict=True):
        follows = batch["labels"][:, :-1] == batch["tokens"][:, 1:]
        same = batch["documents"][:, :-1] == batch["documents"][:, 1:]
        assert follows[same & target[:, :-1]].all()


@pytest.mark.real
def test_quickstart_rows(smollm2: Path) -> None:
    """Its examples have 90 to 102 tokens: five in a row of 512, and a sixth would never fit."""
    train, _, _ = load_data(DataConfig(str(QUICKSTART), max_seq_len=512), Tokenizer(smollm2), 0)
    assert train.table["size"].min() * 6 > 512
    assert len(PackedDataset(train, 512, True, seed=0)) == 320 / 5


def weighted(sizes: list[int], weights: list[float], **options: bool) -> PackedDataset:
    """Data sets of so many examples of 1 to 20 tokens each, mixed by weight."""
    data = make(np.random.default_rng(6).integers(1, 21, size=sum(sizes)))
    data.table["set"] = np.repeat(np.arange(len(sizes)), sizes)
    return PackedDataset(data, 40, options.pop("pack", True), seed=2, weights=weights, **options)


@pytest.mark.parametrize("packed", [True, False])
def test_weights_say_how_often_an_example_comes(packed: bool) -> None:
    """Twice an epoch, once, and 0.4: in two of five epochs. Never an example once more than another of its set."""
    rows = weighted([10, 30, 25], [2.0, 1.0, 0.4], pack=packed)
    seen: Counter[int] = Counter()
    first = 0
    for number in range(5):
        last = rows.count(number + 1)
        chosen = Counter(i for n in range(first, last) for i in rows.sequence(n))
        first = last
        assert [chosen[i] for i in range(40)] == [2] * 10 + [1] * 30
        assert sum(chosen[i] for i in range(40, 65)) == 10
        seen += chosen
    assert {seen[i] for i in range(40, 65)} == {2}
    assert rows.count(2.5) == rows.count(2) + -(-(rows.count(3) - rows.count(2)) // 2)
    in_order = [rows.sequence(n) for n in range(rows.count(5))]
    again = weighted([10, 30, 25], [2.0, 1.0, 0.4], pack=packed)
    for n in np.random.default_rng(0).permutation(len(in_order))[:20]:
        assert again.sequence(int(n)) == in_order[n], "a pure function of seed and number"


def test_weights_that_leave_nothing() -> None:
    with pytest.raises(UserError, match="data.weights leave no example for epoch 1"):
        weighted([10], [0.01])


def test_rows_are_as_short_as_they_can_be() -> None:
    """Five of 90 to 102 tokens make a row of 512 with 6% padding: shared out evenly, rows of 488 do."""
    lengths = np.random.default_rng(0).integers(90, 103, size=320)
    rows = PackedDataset(make(lengths), 512, True, seed=0)
    assert len(rows) == 64 and rows.length <= 488 and lengths.sum() / (64 * rows.length) > 0.97
    for number in range(3):
        plan = epoch(rows, number)
        assert sorted(i for row in plan for i in row) == list(range(320))
        assert max(lengths[row].sum() for row in plan) <= rows.length
    assert rows.batch([rows.sequence(0)])["tokens"].shape == (1, rows.length)
    mixed = weighted([10, 30], [1.0, 0.5])
    assert mixed.length == 40, "epochs differ: nothing shorter is sure to be enough"


@pytest.mark.parametrize("capacity", [256, 512, 2048])
def test_waste_of_lengths_like_alpacas(capacity: int) -> None:
    """Requirement: under 3% padding at any usual row length."""
    lengths = (20 + 380 * np.random.default_rng(0).beta(1.2, 4, size=20_000)).astype(int).clip(max=capacity)
    rows = PackedDataset(make(lengths), capacity, True, seed=0)
    assert lengths.sum() / (len(rows) * rows.length) > 0.97
