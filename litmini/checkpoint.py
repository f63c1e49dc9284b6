"""Checkpoints on disk: Hugging Face directories in and out, always written aside, checked and renamed.

A checkpoint is `config.json`, `*.safetensors` (with an index when sharded), tokenizer files, chat template and
`generation_config.json`. Weights are read from safetensors only; nothing in a checkpoint is ever run.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from litmini.config import UserError
from litmini.files import read_json, restore, write_json
from litmini.models import FAMILIES, family, skeleton
from litmini.sharding import whole
from litmini.tensors import read_tensors, shards, weight_map, write_tensors

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


def check_checkpoint_dir(directory: str | Path) -> Path:
    """`directory` as a path if it holds a complete checkpoint.

    Raises:
        UserError: it does not; says what is missing, which checkpoints are there, and the command to type next.
    """
    path = Path(directory)
    restore(path)
    if not path.is_dir():
        problem = f"checkpoint directory not found: {path}"
    else:
        missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
        index = path / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(weight_map(index).values()))
            missing += [name for name in shards if not (path / name).is_file()]
        elif not (path / "model.safetensors").is_file():
            missing.append("model.safetensors")
        if not missing:
            return path
        problem = f"checkpoint directory {path} is incomplete: it lacks {', '.join(missing)}"
    here = sorted(str(p.parent) for p in Path("checkpoints").glob("*/*/config.json"))
    there = "Checkpoints here: " + ", ".join(here) if here else "There are no checkpoints in checkpoints/ yet"
    name = "/".join(path.parts[-2:])
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is an adapter, no checkpoint: give it as --adapter_dir, with its base as --checkpoint_dir."
        )
    get = f". To get it: python scripts/download.py {name}" if path.parts[:-2] == ("checkpoints",) else ""
    raise UserError(f"{problem}. {there}{get}")


def read_config(directory: Path) -> tuple[ModuleType, Any]:
    """The family module and the `Config` of a checkpoint."""
    file = directory / "config.json"
    raw = read_json(file)
    if towers := [key for key in ("vision_config", "audio_config") if raw.get(key)]:
        text = raw["text_config"].get("model_type") if isinstance(raw.get("text_config"), dict) else None
        works = f"; a text-only checkpoint of model_type '{text}' would work" if text in FAMILIES else ""
        raise UserError(
            f"{file} describes a multimodal model ({', '.join(towers)}); only text models are implemented{works}. "
            f"There are: {', '.join(sorted(FAMILIES))}."
        )
    try:
        module = family(raw.get("model_type", ""))
        return module, module.config_from_hf(raw)
    except KeyError as error:
        raise UserError(f"{file} lacks the key {error}.") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: {error}.") from None


def empty_model(directory: Path) -> tuple[ModuleType, nn.Module]:
    """The family module and the model of a checkpoint, with all parameters on the meta device."""
    module, config = read_config(directory)
    try:
        return module, skeleton(module, config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{directory / 'config.json'} describes an impossible model: {error}.") from None


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter -> all its names: a tied one has several."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[first[parameter]].append(name)
    return names


def check_fit(path: Path, model: nn.Module, found: Mapping[str, tuple[int, ...]], problems: Sequence[str] = ()) -> None:
    """Compare the tensors found in a checkpoint, name -> shape, with the parameters of `model` as `empty_model` makes it.

    Raises:
        UserError: they differ; lists everything missing, unexpected and misshapen, and further `problems`.
    """
    names = parameter_names(model)
    copies = {copy for same in names.values() for copy in same[1:]}  # tied: the first one counts
    problems = list(problems)
    for name, shape in found.items():
        if name in names:
            if shape != (expected := tuple(model.get_parameter(name).shape)):
                problems.append(f"{name} has shape {shape}, config.json implies {expected}")
        elif name not in copies and not name.endswith("rotary_emb.inv_freq"):  # a buffer of old exports
            problems.append(f"unexpected {name} {shape}")
    problems += [f"missing {name}" for name in names if name not in found]
    if problems:
        listing = "\n  ".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
        raise UserError(f"the weights in {path} do not fit its config.json:\n  {listing}")


def model_tensors(
    module: ModuleType, config: Any, tensors: Iterable[tuple[str, Tensor]]
) -> Iterable[tuple[str, Tensor]]:
    """Tensors of a checkpoint's files under the names and in the shapes of the family's model."""
    return module.from_hf(tensors, config) if hasattr(module, "from_hf") else tensors


def disk_tensors(
    module: ModuleType, config: Any, tensors: Iterable[tuple[str, Tensor]]
) -> Iterable[tuple[str, Tensor]]:
    """The way back: a model's tensors as Hugging Face's files hold them."""
    return module.to_hf(tensors, config) if hasattr(module, "to_hf") else tensors


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    swap: Callable[[str, nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """The model of a checkpoint directory, in evaluation mode, every parameter in `dtype` on `device`.

    On the meta device it has no values, and the weights are not read.
    Strict: all missing, unexpected and misshapen tensors are reported in one error.

    Args:
        swap: (full name, module whose `weight` was just read) -> what takes its place, such as a 4-bit layer.
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
    stream = model_tensors(module, model.config, read_tensors(shards(path)))
    for name, tensor in tqdm(stream, desc="loading", total=len(names), unit="tensor", disable=None, leave=False):
        if name in found:
            problems.append(f"{name} is there twice")
        found[name] = tuple(tensor.shape)
        if not tensor.is_floating_point():
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected floating point")
        elif name in names and tensor.shape == shapes[name]:
            # what is swapped leaves the file: the rest must not keep all of it mapped
            parameter = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=swap is not None))
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
    tensors: Iterable[tuple[str, Tensor]],
    side_files: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face directory (into `directory`, which exists): weights in shards, one shard in memory at a time.

    Args:
        config: what `config.json` shall hold; `dtype` is added from the tensors.
        tensors: (name, tensor) in any order, already in the dtype to save.
        side_files: a directory whose tokenizer, template and generation files are copied.
        max_shard_bytes: a tensor larger than this gets a shard of its own.
    """
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0
    written: list[tuple[Path, list[str]]] = []
    dtypes: dict[str, int] = {}

    def write() -> None:
        file = directory / f"shard-{len(written):05d}.safetensors"
        write_tensors(file, pending)
        written.append((file, list(pending)))

    for name, tensor in tqdm(tensors, desc="saving", unit="tensor", disable=None, leave=False):
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            write()
            pending, pending_bytes = {}, 0
        pending[name], pending_bytes, total = tensor, pending_bytes + size, total + size
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + size
    write()
    if len(written) == 1:
        written[0][0].rename(directory / "model.safetensors")
    else:
        weight_map = {}
        for i, (file, names) in enumerate(written, 1):
            final = f"model-{i:05d}-of-{len(written):05d}.safetensors"
            file.rename(directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", {**config, "dtype": max(dtypes, key=lambda name: dtypes[name])})
    if side_files is not None:
        copy_side_files(side_files, directory)


def copy_side_files(source: Path, target: Path, replace: bool = True) -> None:
    """Copy what travels with the weights: tokenizer, chat template, generation settings, licence."""
    for name in SIDE_FILES:
        if (source / name).is_file() and (replace or not (target / name).exists()):
            shutil.copyfile(source / name, target / name)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of "bf16" or "fp32".

    Raises:
        UserError: it is neither.
    """
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name not in dtypes:
        raise UserError(f"dtype {name!r}; expected bf16 or fp32")
    return dtypes[name]


def save_trained(model: nn.Module, directory: Path | None, base: str | Path) -> None:
    """Write the weights of a trained `model` into `directory`, in the dtypes of the checkpoint `base` that it came from.

    A tied weight is written once. Everything in the base's config.json stays, known here or not. A sharded model is
    gathered parameter by parameter: ranks that have no `directory` hand over their shares.
    """
    if directory is None:
        for parameter in model.parameters():
            whole(parameter)
        return
    source = Path(base)
    module, empty = empty_model(source)
    dtypes = {name: tensor.dtype for name, tensor in read_tensors(shards(source))}
    tensors: Iterable[tuple[str, Tensor]] = ((name, whole(p.detach())) for name, p in model.named_parameters())
    tensors = disk_tensors(module, model.config, tensors)
    raw = {k: v for k, v in read_json(source / "config.json").items() if k != "torch_dtype"}
    if parameter_names(model).keys() > parameter_names(empty).keys():  # a merge untied the head
        raw["tie_word_embeddings"] = False
    save_model(
        directory, raw, ((name, t.to(dtypes.get(name, torch.float32))) for name, t in tensors), side_files=source
    )
