"""Examples -> tokens and labels: which tokens are supervised, and where an example is truncated."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from litmini.config.finetune import DataConfig
from litmini.data.formats import Example, last_only
from litmini.data.turns import Rendered, Spans, render_examples
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

NOTES = {
    "split_conversations": "conversations that render differently when more follows: {:,}; each assistant turn is an example",
    "repeated_tokens": "tokens of their repeated context: {:,}",
    "rewritten_turns": "turns written as the template asks for them, not as it shows them: {:,}, about reasoning",
    "special_tokens_as_text": "special tokens in texts, encoded as text: {:,} (--data.special_tokens_in_text)",
    "apart": "turns that share a token with their prompt: {:,}; both are tokenised alone: strip white space where they meet",
}
"""What is said of examples, by its key in the statistics."""
ENTRY = np.dtype(
    [
        ("set", np.int16),  # number of its data set
        ("file", np.int32),  # number of the file whose arrays hold its tokens
        ("start", np.int64),  # of its tokens there
        ("size", np.int32),  # tokens
        ("trained", np.int32),  # supervised tokens
        ("number", np.int64),  # of its record in the file, from 0
        ("truncated", np.bool_),
    ]
)


@dataclass
class Part:
    """Tokenised examples, concatenated; `inputs` and `labels` are (tokens,) int32."""

    inputs: np.ndarray
    labels: np.ndarray
    """labels[i] is the token to predict after inputs[i], or IGNORE: shifted here and nowhere else."""
    table: np.ndarray
    """(examples,) of ENTRY; `start` counts from the beginning of this part."""
    records: int
    """Records that went in."""
    notes: Counter[str] = field(default_factory=Counter)
    """Numbers for `NOTES`."""
    dropped: list[str] = field(default_factory=list)
    """Locations of those without a supervised token."""
    truncated_dropped: int = 0
    """How many of these were truncated."""
    problems: list[str] = field(default_factory=list)
    """Location and fault of those that cannot be tokenised."""

    @property
    def examples(self) -> int:
        """Examples that the records are, those without a supervised token included."""
        return len(self.table) + len(self.dropped)


def encode_examples(examples: list[Example], tokenizer: Tokenizer, config: DataConfig) -> Part:
    """Return tokens and labels of examples; those without a supervised token are dropped."""
    part = Part(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, ENTRY), len(examples))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    entries: list[tuple[int, int, int, int, int, int, bool]] = []
    sizes: dict[int, list[int]] = defaultdict(list)  # by record
    max_ids = config.most_tokens + 1  # the last one is only predicted
    start = 0
    if config.train_on == "last":
        examples = [last_only(example) for example in examples]
    train_on = "all" if config.train_on == "all" else "assistant"
    for number, ids, mask in encode_texts(examples, tokenizer, train_on, part):
        targets = int(np.count_nonzero(mask[1:max_ids]))
        size = min(len(ids), max_ids) - 1
        sizes[number].append(size)
        if not targets:
            part.dropped.append(examples[number].where)
            part.truncated_dropped += len(ids) > max_ids
            continue
        entries.append((0, 0, start, size, targets, number, len(ids) > max_ids))
        kept.append((ids[: size + 1], mask[: size + 1]))
        start += size
    for several in sizes.values():
        part.notes["split_conversations"] += len(several) > 1
        part.notes["repeated_tokens"] += sum(several) - max(several)
    part.notes = +part.notes  # those that are not 0
    part.table = table = np.array(entries, ENTRY)
    flat = np.concatenate([ids for ids, _ in kept] or [np.zeros(0, np.int32)])
    mask = np.concatenate([one for _, one in kept] or [np.zeros(0, bool)])
    ends = np.cumsum(table["size"] + 1)
    labels = np.where(mask, flat, np.int32(IGNORE))
    part.inputs, part.labels = np.delete(flat, ends - 1), np.delete(labels, ends - table["size"] - 1)
    return part


def encode_texts(
    examples: list[Example], tokenizer: Tokenizer, train_on: str, part: Part
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number, ids, mask) of examples, arrays of int32 and bool; faults of others are added to `part.problems`.

    A conversation that renders differently when more follows comes once for each supervised turn.
    """
    rendered = deque(render_examples(examples, tokenizer, train_on, part.problems, part.notes))
    bos, prompts = tokenizer.encode(""), _prompts(tokenizer)
    encoded = deque(_encode_pieces(rendered, tokenizer))
    while rendered:
        one, (ids, bounds) = rendered.popleft(), encoded.popleft()
        is_text = examples[one.number].messages is None
        if not one.prompt and not all(prompts.stay(one.text, ids, bounds, start) for start, _ in one.spans):
            apart = [Rendered(one.number, one.text[:end], [(start, end)], start) for start, end in one.spans]
            rendered.extendleft(reversed(apart))
            encoded.extendleft(reversed(_encode_pieces(apart, tokenizer)))
            part.notes["apart"] += len(apart)
            continue
        try:
            mask = _supervised_mask(ids, bounds, one.spans, None if is_text else tokenizer.stop_ids)
        except ValueError as error:
            part.problems.append(f"{examples[one.number].where}: {error}")
            continue
        if is_text:  # BOS as the tokenizer adds it, and a supervised end
            ids = np.array([*bos, *ids, tokenizer.stop_ids[0]], dtype=np.int32)
            mask = np.array([*[False] * len(bos), *mask, True])
        yield one.number, ids, mask | (train_on == "all")


def _encode_pieces(rendered: Iterable[Rendered], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids (tokens,) int32 and bounds (tokens, 2) of texts; a prompt is tokenised alone, as when the model is asked.

    Some tokenizers put a space in front of a text, which what follows a prompt must not have.
    """
    line = tokenizer.encode("\n", special=False)
    anchor = "\n" if tokenizer.encode("\na", special=False)[len(line) :] != tokenizer.encode("a", special=False) else ""
    texts = [
        piece
        for one in rendered
        for piece in ([one.text[: one.prompt], anchor + one.text[one.prompt :]] if one.prompt else [one.text])
    ]
    encodings = iter(tokenizer.encode_batch(texts))
    found = []
    for one in rendered:
        first = next(encodings)
        ids, bounds = list(first.ids), list(first.offsets)
        if one.prompt:
            rest, skipped = next(encodings), len(line) if anchor else 0
            ids += rest.ids[skipped:]
            bounds += [(a + one.prompt - len(anchor), b + one.prompt - len(anchor)) for a, b in rest.offsets[skipped:]]
        found.append((np.array(ids, dtype=np.int32), np.array(bounds, dtype=np.int64).reshape(-1, 2)))
    return found


class _Prompts:
    """Tells whether a prompt has the same tokens in training as alone, when the model completes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.is_special = np.zeros(max(tokenizer.fast.get_vocab().values()) + 1, dtype=bool)
        self.is_special[list(tokenizer.special_ids)] = True
        # What follows the last special token is nearly always the same: `<|im_start|>assistant\n`
        self.encode = lru_cache(10_000)(partial(tokenizer.encode, special=False))

    def stay(self, text: str, ids: np.ndarray, bounds: np.ndarray, end: int) -> bool:
        """Return whether `text[:end]` alone has the same tokens as at the beginning of `text`.

        Tokens do not cross a special token, so only what follows the last one is encoded.

        Args:
            ids, bounds: of the tokens of `text`; `bounds` (tokens, 2) are in characters.
        """
        starts, ends = bounds.T
        if ((starts < end) & (ends > end)).any():
            return False
        specials = np.flatnonzero(self.is_special[ids] & (starts < end))
        first = int(specials[-1]) if len(specials) else 0
        alone = self.encode(text[int(starts[first]) if len(specials) else 0 : end])
        if ids[first : first + len(alone)].tolist() == alone:
            return True
        alone = self.encode(text[:end])  # some tokenizers begin a text in another way than what follows a special token
        return ids[: len(alone)].tolist() == alone


_prompts = lru_cache(4)(_Prompts)


def _supervised_mask(ids: np.ndarray, bounds: np.ndarray, spans: Spans, stop_ids: list[int] | None) -> np.ndarray:
    """Return the mask of tokens within a span, up to its last stop token: the model does not say what follows that.

    Args:
        bounds: (tokens, 2), first character of each token and the one after the last.

    Raises:
        ValueError: a span has no stop token.
    """
    starts, ends = bounds.T
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        inside = np.flatnonzero((starts >= start) & (ends <= stop) & (ends > starts))
        if stop_ids is not None:
            stops = [i for i in (np.flatnonzero(ids[inside] == stop_id) for stop_id in stop_ids) if len(i)]
            if not stops:
                raise ValueError("the chat template puts no stop token after an assistant's turn")
            inside = inside[: max(int(i[-1]) for i in stops) + 1]
        mask[inside] = True
    return mask
