"""How a reward model ranks pairs: the share of those whose chosen completion has the higher score; and scores."""

import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from litmini.checkpoints.load import load
from litmini.checkpoints.scores import count_scores, gives_scores
from litmini.config.generate import ModelConfig
from litmini.config.preference import RewardDataConfig
from litmini.data.preference_records import Preference
from litmini.data.preference_tokens import encode_documents
from litmini.data.preferences import PreferenceSequences, load_preferences
from litmini.errors import UserError
from litmini.evaluation.intervals import wilson
from litmini.files import read_json
from litmini.generation.generate import usable_device
from litmini.methods.heads import ScoreHead
from litmini.models import use_model_file
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Message, Tokenizer
from litmini.training.setup import on_device


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


class RewardModel:
    """A reward model beside another model, as `finetune_reward.py` makes it.

    Args:
        directory: a checkpoint, or an adapter.
        base: the checkpoint of an adapter; None: the one that adapter_config.json names.

    Raises:
        UserError: it gives no single score, or the base is missing.
    """

    def __init__(self, directory: str, base: str | None = None, device: str = "cpu") -> None:
        adapter = None
        if (Path(directory) / "adapter_config.json").is_file():
            adapter = directory
            base = base or read_json(Path(directory) / "adapter_config.json").get("base_model_name_or_path")
            if not base or not Path(base).is_dir():
                raise UserError(f"{directory} is an adapter over {base}, which is not there: name its base checkpoint.")
        self.model: Any
        self.model, self.tokenizer = load(base if adapter and base else directory, adapter, "bf16", device)
        if not gives_scores(self.model) or count_scores(self.model) != 1:
            raise UserError(f"{directory} is no reward model: scripts/finetune_reward.py makes one.")
        self.device = torch.device(device)

    def score(self, conversations: list[tuple[list[Message] | str, str]], batch_size: int = 16) -> list[float | None]:
        """Return the score of the completion of each prompt, messages or text; NaN if it is beyond the model's context."""
        records = []
        for i, (prompt, text) in enumerate(conversations):
            if isinstance(prompt, str) and self.tokenizer.chat_template is not None:
                prompt = [{"role": "user", "content": prompt}]
            completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            records.append(Preference(f"conversation {i}", i, prompt, [completion]))
        problems: list[str] = []
        length = self.model.config.max_positions
        examples = [record.example(record.completions[0]) for record in records]
        documents = encode_documents(examples, self.tokenizer, length, True, problems)
        if problems:
            raise UserError(f"the reward model cannot read {problems[0]}")
        found: list[float | None] = [math.nan] * len(records)
        fits = [i for i, document in enumerate(documents) if document is not None]
        for start in range(0, len(fits), batch_size):
            part = fits[start : start + batch_size]
            rows = [documents[i].inputs for i in part]  # type: ignore[union-attr]
            T = max(map(len, rows))
            tokens = torch.tensor([[*row.tolist(), *[0] * (T - len(row))] for row in rows])
            inside = torch.arange(T) < torch.tensor([[len(row)] for row in rows])
            labels = torch.full(tokens.shape, IGNORE).scatter(1, inside.sum(1, keepdim=True) - 1, 0)
            positions = torch.arange(T).expand(tokens.shape)
            batch = {"tokens": tokens, "positions": positions, "documents": inside.long(), "labels": labels}
            with torch.inference_mode():
                scores, _ = self.model(**on_device(batch, self.device))
            for i, value in zip(part, scores[:, 0].tolist(), strict=True):
                found[i] = value
        return found
