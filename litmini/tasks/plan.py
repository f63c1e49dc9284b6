"""What all finetuning has in common before its model is loaded: tokenizer and base, and the sizes and number of steps."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litmini.checkpoints.config import read_config
from litmini.config.finetune import FinetuneConfig
from litmini.data.dataset import Example, Examples
from litmini.data.packing import MULTIPLE, PackedDataset
from litmini.errors import UserError, counted
from litmini.models import use_model_file
from litmini.tasks.setup import Data, ineffective_memory, ineffective_optim, warn
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EXAMPLES = 8  # of each device in an optimizer step where the user sets no batch size: transformers' default
FEW_STEPS = 30  # with fewer, a learning rate as it is usual teaches little


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
        if config.base != config.checkpoint_dir:
            from litmini.tasks.merged_base import write_merged_base

            write_merged_base(config)
    began = fabric.broadcast(began or datetime.now())
    data = config.data
    tokenizer = Tokenizer(
        config.tokenizer_dir,
        data.chat_template,
        began,
        data.template_kwargs,
        data.special_tokens_in_text,
        data.new_tokens,
    )
    _, base = read_config(Path(config.base))
    ids = tokenizer.new_tokens.ids if tokenizer.new_tokens else []
    if (Path(config.tokenizer_dir) / "adapter_config.json").is_file():  # an adapter that is trained further
        from litmini.checkpoints.peft import read_adapter
        from litmini.checkpoints.peft_tokens import token_ids

        ids = token_ids(read_adapter(config.tokenizer_dir))
    base = replace(base, vocab_size=max([base.vocab_size, *(i + 1 for i in ids)]))
    if config.data.max_seq_len is None:
        config.data.max_seq_len = min(config.data.most_tokens, base.max_positions)
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
    sequences: type[PackedDataset] = PackedDataset,
) -> Data:
    """Pack tokenised examples into the sequences of a run, and print what the data are and what has no effect on them.

    Args:
        sequences: the class of the sequences.
    """
    if tokenizer.fast.get_vocab_size() > base.vocab_size:
        for examples in (train, val):
            if examples is not None:
                examples.check_ids(base.vocab_size)
    batch = choose_sizes(config, train, val)
    rows = sequences(train, config.data.most_tokens, config.data.pack, config.seed, weights=config.data.weights)
    total_rows = config.train.max_steps * batch if config.train.max_steps else rows.count(config.train.epochs)
    steps = math.ceil(total_rows / batch)
    ineffective = {
        "data.template_kwargs": bool(config.data.template_kwargs) and tokenizer.chat_template is None,
        "train.patience": config.train.patience is not None and not (val and config.train.eval_every),
        "train.sample_every": config.train.sample_every is not None and not (val_examples and config.eval.samples),
        "train.eval_every": config.train.eval_every is not None and not val,
        "eval.exact_match": config.eval.exact_match and not val_examples,
    }
    warn(
        fabric,
        ineffective
        | config.ineffective
        | ineffective_optim(config.optim, steps)
        | ineffective_memory(config, fabric.device),
    )
    if new := tokenizer.new_tokens:
        pairs = zip(config.data.new_tokens, new.ids, strict=True)
        tokens = ", ".join(f"{token} {i}{' (was there)' * (i < new.known)}" for token, i in pairs)
        fresh = f"; rows from {new.known} on start as the mean of those before" * (max(new.ids) >= new.known)
        fabric.print(f"new tokens: {tokens}{fresh}")
    fabric.print(train.describe("training"))
    if val:
        fabric.print(val.describe("validation"))
    fabric.print(describe_steps(rows, total_rows, batch, len(train)))
    if steps < FEW_STEPS and config.train.max_steps is None:
        fabric.print(warn_of_few_steps(steps, min(batch, total_rows), config))
    validation = sequences(val, config.data.most_tokens, config.data.pack, config.seed, shuffle=False) if val else None
    statistics = {"statistics": train.statistics, "validation_statistics": val.statistics if val else None}
    hashes = {**train.files, **(val.files if val else {})}
    micro = config.train.micro_batch_size
    return Data(tokenizer, rows, validation, val_examples, total_rows, batch, micro, statistics, hashes)


def choose_sizes(config: FinetuneConfig, train: Examples, val: Examples | None) -> int:
    """Return `train.global_batch_size`; where the user has not set it, choose it, and the length of packed sequences.

    A step then has about `EXAMPLES` examples on each device. What is chosen becomes part of the settings, which the run saves:
    repeated or resumed, it has the same steps.
    """
    if config.train.global_batch_size is not None:
        return config.train.global_batch_size
    each, micro = EXAMPLES, config.train.micro_batch_size
    if config.data.pack:
        tokens = EXAMPLES * float(train.table["size"].mean()) / train.lengths_per_sequence
        longest = max(int(examples.table["size"].max()) for examples in (train, val) if examples)
        length = max(longest, MULTIPLE * math.ceil(tokens / MULTIPLE))
        config.data.max_seq_len = min(length, config.data.most_tokens)
        each = max(1, round(tokens / config.data.max_seq_len))
    each = min(each, micro) if config.optim.in_backward else each
    config.train.micro_batch_size = min(micro, each)
    config.train.global_batch_size = each * config.devices * config.num_nodes
    return config.train.global_batch_size


def describe_steps(rows: PackedDataset, total_rows: int, batch: int, examples: int) -> str:
    """Return a line with the number of steps and what is in one of them."""
    steps, each = math.ceil(total_rows / batch), min(batch, total_rows)
    epochs = total_rows / len(rows)
    if not rows.pack:
        return f"{counted(steps, 'step')} of {counted(each, 'example')}: {epochs:.2f} epochs"
    efficiency = 100 * rows.tokens(0) / (len(rows) * rows.length)
    return (
        f"{counted(steps, 'step')} of {counted(each, 'sequence')} of {rows.length:,} tokens, about "
        f"{each * examples / len(rows):.0f} examples, packing efficiency {efficiency:.1f}%: {epochs:.2f} epochs"
    )


def warn_of_few_steps(steps: int, each: int, config: FinetuneConfig) -> str:
    """Return a warning that names the settings with which a run would have more steps."""
    more = f"raise --train.epochs (now {config.train.epochs:g})"
    if each > 1:
        more = f"lower --train.global_batch_size (now {config.train.global_batch_size}), or {more}"
    elif config.data.pack:
        more += f", or lower --data.max_seq_len (now {config.data.max_seq_len}) if examples are shorter"
    return f"warning: {counted(steps, 'step')} will teach the model little: {more}."
