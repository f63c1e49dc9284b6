"""Prompts of policy optimization: records of data files, of which the model sees the prompt and rewards see all columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from litmini.config.grpo import GrpoDataConfig
from litmini.data.dataset import find_files
from litmini.data.formats import bad_records, turns_before
from litmini.data.messages import read_messages
from litmini.data.packing import Batch
from litmini.data.readers import check_text, read_chunks
from litmini.errors import UserError, counted
from litmini.files import content_hash, existing_file
from litmini.ops.cross_entropy import IGNORE
from litmini.templates.tool_calls import read_objects
from litmini.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One record."""

    where: str
    """file:line, for errors."""
    prompt: list[Message] | str
    """Messages; without a chat template, text."""
    record: dict[str, Any]
    """All columns, for rewards; `completion` is among them if the record ends with one."""
    ids: list[int] = field(default_factory=list)
    """Token ids."""

    @property
    def text(self) -> str:
        """The prompt as people read it: its last turn."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))


@dataclass
class Prompts:
    """The prompts of one or more files, as sequences of a run: each as long as it is with its longest completion.

    They are numbered through all epochs; each epoch has them in another order.
    """

    prompts: list[Prompt]
    longest_completion: int
    """In tokens."""
    seed: int
    dropped: int = 0
    """Prompts that leave no room for a completion, which are not here."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file by name."""

    def __len__(self) -> int:
        return len(self.prompts)

    def prompt(self, number: int) -> Prompt:
        """Return prompt `number`, counted through all epochs."""
        epoch, index = divmod(number, len(self))
        return self.prompts[int(self._order(epoch)[index])]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))

    def __post_init__(self) -> None:
        self.length = int(self.lengths().max()) + self.longest_completion - 1  # the last token is only predicted

    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt, (prompts,)."""
        return np.array([len(prompt.ids) for prompt in self.prompts])

    def longest_batch(self, micro_batch: int) -> Batch:
        """Return a micro-batch of as many completions of full length to the longest prompts."""
        longest = sorted(self.prompts, key=lambda prompt: -len(prompt.ids))[0].ids
        ids = longest + longest[:1] * self.longest_completion
        return completion_batch([(ids, len(longest))] * micro_batch)

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Any:
        """Yield micro-batches as large as those of a run may become; what is in them comes from a model."""
        for _ in range(-(-len(numbers) // (micro_batch * world))):
            yield self.longest_batch(micro_batch)

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return file:line of the prompts `numbers`."""
        return [[self.prompt(number).where] for number in numbers]

    @property
    def statistics(self) -> dict[str, Any]:
        lengths = self.lengths()
        return {
            "prompts": len(self),
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "dropped": self.dropped,
        }

    def describe(self, name: str) -> str:
        """Return one line of statistics to print."""
        s = self.statistics
        return (
            f"{name}: {counted(s['prompts'], 'prompt')}, {s['tokens'] / s['prompts']:.0f} tokens on average, longest "
            f"{s['longest']:,}; dropped {s['dropped']}, which left no room for a completion"
        )

    def show(self, tokenizer: Tokenizer, count: int) -> str:
        """Return the first prompts as the model gets them."""
        return "\n".join(
            f"--- prompt {i + 1}: {counted(len(prompt.ids), 'token')}\n{tokenizer.decode(prompt.ids, skip_special=False)}"
            for i, prompt in enumerate(self.prompts[:count])
        )


def completion_batch(rows: list[tuple[list[int], int]]) -> Batch:
    """Return a batch of prompts with their completions: tokens, positions, documents and labels, (rows, T) int64, and

    - `completions` (rows,) int64: 1, or 0 of padding,
    - `advantages` (rows,) fp32 and `sampled` (rows, T) fp32, the log-probabilities at sampling: zeros, to be filled in.

    Args:
        rows: token ids of both, and how many of them are the prompt; without any, the row is padding.
    """
    T = max([1, *(len(ids) - 1 for ids, _ in rows)])
    tokens, documents = np.zeros((2, len(rows), T), dtype=np.int64)
    labels = np.full((len(rows), T), IGNORE, dtype=np.int64)
    for row, (ids, size) in enumerate(rows):
        n = max(0, len(ids) - 1)
        tokens[row, :n], documents[row, :n] = ids[:n], 1
        labels[row, max(0, size - 1) : n] = ids[size:]
    positions = np.broadcast_to(np.arange(T), tokens.shape).copy()
    arrays = {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}
    arrays["completions"] = np.array([len(ids) > 0 for ids, _ in rows], dtype=np.int64)
    arrays |= {"advantages": np.zeros(len(rows), np.float32), "sampled": np.zeros(tokens.shape, np.float32)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load_prompts(
    config: GrpoDataConfig, tokenizer: Tokenizer, longest_completion: int, seed: int
) -> tuple[Prompts, Prompts | None]:
    """Return training and validation prompts.

    Args:
        longest_completion: in tokens.
        seed: of their order, and for choosing `config.val_fraction`.

    Raises:
        UserError: a file cannot be read, or too many prompts leave no room for a completion.
    """
    train = _load(config.paths, config, tokenizer, longest_completion, seed)
    if config.val_path:
        return train, _load([config.val_path], config, tokenizer, longest_completion, seed)
    if not config.val_fraction:
        return train, None
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    count = max(1, round(config.val_fraction * len(train)))
    if count == len(train):
        raise UserError(f"--data.val_fraction {config.val_fraction} leaves no prompt to train on")
    both = [[train.prompts[i] for i in sorted(part)] for part in (order[count:], order[:count])]
    return (
        Prompts(both[0], longest_completion, seed, train.dropped, train.files),
        Prompts(both[1], longest_completion, seed),
    )


def _load(
    data_sets: list[str], config: GrpoDataConfig, tokenizer: Tokenizer, longest_completion: int, seed: int
) -> Prompts:
    prompts: list[Prompt] = []
    hashes: dict[str, str] = {}
    problems: list[str] = []
    dropped: list[str] = []
    for data_set in data_sets:
        for name, path in find_files(data_set).items():
            hashes[name] = content_hash(existing_file(path, "data file"))  # of what is read, or older
            for where, record in (one for chunk in read_chunks(path, config.columns) for one in chunk.records()):
                try:
                    prompt = read_prompt(where, record, tokenizer)
                except (ValueError, UserError) as error:
                    problems.append(f"{where}: {error}")
                    continue
                fits = len(prompt.ids) + longest_completion <= config.most_tokens
                prompts += [prompt] * fits
                dropped += [where] * (not fits)
    if problems:
        raise bad_records(problems)
    total = len(prompts) + len(dropped)
    if len(dropped) > config.max_dropped * total or not prompts:
        raise UserError(
            f"{len(dropped)} of {counted(total, 'prompt')} (the first: {dropped[0]}) leave no room for a completion of "
            f"{counted(longest_completion, 'token')} within data.max_seq_len {config.most_tokens}: lower "
            f"--grpo.max_completion_length, raise --data.max_seq_len, or allow it with --data.max_dropped."
        )
    return Prompts(prompts, longest_completion, seed, len(dropped), hashes)


def read_prompt(where: str, record: Any, tokenizer: Tokenizer) -> Prompt:
    """Return a record as a prompt with its token ids.

    Raises:
        ValueError, UserError: it has none, or the template cannot render it.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict) or not ({"prompt", "messages"} & record.keys()):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {found}; expected prompt, and the columns that rewards read, or messages")
    columns = dict(record)
    given: Any = record.get("prompt", record.get("messages"))
    if isinstance(given, str) and not given.lstrip().startswith("[{"):
        given = check_text(given, "prompt")
    else:
        given, _ = read_messages(given)
        if given[-1]["role"] == "assistant":
            if len(given) == 1:
                raise ValueError("has an assistant's turn alone; expected a prompt before it")
            columns.setdefault("answer", given.pop().get("content", ""))
    if isinstance(record.get("completion"), str):
        columns.setdefault("answer", record["completion"])
    if not given:
        raise ValueError("prompt is empty")
    before, tools = turns_before(record, "prompt/completion"), read_objects(record.get("tools"), "tools")
    if tokenizer.chat_template is None:
        if not isinstance(given, str) or before or tools:
            raise ValueError("has turns, and plain text has no place for them; expected a chat template")
        return Prompt(where, given, columns, tokenizer.encode_prompt(given))
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return Prompt(where, before + messages, columns, tokenizer.encode_prompt(before + messages, tools or None))
