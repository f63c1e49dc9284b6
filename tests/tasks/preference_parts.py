"""Pairs of tiny data, batches of them, and what a model makes of these: for the tests of preferences and rewards."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from litmini.checkpoints.hf import load_model
from litmini.config.preference import PreferenceConfig, PreferenceDataConfig
from litmini.data.preferences import PreferenceExamples, PreferenceSequences, load_preferences
from litmini.methods.heads import use_log_probs
from litmini.methods.reference import disable_dropout
from litmini.ops.cross_entropy import original_head
from litmini.tasks.preference import PairPreference, SinglePreference
from litmini.tokenizer import Tokenizer

WORDS = ("teapot", "rug", "mug", "poster", "lamp", "umbrella", "Oslo", "Lisbon", "Turin", "Brno", "seven", "nine")
WORDS += ("small", "large", "red", "blue")


def write_pairs(file: Path, count: int = 24, first: int = 0) -> Path:
    """Prompts and completions of ragged lengths."""
    rows = []
    for i in range(first, first + count):
        said = [" ".join(WORDS[(i * 7 + k * (3 + j)) % 16] for k in range(1 + (i * (5, 3)[j]) % 9)) for j in (0, 1)]
        rows.append(
            {"prompt": f"Number {i}: " + " ".join(WORDS[: 1 + i % 6]), "chosen": said[0], "rejected": f"no {said[1]}"}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_labelled(file: Path, count: int = 24, first: int = 0) -> Path:
    """Completions of ragged lengths with a label; a third is undesirable."""
    rows = []
    for i, row in enumerate(map(json.loads, write_pairs(file, count, first).open())):
        rows.append({"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 > 0})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def examples_of(file: Path, base: Path, kind: str = "pairs", length: int = 64) -> PreferenceExamples:
    return load_preferences(PreferenceDataConfig(str(file), max_seq_len=length), Tokenizer(base), 0, kind)[0]


def sequences(examples: PreferenceExamples, length: int = 64, pack: bool = False) -> PreferenceSequences:
    return PreferenceSequences(examples, length, pack, 0, shuffle=False)


def policy(base: Path, seed: int = 1, size: float = 0.05) -> Any:
    """A model in fp32 whose weights are not those of `base` any more, with a head for log-probabilities."""
    model = load_model(base, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    model.requires_grad_(True)
    disable_dropout(model)
    use_log_probs(model)
    return model.train()


def save_policy(model: Any, base: Path, directory: Path) -> Path:
    """The same weights for transformers, of families whose tensors are Hugging Face's."""
    directory.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    with original_head(model):
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_reference(data: PreferenceSequences, base: Path) -> PreferenceSequences:
    """Give sequences the log-probabilities of `base`, each example by itself."""
    model = load_model(base, torch.float32)
    use_log_probs(model)
    arrays = [torch.zeros(len(inputs)).numpy() for inputs, _ in data.examples.arrays]
    for one in (data, data.mismatched):
        for i in range(len(one.examples) if one else 0):
            entry, batch = one.examples.table[i], PreferenceSequences.batch(one, [[i]])
            with torch.no_grad():
                found = model(**{k: batch[k] for k in ("tokens", "positions", "documents", "labels")})[0]
            start, size = int(entry["start"]), int(entry["size"])
            arrays[entry["file"]][start : start + size] = found[0, :size].numpy()
    data.use_reference(arrays)
    return data


def objective_of(config: PreferenceConfig, model: Any) -> PairPreference | SinglePreference:
    return (SinglePreference if config.loss == "kto" else PairPreference)(config, model)


def step(
    config: PreferenceConfig, model: Any, batches: list[Any]
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Mean loss, gradients and metrics of an optimizer step, as the loop computes them."""
    objective = objective_of(config, model)
    units = sum(map(objective.count, batches))
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective.loss(model, batch)
        (loss / units).backward()
        total += float(loss.detach())
    with original_head(model):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total / units, gradients, objective.metrics(objective.take_sums().tolist())
