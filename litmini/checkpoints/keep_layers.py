"""Makes a shallower checkpoint of some layers of another."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from litmini.checkpoints.config import (
    changed_config,
    disk_tensors,
    empty_model,
    is_multimodal,
    model_tensors,
    parse_model,
    read_raw_config,
)
from litmini.checkpoints.hf import check_checkpoint_dir, save_model
from litmini.checkpoints.safetensors_io import give_memory_back, read_empty, read_tensors, shards
from litmini.errors import UserError
from litmini.files import write_atomically

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of config.json that may hold the number of layers."""


def keep_layers(
    checkpoint_dir: str | Path, out_dir: str | Path, layers: Sequence[int], max_shard_bytes: int = 5 * 10**9
) -> tuple[int, int]:
    """Write the layers `layers` of a checkpoint, in this order, and all that is around them to `out_dir`, tensor by tensor.

    Return the number of parameters, and that of the checkpoint. All values stay, bit by bit.

    Raises:
        UserError: `out_dir` exists, the checkpoint is damaged, there is no such layer, or the layers left have kinds
            (attention in windows, say) in an order that the family has not.
    """
    source, target = check_checkpoint_dir(checkpoint_dir), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    raw = {k: v for k, v in read_raw_config(source).items() if k != "torch_dtype"}  # since transformers 5: `dtype`
    if is_multimodal(raw):
        raise UserError(f"{source} is multimodal, and layers are taken from checkpoints of text models only.")
    give_memory_back()
    module, model = empty_model(source)
    old: Any = model.config
    if wrong := [i for i in layers if not 0 <= i < old.n_layers] or [i for i in layers if layers.count(i) > 1]:
        raise UserError(f"layers names {wrong[0]}; expected each once, of 0 to {old.n_layers - 1}, such as '[0, 1]'.")
    if not layers:
        raise UserError(f"layers is empty; expected some of 0 to {old.n_layers - 1}.")
    raw = _kept_config(raw, old.n_layers, layers)
    kinds = [_kinds(module, old)[i] for i in layers]
    try:
        new_module, new = parse_model(raw, source / "config.json", ())
        fits, why = _kinds(new_module, new.config) == kinds, ""
    except UserError as error:
        fits, why = False, f" ({error})"
    if not fits:
        raise UserError(
            f"layers {list(layers)} are of the kinds {', '.join(map(str, kinds))}, an order that models of this family do not "
            f"have{why}: choose layers whose kinds follow each other as those of the checkpoint do."
        )
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == old.n_layers)
    places = {old: new for new, old in enumerate(layers)}

    def kept(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for full, tensor in model_tensors(module, old, tensors):
            match = re.match(rf"{re.escape(name)}\.(\d+)(\..*)", full)
            if match is None:
                yield full, tensor
            elif int(match[1]) in places:
                yield f"{name}.{places[int(match[1])]}{match[2]}", tensor

    empty, tensors = (
        disk_tensors(new_module, new.config, kept(read))
        for read in (read_empty(shards(source)), read_tensors(shards(source), copied=True))
    )
    with write_atomically(target, new=True) as aside:
        save_model(aside, raw, tensors, source, max_shard_bytes, empty=list(empty))
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, new))
    return after, before


def _kept_config(raw: dict[str, Any], count: int, layers: Sequence[int]) -> dict[str, Any]:
    """Return config.json with fewer layers: their number, and all lists of one value for each."""
    changes: dict[str, Any] = {key: len(layers) for key in COUNTS if raw.get(key) == count}
    per_layer = [key for key, value in raw.items() if isinstance(value, list) and len(value) == count]
    changes |= {key: [raw[key][i] for i in layers] for key in per_layer if key != "architectures"}
    return changed_config(raw, **changes)


def _kinds(module: Any, config: Any) -> list[Any]:
    """Return what differs from layer to layer, of each of them."""
    raw = module.config_to_hf(config)
    lists = [value for value in raw.values() if isinstance(value, list) and len(value) == config.n_layers > 1]
    first = raw.get("max_window_layers", 0) if raw.get("use_sliding_window") else None
    windows = [None if first is None else i >= first for i in range(config.n_layers)]
    return ["/".join(map(str, kind)) for kind in zip(windows, *lists, strict=True)]
