"""How well a classifier on disk does on a file of texts with labels."""

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from litmini.checkpoints.classifier import label_names
from litmini.checkpoints.load import load
from litmini.checkpoints.scores import count_scores, gives_scores
from litmini.config.generate import ModelConfig
from litmini.data.labelled import LabelledSequences, check_labels, model_inputs, tokenize
from litmini.data.labels import REGRESSION, SINGLE, read_files
from litmini.errors import UserError
from litmini.evaluation.classification import confusion_lines, measure, table
from litmini.generation.generate import usable_device
from litmini.models import use_model_file
from litmini.tokenizer import Tokenizer
from litmini.training.setup import on_device


def classify(config: ModelConfig, file: str, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Return the metrics of a classifier on a file, see `litmini.evaluation.classification.measure`, with the names of its
    classes and the problem type.

    Args:
        limit: of texts; None: all.
        batch_size: texts in one forward pass.

    Raises:
        UserError: the model is no classifier, or the file cannot be read or has other labels.
    """
    use_model_file(config.model_file)
    device = usable_device(config.device)
    place = config.adapter_dir or config.checkpoint_dir
    model: Any
    model, tokenizer = load(
        config.checkpoint_dir, config.adapter_dir, config.dtype, device, config.bits, config.check_finite
    )
    if not gives_scores(model):
        raise UserError(f"{place} is no classifier: it gives tokens. scripts/finetune_classifier.py makes one.")
    if config.chat_template != "auto" or config.template_kwargs is not None:
        tokenizer = Tokenizer(tokenizer.directory, config.chat_template, template_kwargs=config.template_kwargs)
    tokenizer.special_tokens_in_text = config.special_tokens_in_text
    names, problem_type = label_names(place, count_scores(model))
    problem_type = problem_type or (SINGLE if len(names) > 1 else REGRESSION)  # as transformers has it
    if problem_type == REGRESSION and len(names) > 1:
        raise UserError(f"{place} is a regression of {len(names)} values, expected one.")
    files = read_files([file])
    check_labels(files, names, problem_type)
    examples = tokenize(files, names, problem_type, tokenizer, model.config.max_positions)
    sequences = LabelledSequences(examples, model.config.max_positions, False, 0, shuffle=False)
    count = min(limit or len(examples), len(examples))
    found: list[np.ndarray] = []
    for batch in tqdm(sequences.batches(range(count), batch_size), desc="scoring", unit="batch", disable=None):
        with torch.inference_mode():
            scores, _ = model(**model_inputs(on_device(batch, torch.device(device))))
        found.append(scores.cpu().numpy())
    metrics = measure(np.concatenate(found), examples.targets[:count], problem_type)
    return {"file": file, "problem_type": problem_type, "names": names, **metrics}


def describe(found: dict[str, Any]) -> list[str]:
    """Return the metrics of `classify` as lines of text."""
    lines = [*table({f"{found['examples']:,} texts of {found['file']}": found})]
    if "interval" in found:
        low, high = found["interval"]
        lines.append(
            f"95% interval of the accuracy: {low:.1%} to {high:.1%}; best temperature {found['temperature']:.2f}"
        )
    return [*lines, *confusion_lines(found, found["names"], found["problem_type"])]
