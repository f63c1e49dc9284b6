"""Conversion of a quantised llama.cpp file (GGUF) into an ordinary Hugging Face directory.

Weights are dequantised one tensor at a time; tokenizer, chat template and stop tokens come from the file's metadata.
What is not implemented is an error, never ignored.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litmini.checkpoints.config import disk_tensors
from litmini.checkpoints.hf import save_model
from litmini.errors import UserError
from litmini.importers.gguf.architectures import ARCHITECTURES, Architecture, Settings
from litmini.importers.gguf.reader import StoredTensor, read_gguf
from litmini.importers.gguf.tokenizer import write_tokenizer
from litmini.importers.names import half_split, pattern, rename
from litmini.models import family

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
CHUNK = 2**18  # values that are dequantised at once


def import_gguf(
    file: Path, out_dir: Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 5 * 10**9
) -> dict[str, Any]:
    """Turn a GGUF file into a Hugging Face directory.

    Args:
        file: the GGUF file.
        out_dir: an existing, empty directory.
        dtype: of the weights written.
        max_shard_bytes: size of a weight file.

    Returns:
        architecture, organization and license as in the metadata; quantization: how many tensors of each type;
        main_type: the type of most weights; bits: of that type.

    Raises:
        UserError: the file is damaged, or holds an architecture, tensor, setting or tokenizer that is not implemented.
    """
    metadata, tensors = read_gguf(file)
    name = metadata.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file}: GGUF architecture '{name}' is not supported; supported are: {', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[name]
    module = family(architecture.model_type)
    settings = Settings(metadata, tensors, name)
    try:
        config = architecture.config(settings)
        settings.refuse_the_rest()
        with torch.device("meta"):
            model = module.Model(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{file}: its metadata and tensors make no {name} model ({error}).") from None
    carried = module.carried(config) if hasattr(module, "carried") else ()
    kept = _fitting(tensors, architecture, model, file, carried)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for old, new in kept.items():
            values = _values(tensors[old], dtype, minus=1.0 if architecture.norms_plus_one and "norm" in old else 0.0)
            yield new, half_split(values, config.head_dim) if pattern(old) in architecture.interleaved else values

    ids = write_tokenizer(metadata, out_dir, config.max_positions)
    shapes = ((new, torch.empty(tensors[old].shape, dtype=dtype, device="meta")) for old, new in kept.items())
    empty, hf = (disk_tensors(module, config, pairs) for pairs in (shapes, stream()))
    raw = {**module.config_to_hf(config), **ids}
    save_model(out_dir, raw, hf, max_shard_bytes=max_shard_bytes, empty=empty)
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        weights[tensor.kind.name] += math.prod(tensor.shape)
    main_type = max(weights, key=lambda key: weights[key])
    return {
        "architecture": name,
        "organization": metadata.get("general.organization"),
        "license": metadata.get("general.license"),
        "quantization": dict(Counter(tensor.kind.name for tensor in tensors.values())),
        "main_type": main_type,
        "bits": int(re.findall(r"\d+", main_type)[0]),
    }


def _values(tensor: StoredTensor, dtype: torch.dtype, minus: float) -> Tensor:
    """Return a tensor's values less `minus`, in `dtype`; dequantised a few rows at a time, since that is done in fp32."""
    values = torch.empty(tensor.shape, dtype=dtype)
    rows = values.view(-1, tensor.shape[-1])
    step = max(1, CHUNK // tensor.shape[-1])
    for start in range(0, len(rows), step):
        part = tensor.read(start, min(start + step, len(rows)))
        rows[start : start + step] = torch.from_numpy(np.require(part, requirements=["C", "W"])) - minus
    return values


def _fitting(
    tensors: dict[str, StoredTensor],
    architecture: Architecture,
    model: nn.Module,
    file: Path,
    carried: tuple[str, ...],
) -> dict[str, str]:
    """Return GGUF's names -> the model's, of all tensors to keep; one error reports all that does not fit `model`.

    Args:
        carried: how the model's names of tensors begin that no model uses; they are left out.
    """
    if unsupported := [f"{t.name} is {t.kind.name}" for t in tensors.values() if t.kind.name not in TYPES]:
        raise UserError(f"{file}: {', '.join(unsupported[:3])}; supported types: {', '.join(TYPES)}.")
    kept = {old: rename(old, architecture.names) for old in tensors if old not in architecture.consumed}
    kept = {old: new for old, new in kept.items() if not new.startswith(carried)}
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    shapes = {new: tensors[old].shape for old, new in kept.items()}
    if problems := [f"{key} is missing" for key in expected if key not in shapes] + [
        f"{key} has shape {shape}, the metadata implies {expected.get(key, 'none such')}"
        for key, shape in shapes.items()
        if shape != expected.get(key)
    ]:
        listing = "\n  ".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
        raise UserError(f"the tensors in {file} do not fit its metadata:\n  {listing}")
    return kept
