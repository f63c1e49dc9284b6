"""How a reward model ranks pairs: the share of them whose chosen completion has the higher score."""

import math
from typing import Any

import torch
from tqdm import tqdm

from litmini.checkpoints.load import load
from litmini.config.generate import ModelConfig
from litmini.config.preference import RewardDataConfig
from litmini.data.preferences import PreferenceSequences, load_preferences
from litmini.errors import UserError
from litmini.generation.generate import usable_device
from litmini.methods.heads import ScoreHead
from litmini.models import use_model_file
from litmini.tokenizer import Tokenizer
from litmini.training.setup import on_device

Z = 1.959964  # of a 95% interval


def rank(config: ModelConfig, file: str, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Return the accuracy of a reward model on a file of pairs, with its 95% interval, and the mean scores.

    Args:
        limit: of pairs; None: all.
        batch_size: pairs in one forward pass.

    Raises:
        UserError: the model is none, or the file cannot be read.
    """
    use_model_file(config.model_file)
    device = usable_device(config.device)
    model: Any
    model, tokenizer = load(
        config.checkpoint_dir, config.adapter_dir, config.dtype, device, config.bits, config.check_finite
    )
    if not any(isinstance(child, ScoreHead) for child in model.children()):
        raise UserError(
            f"{config.adapter_dir or config.checkpoint_dir} is no reward model: it gives tokens, not scores. "
            f"scripts/finetune_reward.py makes one."
        )
    if config.chat_template != "auto" or config.template_kwargs is not None:
        tokenizer = Tokenizer(tokenizer.directory, config.chat_template, template_kwargs=config.template_kwargs)
    tokenizer.special_tokens_in_text = config.special_tokens_in_text
    length = model.config.max_positions
    data = RewardDataConfig(file, max_seq_len=length, max_dropped=1.0)
    examples, _, _ = load_preferences(data, tokenizer, 0, "scored")
    pairs = PreferenceSequences(examples, length, False, 0, shuffle=False)
    count = min(limit or len(pairs), len(pairs))
    found: list[torch.Tensor] = []
    for batch in tqdm(pairs.batches(range(count), batch_size), desc="scoring", unit="batch", disable=None):
        ready = on_device(batch, torch.device(device))
        with torch.inference_mode():
            scores, _ = model(**{name: ready[name] for name in ("tokens", "positions", "documents", "labels")})
        if scores.shape[1] != 1:
            raise UserError(
                f"{config.adapter_dir or config.checkpoint_dir} gives {scores.shape[1]} scores, expected one."
            )
        found.append(scores.view(-1, 2).cpu())
    chosen, rejected = torch.cat(found).unbind(1)
    correct = int((chosen > rejected).sum())
    return {
        "file": file,
        "pairs": count,
        "correct": correct,
        "accuracy": correct / count,
        "interval": wilson(correct, count),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "dropped": examples.dropped,
    }


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of a probability of which `successes` of n were seen (Wilson, 1927): within 0 and 1."""
    p, z2 = successes / n, Z * Z / n
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
