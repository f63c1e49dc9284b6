"""Reads and writes checkpoints: Hugging Face directories, which are checked, and written atomically.

A checkpoint is `config.json`, `*.safetensors` (with an index if sharded), tokenizer files, chat template and
`generation_config.json`. Weights are read from safetensors only; no code in a checkpoint is ever run.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from litmini.checkpoints.config import (
    Tensors,
    changed_config,
    disk_tensors,
    dtype_of,
    empty_model,
    model_tensors,
    parameter_names,
    parts_beside,
    read_raw_config,
)
from litmini.checkpoints.safetensors_io import check_one_format, read_tensors, shards, write_stream
from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.files import write_json
from litmini.ops.cross_entropy import original_head
from litmini.side_files import copy_side_files
from litmini.staging import restore
from litmini.system import check_disk_space


def check_checkpoint_dir(directory: str | Path) -> Path:
    """Return `directory` as a path if it holds a complete checkpoint.

    Raises:
        UserError: it does not; says what is missing, which checkpoints exist, and the command to type next. Or it holds
            weights twice.
    """
    path = Path(directory)
    restore(path)
    if not path.is_dir():
        problem = f"checkpoint directory not found: {path}"
    else:
        if not (missing := missing_files(path)):
            check_one_format(path)
            return path
        problem = f"checkpoint directory {path} is incomplete: it lacks {', '.join(missing)}"
    existing = sorted(str(p.parent) for p in Path("checkpoints").glob("*/*/config.json"))
    others = "Checkpoints here: " + ", ".join(existing) if existing else "There are no checkpoints in checkpoints/ yet"
    name = "/".join(path.parts[-2:])
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is an adapter, not a checkpoint: give it as --adapter_dir, with its base as --checkpoint_dir."
        )
    get = f". To get it: python scripts/download.py {name}" if path.parts[:-2] == ("checkpoints",) else ""
    raise UserError(f"{problem}. {others}{get}")


def missing_files(directory: Path) -> list[str]:
    """Return the files that a checkpoint directory lacks: config.json, tokenizer.json, and the weights."""
    files = [directory / "config.json", directory / "tokenizer.json", *shards(directory)]
    return [file.name for file in files if not file.is_file()]


def check_fit(path: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]], problems: Sequence[str] = ()) -> None:
    """Compare the tensors in a checkpoint, name -> shape, with the parameters of a model that `empty_model` made.

    Raises:
        UserError: they differ; lists all missing and unexpected tensors, those of a wrong shape, and further `problems`.
    """
    names = parameter_names(model)
    tied = {name for same in names.values() for name in same[1:]}  # only the first name is required
    problems = list(problems)
    for name, shape in shapes.items():
        if name in names:
            if shape != (expected := tuple(model.get_parameter(name).shape)):
                problems.append(f"{name} has shape {shape}, config.json implies {expected}")
        elif name not in tied and not name.endswith("rotary_emb.inv_freq"):  # a buffer in old checkpoints
            problems.append(f"unexpected {name} {shape}")
    problems += [f"missing {name}" for name in names if name not in shapes]
    if problems:
        listing = "\n  ".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
        raise UserError(f"the weights in {path} do not fit its config.json:\n  {listing}")


def wrong_dtype(name: str, tensor: Tensor) -> list[str]:
    """Return why the values of a tensor are no weights, as `problems` of `check_fit`: they are integers, or lack scales."""
    if tensor.is_floating_point() and tensor.element_size() > 1:
        return []
    expected = (
        "floating point" + " of 16 bits or more, or the scales of a quantization_config" * tensor.is_floating_point()
    )
    return [f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {expected}"]


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    swap: Callable[[str, nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Load the model of a checkpoint directory, in evaluation mode, with every parameter in `dtype` on `device`.

    Args:
        device: on the meta device, the weights are not read.
        swap: (full name, module whose `weight` was just read) -> the module that replaces it, such as a 4-bit layer.

    Raises:
        UserError: lists all missing and unexpected tensors, and those of a wrong shape or dtype.
    """
    path = check_checkpoint_dir(directory)
    module, model = empty_model(path)
    names, shapes = parameter_names(model), {name: p.shape for name, p in model.named_parameters()}
    if torch.device(device).type == "meta":
        for owner, _, last in [name.rpartition(".") for same in names.values() for name in same]:
            if swap is not None and last == "weight":
                _put(model, owner, swap(owner, model.get_submodule(owner).to(dtype)))
        return model.to(dtype).eval()
    problems: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    # with `swap`, tensors are copies that are freed at once: a mapped file counts as memory until it is closed
    own = module.owns if hasattr(module, "owns") else None  # of a multimodal checkpoint, the text part alone is read
    stream = model_tensors(module, model.config, read_tensors(shards(path), copied=swap is not None, only=own))
    for name, tensor in tqdm(stream, desc="loading", total=len(names), unit="tensor", disable=None, leave=False):
        if name in found:
            problems.append(f"{name} occurs twice")
        found[name] = tuple(tensor.shape)
        if wrong := wrong_dtype(name, tensor):
            problems += wrong
        elif name in names and tensor.shape == shapes[name]:
            own_dtype, trains = dtype_of(module, name, dtype), model.get_parameter(name).requires_grad
            parameter = nn.Parameter(tensor.to(device=device, dtype=own_dtype), requires_grad=trains)
            for same in names[name]:
                owner, _, last = same.rpartition(".")
                setattr(model.get_submodule(owner), last, parameter)
                if swap is not None and last == "weight":
                    _put(model, owner, swap(owner, model.get_submodule(owner)))
    check_fit(path, empty_model(path)[1], found, problems)
    return model.eval()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, own = name.rpartition(".")
    setattr(model.get_submodule(above), own, module)


def save_model(
    directory: Path,
    config: dict[str, Any],
    tensors: Tensors,
    side_files: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    empty: Tensors | None = None,
    beside: tuple[Tensors, Tensors] | None = None,
) -> None:
    """Write a Hugging Face directory into `directory`, which exists: weights in shards, one tensor in memory at a time.

    Args:
        config: content of `config.json`; `dtype` is added from the tensors.
        tensors: (name, tensor) in any order.
        side_files: a directory whose tokenizer, template and generation files are copied.
        max_shard_bytes: maximum size of a shard; a larger tensor gets a shard of its own.
        empty: the same names and shapes in the same order, in the dtypes to save, such as tensors on the meta device;
            None: all `tensors` are in memory.
        beside: `empty` and `tensors` of the parts of a multimodal checkpoint that stay as they are.

    Raises:
        UserError: the disk has too little space, or a name occurs twice.
    """
    if empty is None:
        empty = tensors = list(tensors)
    parts: list[list[tuple[str, Tensor]]] = [[]]
    sizes, dtypes = [0], Counter[str]()
    empty_beside, tensors_beside = beside or ((), ())
    for name, like, counts in chain(((*pair, True) for pair in empty), ((*pair, False) for pair in empty_beside)):
        size = like.numel() * like.element_size()
        if parts[-1] and sizes[-1] + size > max_shard_bytes:
            parts, sizes = [*parts, []], [*sizes, 0]
        parts[-1].append((name, like))
        sizes[-1] += size
        dtypes[str(like.dtype).removeprefix("torch.")] += size * counts
    if twice := [name for name, count in Counter(name for part in parts for name, _ in part).items() if count > 1]:
        raise UserError(f"{twice[0]} occurs twice: the files do not belong to one checkpoint.")
    check_disk_space(directory, sum(sizes))
    total = sum(map(len, parts))
    stream = iter(
        tqdm(chain(tensors, tensors_beside), desc="saving", total=total, unit="tensor", disable=None, leave=False)
    )
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files if len(parts) > 1 else ["model.safetensors"], parts, strict=True):
        write_stream(directory / file, part, stream)
    assert next(stream, None) is None, "more tensors came than were announced"
    if len(parts) > 1:
        locations = {name: file for file, part in zip(files, parts, strict=True) for name, _ in part}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(locations.items()))}
        write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", changed_config(config, dtype=dtypes.most_common(1)[0][0]))
    if side_files is not None:
        copy_side_files(side_files, directory)


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of "bf16" or "fp32".

    Raises:
        UserError: it is neither.
    """
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name not in dtypes:
        raise UserError(f"dtype {name!r}; expected bf16 or fp32")
    return dtypes[name]


def save_trained(model: nn.Module, directory: Path | None, base: str | Path, **changes: Any) -> None:
    """Write the weights of a trained `model` into `directory`, each in the dtype of its training.

    Weights trained in fp32 stay in fp32, whatever dtype the checkpoint `base` has: rounding to bf16 would lose small updates,
    and save another model than the one that was evaluated. A tied weight is written once. All keys of the base's config.json
    are kept, but for `changes`. A sharded model is gathered parameter by parameter: ranks with `directory` None take part and
    write nothing.
    """
    if directory is None:
        for parameter in model.parameters():
            full_tensor(parameter)
        return
    source = Path(base)
    module, fresh = empty_model(source)
    with original_head(model):
        parameters = list(model.named_parameters())
    shapes = ((name, torch.empty(p.shape, dtype=p.dtype, device="meta")) for name, p in parameters)
    empty = disk_tensors(module, model.config, shapes)
    tensors = disk_tensors(module, model.config, ((name, full_tensor(p.detach())) for name, p in parameters))
    raw = {k: v for k, v in read_raw_config(source).items() if k != "torch_dtype"}
    added = {name for name, _ in parameters} - parameter_names(fresh).keys()
    if any(hasattr(fresh, name.partition(".")[0]) for name in added):  # a merge untied the head
        raw = changed_config(raw, tie_word_embeddings=False)
    rows = (model.config.vocab_size, fresh.config.vocab_size)  # type: ignore[union-attr]
    raw = changed_config(raw, vocab_size=rows[0]) if rows[0] != rows[1] else raw
    raw, beside = changed_config(raw, **changes), parts_beside(module, source)
    save_model(directory, raw, tensors, side_files=source, empty=empty, beside=beside)
