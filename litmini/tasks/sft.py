"""Supervised finetuning: its data."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from litmini.checkpoints.scores import refuse_scores
from litmini.config.finetune import FinetuneConfig
from litmini.data.dataset import load_data
from litmini.errors import UserError
from litmini.tasks.plan import open_base, plan
from litmini.tasks.setup import Data

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def prepare_data(
    fabric: Fabric, config: FinetuneConfig, began: datetime | None = None, make: Callable[..., Data] = plan
) -> Data:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Args:
        began: the time that chat templates write, of a run that is resumed; None: the current time.
        make: plans it, with the arguments of `plan`.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, began)
    refuse_scores(config.base, config.starts_from)
    to_complete = None if config.eval.exact_match else config.eval.samples
    failed: UserError | None = None
    with fabric.rank_zero_first(local=True):  # the other ranks read its tokens from the cache
        try:
            train, val, val_examples = load_data(config.data, tokenizer, config.seed, to_complete)
        except UserError as error:  # all ranks raise it, but after this block: rank 0 would leave the others waiting
            failed = error
    if failed:
        raise failed
    return make(fabric, config, tokenizer, base, train, val, val_examples)
