"""Pretraining: the model to train, and the sequences of its corpora."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from litmini.checkpoints.config import disk_tensors, read_config
from litmini.checkpoints.hf import check_checkpoint_dir, load_model, save_model, save_trained
from litmini.config.pretrain import PretrainConfig
from litmini.data.dataset import Example
from litmini.data.pretrain.read_shards import Corpus
from litmini.data.pretrain.tokenize import tokenizer_hash
from litmini.data.pretrain.windows import TokenWindows
from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError, counted
from litmini.files import content_hash
from litmini.methods.heads import head_name
from litmini.models import FAMILIES, family, use_model_file
from litmini.ops.cross_entropy import ZLossHead, original_head
from litmini.tasks.setup import Data, ineffective_optim, warn
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

VAL_SEED = 0  # validation sequences are the same in every run


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The model to train, without weights."""

    module: ModuleType
    config: Any
    checkpoint: Path | None
    """Checkpoint with the weights; None: they are initialized at random."""

    def model(self, dtype: torch.dtype, seed: int, device: str = "cpu") -> nn.Module:
        """Return the model with its weights. Initialization is in fp32 and depends on `seed` only.

        On the meta device the model has no values.
        """
        if self.checkpoint:
            return load_model(self.checkpoint, dtype, device)
        with torch.device(device):
            model: Any = self.module.Model(self.config)
        if device != "meta":
            model.init_weights(torch.Generator().manual_seed(seed))
        return model.to(dtype)

    def saver(self, model: nn.Module, tokenizer: Tokenizer) -> Callable[[Path | None], None]:
        """Return the function that writes weights and config.json of `model` into a directory; see `make_setup`."""

        def save(directory: Path | None) -> None:
            if self.checkpoint:
                return save_trained(model, directory, base=self.checkpoint)
            with original_head(model):
                parameters = list(model.named_parameters())
            tensors = ((name, full_tensor(parameter.detach())) for name, parameter in parameters)
            if directory is None:
                for _ in tensors:  # this process takes part in gathering the shards
                    pass
                return
            ends = tokenizer.stop_ids if len(tokenizer.stop_ids) > 1 else tokenizer.stop_ids[0]
            raw = {**self.module.config_to_hf(self.config), "bos_token_id": None, "eos_token_id": ends}
            shapes = ((name, torch.empty(p.shape, dtype=p.dtype, device="meta")) for name, p in parameters)
            empty, stream = (disk_tensors(self.module, self.config, pairs) for pairs in (shapes, tensors))
            save_model(directory, raw, stream, empty=empty)

        return save


def blueprint(config: PretrainConfig) -> Blueprint:
    """Return the model that the settings name.

    Raises:
        UserError: the family, preset, file, directory or field does not exist.
    """
    name, changes = config.model, config.model_fields
    if Path(name).is_dir():
        use_model_file(config.model_file)
        if changes:
            raise UserError(f"{name} is a checkpoint: its shape is fixed, so --model.{next(iter(changes))} cannot be.")
        path = check_checkpoint_dir(name)
        return Blueprint(*read_config(path), path)
    file, colon, preset = name.rpartition(":")
    if colon and file.endswith(".py"):
        module = use_model_file(file)
        assert module is not None, file
    else:
        kind, _, preset = name.partition("/")
        files = {path.rsplit(".", 1)[-1]: path for path in FAMILIES.values()}  # gemma3 for gemma3_text
        model_type = kind if kind in FAMILIES else next((t for t, p in FAMILIES.items() if p == files.get(kind)), kind)
        if model_type not in FAMILIES:
            raise UserError(
                f"--model {name}: there is no family '{kind}' and no such directory; expected FAMILY/PRESET with one of "
                f"{', '.join(sorted(FAMILIES))}, MY_FILE.py:PRESET, or a checkpoint directory."
            )
        module = family(model_type)
    if preset not in module.PRESETS:
        raise UserError(f"--model {name}: no preset '{preset}'; there are: {', '.join(module.PRESETS)}.")
    try:
        return Blueprint(module, _changed(module.PRESETS[preset], changes), None)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--model {name} with {changes}: {error}.") from None


def _changed(preset: Any, changes: dict[str, Any]) -> Any:
    """Return a family's `Config` with some fields replaced; each value must have the type of its field."""
    kinds = get_type_hints(type(preset))
    values = {}
    for key, value in changes.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean '{near[0]}'" if near else f"there are {', '.join(kinds)}"
            raise UserError(f"unknown setting 'model.{key}': {hint}?" if near else f"no field model.{key}; {hint}.")
        kind = kinds[key]
        allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if float in allowed and type(value) is int:
            value = float(value)
        if type(value) not in allowed:
            names = " or ".join("null" if k is type(None) else getattr(k, "__name__", str(k)) for k in allowed)
            raise UserError(f"model.{key} is {value!r}, expected {names}.")
        values[key] = value
    return dataclasses.replace(preset, **values)


def prepare_data(fabric: Fabric, config: PretrainConfig, plan: Blueprint) -> Data:
    """Open the corpora, check that they fit the model, and plan the run.

    Raises:
        UserError: a corpus is damaged, too small, or has another tokenizer than the other corpora or the checkpoint.
    """
    corpora = [Corpus(path) for path in config.data.paths]
    _check_tokenizers(corpora, plan)
    tokenizer = Tokenizer(plan.checkpoint or corpora[0].directory)
    data, train = config.data, config.train
    if train.global_batch_size is None:
        train.global_batch_size = 16
    if data.max_seq_len > plan.config.max_positions:
        raise UserError(
            f"data.max_seq_len is {data.max_seq_len}, the model's context {plan.config.max_positions} tokens: use "
            f"--data.max_seq_len {plan.config.max_positions} or less"
            + ("." if plan.checkpoint else f", or --model.max_positions {data.max_seq_len}.")
        )
    rows = TokenWindows(corpora, "train", data.max_seq_len, config.seed, data.weights, data.isolate_documents)
    with_val = [corpus for corpus in corpora if corpus.splits["val"]]
    val = None
    if with_val:
        val = TokenWindows(with_val, "val", data.max_seq_len, VAL_SEED, None, data.isolate_documents, data.val_rows)
    steps = train.max_steps or math.ceil(train.epochs * len(rows) / train.global_batch_size)
    total = steps * train.global_batch_size if train.max_steps else math.ceil(train.epochs * len(rows))
    ineffective = {
        "train.eval_every": train.eval_every is not None and not val,
        "eval.exact_match": config.eval.exact_match,
        "show_masks": config.show_masks > 0,
        "model_file": config.model_file is not None and not plan.checkpoint,
    }
    warn(fabric, ineffective | ineffective_optim(config.optim, steps))
    epochs = dict(zip(data.paths if data.weights else [" + ".join(data.paths)], rows.epochs(total), strict=True))
    fabric.print(
        f"{counted(steps, 'step')} of {counted(min(train.global_batch_size, total), 'sequence')} of "
        f"{data.max_seq_len:,} tokens, of {len(rows):,}: "
        + ", ".join(f"{count:.2f} epochs of {path}" for path, count in epochs.items())
    )
    fabric.print(f"validation: {counted(len(val), 'sequence')}" if val else "warning: no validation text in the corpus")
    statistics = {"statistics": {"rows": len(rows), "validation_rows": len(val) if val else 0, "epochs": epochs}}
    hashes = {f"{c.name}/index.json": content_hash(c.directory / "index.json") for c in corpora}
    samples = _samples(val, tokenizer, config.eval.samples) if val else []
    sizes = train.global_batch_size, train.micro_batch_size
    return Data(tokenizer, rows, val, samples, total, *sizes, statistics, hashes)


def _check_tokenizers(corpora: list[Corpus], plan: Blueprint) -> None:
    first = corpora[0]
    for other in corpora[1:]:
        if any(other.index[key] != first.index[key] for key in ("tokenizer_sha256", "end")):
            raise UserError(f"{other.name} and {first.name} were made with different tokenizers.")
    if plan.checkpoint:
        own = tokenizer_hash((plan.checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        if own != first.index["tokenizer_sha256"]:
            raise UserError(
                f"{first.name} was not made with the tokenizer of {plan.checkpoint}. Prepare the text again with "
                f"--tokenizer {plan.checkpoint}"
            )
    if first.vocab_size > plan.config.vocab_size:
        raise UserError(
            f"{first.name} has a vocabulary of {first.vocab_size:,}, the model one of "
            f"{plan.config.vocab_size:,}: its tokens have no embedding. Type --model.vocab_size "
            f"{first.vocab_size}, or prepare the text with the model's own tokenizer."
        )


def _samples(val: TokenWindows, tokenizer: Tokenizer, count: int) -> list[Example]:
    """Return examples from validation text: the first quarter of a sequence is the prompt, the rest is the reference."""
    examples = []
    for row in range(min(count, len(val))):
        shard, start = val.locate(row)
        ids = shard.read(start, min(val.length, 128)).tolist()
        ids = ids[: ids.index(val.end, 1)] if val.end in ids[1:] else ids
        prompt, text = tokenizer.decode(ids[: -(-len(ids) // 4)]), tokenizer.decode(ids)
        if text.startswith(prompt) and prompt.strip():
            examples.append(Example(f"validation row {row}", prompt=prompt, text=text))
    return examples


def use_z_loss(model: nn.Module, z_weight: float) -> None:
    """Replace the head by one with z-loss.

    Raises:
        UserError: the model's head is not a linear without bias.
    """
    head = getattr(model, name := head_name(model))
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError("--z_loss: this model's head is not a linear without bias.")
    setattr(model, name, ZLossHead(head, z_weight))
