"""Adds tokens to the vocabulary of a checkpoint."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from litmini.checkpoints.config import (
    changed_config,
    disk_tensors,
    empty_model,
    model_tensors,
    parts_beside,
    read_raw_config,
)
from litmini.checkpoints.hf import check_checkpoint_dir, save_model
from litmini.checkpoints.safetensors_io import give_memory_back, read_empty, read_tensors, shards
from litmini.errors import UserError
from litmini.files import write_atomically
from litmini.methods.trainable_tokens import add_tokens, grown, vocabulary_modules
from litmini.tokenizer import Tokenizer


def extend_vocabulary(
    checkpoint_dir: str | Path, out_dir: str | Path, tokens: list[str], max_shard_bytes: int = 5 * 10**9
) -> tuple[list[int], int]:
    """Write `checkpoint_dir` with `tokens` as further tokens to `out_dir`, tensor by tensor.

    Return their ids, and the number of ids before: those below it were there.

    Their rows in embedding and head are the mean of the rows before. All other values stay, bit by bit.

    Raises:
        UserError: `out_dir` exists, the checkpoint is damaged, or it has all of these tokens.
    """
    source, target = check_checkpoint_dir(checkpoint_dir), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    give_memory_back()
    module, model = empty_model(source)
    tokenizer = Tokenizer(source, new_tokens=tokens)
    new = tokenizer.new_tokens
    if new is None or (count := sum(i >= new.known for i in new.ids)) == 0:
        raise UserError(f"{source} has all of these tokens: {', '.join(tokens) or 'none were given'}.")
    add_tokens(model, new.ids, new.known)
    owners = vocabulary_modules(model)

    def with_rows(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_tensors(module, model.config, tensors):
            yield name, grown(tensor, new.known, count) if name.rpartition(".")[0] in owners else tensor

    empty, tensors = (
        disk_tensors(module, model.config, with_rows(read))
        for read in (read_empty(shards(source)), read_tensors(shards(source), copied=True))
    )
    raw = {k: v for k, v in read_raw_config(source).items() if k != "torch_dtype"}  # since transformers 5: `dtype`
    raw = changed_config(raw, vocab_size=model.config.vocab_size)  # type: ignore[union-attr]
    beside = parts_beside(module, source)
    with write_atomically(target, new=True) as aside:
        save_model(aside, raw, tensors, source, max_shard_bytes, empty=list(empty), beside=beside)
        tokenizer.save(aside)
    return new.ids, new.known
