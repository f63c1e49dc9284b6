"""Supervised finetuning: its data and number of steps."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litmini.checkpoints.config import read_config
from litmini.config.finetune import FinetuneConfig
from litmini.data.dataset import Example, Examples, load_data
from litmini.data.packing import PackedDataset
from litmini.errors import UserError
from litmini.models import use_model_file
from litmini.tasks.setup import Data, ineffective_memory, ineffective_optim, warn
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def prepare_data(fabric: Fabric, config: FinetuneConfig, began: datetime | None = None) -> Data:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Args:
        began: the time that chat templates write, of a run that is resumed; None: the current time.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, began)
    to_complete = None if config.eval.exact_match else config.eval.samples
    failed: UserError | None = None
    with fabric.rank_zero_first(local=True):  # the other ranks read its tokens from the cache
        try:
            train, val, val_examples = load_data(config.data, tokenizer, config.seed, to_complete)
        except UserError as error:  # all ranks raise it, but after this block: rank 0 would leave the others waiting
            failed = error
    if failed:
        raise failed
    return plan(fabric, config, tokenizer, base, train, val, val_examples)


def open_base(fabric: Fabric, config: FinetuneConfig, began: datetime | None) -> tuple[Tokenizer, Any]:
    """Return tokenizer and `Config` of the base, downloaded if missing; raise a `UserError` if its context is too short.

    Args:
        began: when the run began, for templates that write a date; None: now.
    """
    use_model_file(config.model_file)
    with fabric.rank_zero_first():
        if not Path(config.checkpoint_dir).is_dir():
            from litmini.importers.download import ensure_checkpoint

            ensure_checkpoint(config.checkpoint_dir, config.download_from)
    began = fabric.broadcast(began or datetime.now())
    data = config.data
    tokenizer = Tokenizer(
        config.checkpoint_dir,
        data.chat_template,
        began,
        data.template_kwargs,
        data.special_tokens_in_text,
        data.new_tokens,
    )
    _, base = read_config(Path(config.checkpoint_dir))
    if new := tokenizer.new_tokens:
        base = replace(base, vocab_size=max(base.vocab_size, *(i + 1 for i in new.ids)))
    if config.data.max_seq_len > base.max_positions:
        raise UserError(
            f"data.max_seq_len is {config.data.max_seq_len}, the model's context {base.max_positions} tokens: "
            f"use --data.max_seq_len {base.max_positions} or less."
        )
    return tokenizer, base


def plan(
    fabric: Fabric,
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    base: Any,
    train: Examples,
    val: Examples | None,
    val_examples: list[Example],
) -> Data:
    """Pack tokenised examples into the sequences of a run, and print what the data are and what has no effect on them."""
    if tokenizer.fast.get_vocab_size() > base.vocab_size:
        for examples in (train, val):
            if examples is not None:
                examples.check_ids(base.vocab_size)
    rows = PackedDataset(train, config.data.max_seq_len, config.data.pack, config.seed, weights=config.data.weights)
    batch = config.train.global_batch_size
    total_rows = config.train.max_steps * batch if config.train.max_steps else rows.count(config.train.epochs)
    steps = math.ceil(total_rows / batch)
    ineffective = {
        "data.template_kwargs": bool(config.data.template_kwargs) and tokenizer.chat_template is None,
        "train.patience": config.train.patience is not None and not (val and config.train.eval_every),
        "train.sample_every": config.train.sample_every is not None and not (val_examples and config.eval.samples),
        "train.eval_every": config.train.eval_every is not None and not val,
        "eval.exact_match": config.eval.exact_match and not val_examples,
    }
    warn(fabric, ineffective | ineffective_optim(config.optim, steps) | ineffective_memory(config, fabric.device))
    if new := tokenizer.new_tokens:
        pairs = zip(config.data.new_tokens, new.ids, strict=True)
        tokens = ", ".join(f"{token} {i}{' (was there)' * (i < new.known)}" for token, i in pairs)
        fresh = f"; rows from {new.known} on start as the mean of those before" * (max(new.ids) >= new.known)
        fabric.print(f"new tokens: {tokens}{fresh}")
    fabric.print(train.describe("training"))
    if val:
        fabric.print(val.describe("validation"))
    efficiency = 100 * rows.tokens(0) / (len(rows) * rows.length)
    packed = f" of {rows.length} tokens, packing efficiency {efficiency:.1f}%" if rows.pack else ""
    fabric.print(f"{steps:,} steps of {batch} sequences{packed}: {total_rows / len(rows):.2f} epochs")
    validation = (
        PackedDataset(val, config.data.max_seq_len, config.data.pack, config.seed, shuffle=False) if val else None
    )
    statistics = {"statistics": train.statistics, "validation_statistics": val.statistics if val else None}
    hashes = {**train.files, **(val.files if val else {})}
    micro = config.train.micro_batch_size
    return Data(tokenizer, rows, validation, val_examples, total_rows, batch, micro, statistics, hashes)
