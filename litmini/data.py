"""Examples -> tokens and labels. `records.py` reads them from files; `packing.py` makes rows and batches of them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding
from tqdm import tqdm

from litmini.config import DataConfig, UserError
from litmini.loss import IGNORE
from litmini.records import Example, bad_records, read_examples
from litmini.tokenizer import Tokenizer

Spans = list[tuple[int, int]]


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


def tokenize(examples: list[Example], tokenizer: Tokenizer, config: DataConfig, what: str) -> Examples:
    """Tokens and labels of all examples; those left without a target are dropped and counted.

    Raises:
        UserError: the trained turns of an example cannot be told from the rest, or more than `config.max_dropped` have
            no trained token.
    """
    inputs, labels, offsets = [], [], [0]
    truncated, most = 0, config.max_seq_len + 1  # one more than a row: the last token is only predicted
    dropped: list[str] = []
    problems: list[str] = []
    with tqdm(total=len(examples), desc=f"tokenising {what}", unit="ex", disable=None) as bar:
        for start in range(0, len(examples), 1000):
            part = examples[start : start + 1000]
            for example, ids, trained in _encode(part, tokenizer, config.train_on, problems):
                truncated += len(ids) > most
                ids, trained = ids[:most], trained[:most]
                if not trained[1:].any():
                    dropped.append(example.where)
                    continue
                inputs.append(ids[:-1])
                labels.append(np.where(trained[1:], ids[1:], IGNORE))
                offsets.append(offsets[-1] + len(ids) - 1)
            bar.update(len(part))
    if problems:
        raise bad_records(problems)
    if len(dropped) > config.max_dropped * len(examples) or not inputs:
        raise UserError(
            f"{len(dropped)} of {len(examples)} {what} examples have no trained token within max_seq_len "
            f"{config.max_seq_len} (the first: {dropped[0]}). Their answers are missing or cut off: raise "
            f"--data.max_seq_len, or allow it with --data.max_dropped."
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


def _encode(
    examples: list[Example], tokenizer: Tokenizer, train_on: str, problems: list[str]
) -> Iterator[tuple[Example, np.ndarray, np.ndarray]]:
    """(example, ids, trained), arrays of int32 and bool; what is wrong with other examples is added to `problems`."""
    rendered: list[tuple[Example, str, Spans]] = []
    for example in examples:
        try:
            rendered.append((example, *_render(example, tokenizer, train_on)))
        except (UserError, ValueError) as error:
            problems.append(f"{example.where}: {error}")
    whole = tokenizer.encode_batch([text for _, text, _ in rendered])
    prompts = tokenizer.encode_batch([text[: spans[-1][0]] if spans else "" for _, text, spans in rendered])
    for (example, _, spans), encoding, prompt in zip(rendered, whole, prompts, strict=True):
        ids = np.array(encoding.ids, dtype=np.int32)
        try:
            trained = _trained(encoding, prompt, spans, tokenizer.stop_ids if example.messages is not None else None)
        except ValueError as error:
            problems.append(f"{example.where}: {error}")
            continue
        if example.messages is None:  # raw text: framed as the tokenizer frames it, and it learns to stop
            bos = tokenizer.encode("")
            ids = np.array([*bos, *ids, tokenizer.stop_ids[0]], dtype=np.int32)
            trained = np.array([*[False] * len(bos), *trained, True])
        yield example, ids, trained | (train_on == "all")


def _trained(encoding: Encoding, prompt: Encoding, spans: Spans, stop_ids: list[int] | None) -> np.ndarray:
    """Which tokens lie in a span, and there up to the last of `stop_ids`: what the template puts after it is not said.

    Args:
        prompt: what stands before the last span, on its own: what the model is given when it is to answer.

    Raises:
        ValueError: in training the prompt has other tokens, or there is no stop token in a span.
    """
    ids, bounds = np.array(encoding.ids), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = bounds.T
    trained = np.zeros(len(ids), dtype=bool)
    across = any(((starts < start) & (ends > start)).any() for start, _ in spans)
    if across or not np.array_equal(ids[: len(prompt.ids)], prompt.ids):
        raise ValueError(
            "the prompt's last tokens change with what follows, so the model would not be asked as it was trained. Strip "
            "white space where prompt and answer meet (one space belongs to the answer), or change the template"
        )
    for start, stop in spans:
        inside = np.flatnonzero((starts >= start) & (ends <= stop) & (ends > starts))
        if stop_ids is not None:
            stops = inside[np.isin(ids[inside], stop_ids)]
            if not len(stops):
                raise ValueError("the chat template puts no stop token after an assistant's turn")
            inside = inside[inside <= stops[-1]]
        trained[inside] = True
    return trained


def _render(example: Example, tokenizer: Tokenizer, train_on: str) -> tuple[str, Spans]:
    """Text, and the character spans of it which are trained, found by rendering the conversation up to each turn."""
    messages = example.messages
    text = example.text if messages is None else tokenizer.apply_template(messages)
    if train_on == "all":  # everything is, so there is nothing to find
        return text, []
    if messages is None:
        return text, [(len(example.prompt), len(text))]
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_template(messages[:i], add_generation_prompt=True)
            after = tokenizer.apply_template(messages[: i + 1])
            pairs = enumerate(zip(text, after, strict=False))
            end = next((place for place, (a, b) in pairs if a != b), min(len(text), len(after)))
            last_only = len(after) - end  # some templates end the last turn in another way, after the answer
            if not text.startswith(before) or end <= len(before) or last_only >= max(1, len(tokenizer.after_answer)):
                raise ValueError(
                    f"the chat template renders turn {i + 1} differently when more follows, so its span cannot be found. "
                    f"Use another template (--data.chat_template FILE) or train on all tokens (--data.train_on all)"
                )
            spans.append((len(before), end))
    return text, spans


def load_data(config: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[Examples, Examples | None, list[Example]]:
    """Tokenised training and held-out examples, and the held-out ones as they were read."""
    if config.val_path and config.val_fraction:
        raise UserError("data.val_path and data.val_fraction are both given, expected one of them.")
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


def describe(name: str, examples: Examples) -> str:
    """One line of statistics for people."""
    s = examples.statistics
    share = 100 * s["truncated_examples"] / max(1, s["examples"] + s["dropped_examples"])
    return (
        f"{name}: {s['examples']:,} examples, {s['tokens']:,} tokens, {100 * s['trained_tokens'] / s['tokens']:.0f}% trained, "
        f"longest {s['longest']:,}, truncated {s['truncated_examples']} ({share:.1f}%), dropped {s['dropped_examples']}"
    )


def show_masks(examples: Examples, tokenizer: Tokenizer, count: int) -> str:
    """The first examples token by token: what is trained is green, the rest dim; in brackets where there is no colour."""
    trained_mark, rest_mark = ("\033[32m{}\033[0m", "\033[2m{}\033[0m") if sys.stdout.isatty() else ("[{}]", "{}")
    shown: list[str] = []
    for start, stop in zip(examples.offsets[:count], examples.offsets[1:], strict=False):
        inputs, labels = examples.inputs[start:stop], examples.labels[start:stop]
        trained = labels != IGNORE
        text = f"--- example {len(shown) + 1}: {trained.sum()} of {len(labels)} tokens trained\n"
        # The first token is never predicted; the last one is known only where it is a label
        tokens = [*zip(inputs, [False, *trained[:-1]], strict=True), *zip(labels[-1:], [True], strict=True)]
        for token, is_trained in tokens if trained[-1] else tokens[:-1]:
            piece = tokenizer.decode([int(token)], skip_special=False)
            text += (trained_mark if is_trained else rest_mark).format(piece)
        shown.append(text)
    return "\n".join(shown)
