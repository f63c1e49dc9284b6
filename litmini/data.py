"""Files -> examples -> tokens and labels. What becomes of them in rows and batches is `packing.py`.

A file's form is found by looking at its records: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`,
`prompt`/`completion`, or plain `text`; as JSONL, JSON, CSV or Parquet.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litmini.config import DataConfig, UserError, existing_file
from litmini.loss import IGNORE
from litmini.tokenizer import Message, Tokenizer

FORMS = {
    "messages": {"messages"},
    "ShareGPT": {"conversations"},
    "Alpaca": {"instruction", "output"},
    "prompt/completion": {"prompt", "completion"},
    "text": {"text"},
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "tool": "tool"}
ROLES = ("system", "developer", "user", "assistant", "tool")
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One record: `messages`, or `text` of which what follows `prompt` is trained."""

    where: str
    """file:line, for errors."""
    messages: list[Message] | None = None
    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, end to end. `labels[i]` is the token to predict after `inputs[i]`, or IGNORE."""

    inputs: np.ndarray
    """(tokens,) int32."""
    labels: np.ndarray
    """(tokens,) int32, shifted here and nowhere else: an example's last label is its last token."""
    offsets: np.ndarray
    """(examples + 1,) int64: example i is [offsets[i], offsets[i + 1])."""
    statistics: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def read_examples(path: str, has_template: bool) -> list[Example]:
    """All records of a file.

    Args:
        has_template: Alpaca and prompt/completion become messages; without one, plain text.

    Raises:
        UserError: the file is missing, empty, of unknown form, mixes forms, or has broken records; all named by file:line.
    """
    file = existing_file(path, "data file")
    examples, problems = [], []
    form = None
    for where, record in _records(file):
        if isinstance(record, str):
            problems.append(record)
            continue
        forms = [name for name, keys in FORMS.items() if isinstance(record, dict) and keys <= record.keys()]
        if not forms:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            problems.append(
                f"{where}: found {keys}; expected one of: {'; '.join(' + '.join(k) for k in FORMS.values())}"
            )
        elif form is not None and form not in forms:
            problems.append(f"{where}: is {forms[0]}, but the records before it are {form}; one form in a file")
        else:
            form = form or forms[0]
            try:
                examples.append(_example(where, record, form, has_template))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    if problems:
        more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise UserError("bad records:\n  " + "\n  ".join(problems[:10] + more))
    if not examples:
        raise UserError(f"{file} holds no examples.")
    return examples


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, record) for each record; the record is a message (str) where it cannot be read."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError('Parquet files need pyarrow: pip install "litmini[parquet]"') from None
        try:
            for i, record in enumerate(pyarrow.parquet.read_table(file).to_pylist()):
                yield f"{file}:row {i + 1}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} is not valid Parquet: {error}") from None
        return
    if kind not in (".jsonl", ".json", ".csv"):
        raise UserError(f"{file}: expected .jsonl, .json, .csv or .parquet")
    try:
        with file.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as lines:
            if kind == ".csv":
                rows = csv.DictReader(lines)
                for record in rows:
                    where = f"{file}:{rows.line_num}"
                    short = None in record or None in record.values()
                    yield where, f"{where}: has more or fewer fields than the header" if short else record
            elif kind == ".json":
                content = json.load(lines)
                if not isinstance(content, list):
                    raise UserError(
                        f"{file}: expected a JSON list of records; one record a line belongs in a .jsonl file"
                    )
                for i, record in enumerate(content):
                    yield f"{file}:record {i + 1}", record
            else:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield f"{file}:{number}", json.loads(line)
                        except json.JSONDecodeError as error:
                            yield f"{file}:{number}", f"{file}:{number}: not valid JSON: {error}"
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from None
    except (json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not valid {kind[1:].upper()}: {error}") from None


def _example(where: str, record: dict[str, Any], form: str, has_template: bool) -> Example:
    """Bring a record of any form to an `Example`; ValueError says what is wrong with it."""
    if form in ("messages", "ShareGPT"):
        return Example(where, messages=_messages(record["messages" if form == "messages" else "conversations"]))
    for key in FORMS[form]:
        if not isinstance(record[key], str):
            raise ValueError(f"{key} is {type(record[key]).__name__}, expected text")
    if form == "text":
        return Example(where, text=record["text"])
    if form == "Alpaca":
        question, extra, answer = record["instruction"], record.get("input") or "", record["output"]
        chat = f"{question}\n\n{extra}" if extra else question
        context = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(context, question, f"### Input:\n{extra}\n\n" if extra else "")
    else:
        chat = plain = record["prompt"]
        answer = record["completion"]
    if has_template:
        return Example(
            where, messages=_messages([{"role": "user", "content": chat}, {"role": "assistant", "content": answer}])
        )
    return Example(where, prompt=plain, text=plain + answer)


def _messages(turns: Any) -> list[Message]:
    if isinstance(turns, str):  # a CSV cell
        turns = json.loads(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns, with at least one")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {type(turn).__name__}, expected role and content")
        role = turn.get("role", turn.get("from"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise ValueError(f"role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"content of a {role} turn is {type(content).__name__}, expected text")
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
        messages.append({"role": role, "content": content, **rest})
    return messages


def tokenize(examples: list[Example], tokenizer: Tokenizer, config: DataConfig, what: str) -> Examples:
    """Tokens and labels of all examples; those left without a target are dropped and counted.

    Raises:
        UserError: a template's turns cannot be told apart, or more than `config.max_dropped` have no trained token.
    """
    inputs, labels, offsets = [], [], [0]
    truncated = seen = 0
    batches = range(0, len(examples), 1000)
    dropped: list[str] = []
    with tqdm(total=len(examples), desc=f"tokenising {what}", unit="ex", disable=None) as bar:
        for start in batches:
            part = examples[start : start + 1000]
            for example, (ids, trained) in zip(part, _encode(part, tokenizer, config.train_on), strict=True):
                seen += len(ids)
                truncated += len(ids) > config.max_seq_len + 1
                ids, trained = ids[: config.max_seq_len + 1], trained[: config.max_seq_len + 1]
                if not trained[1:].any():
                    dropped.append(example.where)
                    continue
                inputs.append(ids[:-1])
                labels.append(np.where(trained[1:], ids[1:], IGNORE))
                offsets.append(offsets[-1] + len(ids) - 1)
            bar.update(len(part))
    if len(dropped) > config.max_dropped * len(examples) or not inputs:
        raise UserError(
            f"{len(dropped)} of {len(examples)} {what} examples have no trained token within max_seq_len "
            f"{config.max_seq_len} (the first: {dropped[0]}). Look with --show_masks 3, raise --data.max_seq_len, or "
            f"allow it with --data.max_dropped."
        )
    flat = np.concatenate(labels).astype(np.int32)
    statistics = {
        "examples": len(inputs),
        "tokens": offsets[-1],
        "trained_tokens": int((flat != IGNORE).sum()),
        "truncated_examples": truncated,
        "dropped_examples": len(dropped),
        "longest": int(np.diff(offsets).max()),
    }
    return Examples(np.concatenate(inputs).astype(np.int32), flat, np.array(offsets, dtype=np.int64), statistics)


def _encode(examples: list[Example], tokenizer: Tokenizer, train_on: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained) of each example, as arrays of int32 and bool."""
    rendered = [_render(example, tokenizer) for example in examples]
    end = tokenizer.stop_ids[0]
    for example, (_, spans), encoding in zip(
        examples, rendered, tokenizer.encode_batch([text for text, _ in rendered]), strict=True
    ):
        ids, bounds = list(encoding.ids), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        trained = np.zeros(len(ids), dtype=bool)
        for start, stop in spans:
            inside = (bounds[:, 0] >= start) & (bounds[:, 1] <= stop) & (bounds[:, 1] > bounds[:, 0])
            if ((bounds[:, 0] < start) & (bounds[:, 1] > start)).any():
                raise UserError(
                    f"{example.where}: a token stands across the start of a trained turn; strip its leading space"
                )
            at = np.flatnonzero(inside)
            if example.messages is not None:  # up to the end-of-turn token; what the template puts after it is not said
                stops = [i for i in at if ids[i] in tokenizer.stop_ids]
                if not stops:
                    raise UserError(f"{example.where}: the chat template puts no stop token after an assistant's turn")
                at = at[at <= stops[-1]]
            trained[at] = True
        if example.messages is None:  # raw text: framed as the tokenizer frames it, and it learns to stop
            bos = tokenizer.encode("")
            ids = [*bos, *ids, end]
            trained = np.concatenate([np.zeros(len(bos), dtype=bool), trained, [True]])
        if train_on == "all":
            trained[:] = True
        yield np.array(ids, dtype=np.int32), trained


def _render(example: Example, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Text, and the character spans of it which are trained, found by rendering the conversation up to each turn."""
    if example.messages is None:
        return example.text, [(len(example.prompt), len(example.text))]
    messages = example.messages
    full = tokenizer.apply_template(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_template(messages[:i], add_generation_prompt=True)
            after = tokenizer.apply_template(messages[: i + 1])
            if not (full.startswith(before) and full.startswith(after) and len(before) < len(after)):
                raise UserError(
                    f"{example.where}: the chat template renders turn {i + 1} differently when more follows, so its span "
                    f"cannot be found. Use another template (--data.chat_template FILE) or train on all tokens."
                )
            spans.append((len(before), len(after)))
    return full, spans


def load_data(config: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[Examples, Examples | None, list[Example]]:
    """Tokenised training and held-out examples, and the held-out ones as they were read."""
    has_template = tokenizer.chat_template is not None
    examples = read_examples(config.path, has_template)
    held_out: list[Example] = []
    if config.val_path:
        held_out = read_examples(config.val_path, has_template)
    elif config.val_fraction:
        order = np.random.default_rng(seed).permutation(len(examples))
        count = max(1, round(config.val_fraction * len(examples)))
        if count >= len(examples):
            raise UserError(
                f"--data.val_fraction {config.val_fraction} leaves nothing of {len(examples)} examples to train on"
            )
        held_out = [examples[i] for i in sorted(order[:count])]
        examples = [examples[i] for i in sorted(order[count:])]
    train = tokenize(examples, tokenizer, config, "training")
    return train, tokenize(held_out, tokenizer, config, "held-out") if held_out else None, held_out


def file_hash(path: str) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def describe(name: str, examples: Examples) -> str:
    """One line of statistics for people."""
    s = examples.statistics
    share = 100 * s["truncated_examples"] / max(1, s["examples"] + s["dropped_examples"])
    return (
        f"{name}: {s['examples']:,} examples, {s['tokens']:,} tokens, {100 * s['trained_tokens'] / s['tokens']:.0f}% trained, "
        f"longest {s['longest']:,}, truncated {s['truncated_examples']} ({share:.1f}%), dropped {s['dropped_examples']}"
    )


def show_masks(examples: Examples, tokenizer: Tokenizer, count: int) -> str:
    """The first examples token by token: what is trained is green, the rest dim; between bars where there is no colour."""
    colour = sys.stdout.isatty()
    lines = []
    for i in range(min(count, len(examples))):
        span = slice(examples.offsets[i], examples.offsets[i + 1])
        inputs, labels = examples.inputs[span], examples.labels[span]
        ids = [int(inputs[0]), *(int(t) for t in inputs[1:]), int(labels[-1])]
        trained = [False, *(labels != IGNORE)]
        ids = ids if labels[-1] != IGNORE else ids[:-1]
        text = f"--- example {i + 1}: {int((labels != IGNORE).sum())} of {len(labels)} tokens trained\n"
        for token, is_trained in zip(ids, trained, strict=False):
            piece = tokenizer.decode([token], skip_special=False)
            text += (
                (f"\033[32m{piece}\033[0m" if is_trained else f"\033[2m{piece}\033[0m")
                if colour
                else (f"[{piece}]" if is_trained else piece)
            )
        lines.append(text)
    return "\n".join(lines)
