"""The text part of a multimodal checkpoint: `text_config`, and the tensors of the language model.

It is loaded and trained as a model of its family; all other tensors are never loaded, and are carried through as they are
when a result is written. No wrapper is known by name: what is special is how the text part's tensors are called.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from litmini.checkpoints.safetensors_io import read_empty, read_tensors, shards, weight_map
from litmini.errors import UserError
from litmini.methods.base_layer import PREFIX, ModulesToSaveLayer
from litmini.models import FAMILIES, family
from litmini.models.hf_config import towers_of

Tensors = Iterable[tuple[str, Tensor]]
BODY, HEAD = "model.", "lm_head."
"""How the names of a text model's tensors begin: all but those of its head; those of its head."""


class Layout(NamedTuple):
    """How the names of the text part's tensors begin."""

    body: str
    head: str
    in_model: str
    """Those of the body in the model of transformers, and so in PEFT's files."""


LAYOUTS = (
    Layout("language_model.model.", "language_model.lm_head.", "model.language_model."),  # as transformers 4 built it
    Layout("model.language_model.", HEAD, "model.language_model."),
    Layout("model.text_model.", HEAD, "model.text_model."),  # Idefics, SmolVLM
)
WORDS = {"vision_config": ("vis", "image"), "audio_config": ("audio", "speech")}
"""A tower in config.json -> what a name of its tensors contains."""
IN_TEXT = {"vocab_size": True, "pad_token_id": True, "tie_word_embeddings": False, "dtype": False}
"""Settings of the text part that a result changes -> whether transformers reads them in `text_config` only."""
NOT_CAUSAL = {"paligemma": "attends to its prompt in both directions"}
"""Wrappers whose language model computes something else than its family does alone."""


class TextPart(ModuleType):
    """The text part of a checkpoint, in the place of the module of its family, of which it has all else."""

    def __init__(self, module: ModuleType, layout: Layout) -> None:
        super().__init__(module.__name__)
        self.module, self.layout = module, layout
        self.carried: tuple[str, ...] = ()
        """How the names of tensors of the family begin that it does not load, but carries through."""

    def read_config(self, raw: dict[str, Any]) -> Any:
        """Return the `Config` of a config.json of the family."""
        config = self.module.config_from_hf(raw)
        self.carried = self.module.carried(config) if hasattr(self.module, "carried") else ()
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def owns(self, name: str) -> bool:
        """Whether a tensor of the files belongs to the text part."""
        own = name.startswith(self.layout[:2]) or name.startswith("score.")
        return own and not self._renamed(name, disk=False).startswith(self.carried)

    def from_hf(self, tensors: Tensors, config: Any) -> Tensors:
        """Convert the text part's tensors to the names and shapes of the family's model, and leave out all others."""
        own = ((self._renamed(name, disk=False), tensor) for name, tensor in tensors if self.owns(name))
        return self.module.from_hf(own, config) if hasattr(self.module, "from_hf") else own

    def to_hf(self, tensors: Tensors, config: Any) -> Tensors:
        """Convert a model's tensors to the names and shapes of the files: the inverse of `from_hf`."""
        on_disk = self.module.to_hf(tensors, config) if hasattr(self.module, "to_hf") else tensors
        return ((self._renamed(name, disk=True), tensor) for name, tensor in on_disk)

    def _renamed(self, name: str, disk: bool) -> str:
        for pair in ((BODY, self.layout.body), (HEAD, self.layout.head)):
            old, new = pair if disk else pair[::-1]
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def beside(self, directory: Path) -> tuple[Tensors, Tensors]:
        """Return all other tensors of a checkpoint: their shapes and dtypes, and their values, one in memory at a time."""
        files = shards(directory)
        return read_empty(files, self._is_beside), read_tensors(files, copied=True, only=self._is_beside)

    def _is_beside(self, name: str) -> bool:
        return not self.owns(name)


class CarriedParts(TextPart):
    """A text model whose files may have tensors beside it that its family does not load, and names in `carried`."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module, Layout(BODY, HEAD, BODY))

    def owns(self, name: str) -> bool:
        return not name.startswith(self.carried)


def open_text_part(
    raw: dict[str, Any], file: Path, names: Collection[str] | None = None
) -> tuple[TextPart, dict[str, Any]]:
    """Return the text part that a config.json `raw` describes, and the config.json that it would have alone.

    Args:
        names: of all tensors that it describes; None: those in the files beside it, if they exist.

    Raises:
        UserError: the text part is missing, not implemented, or there are two; or a tower has no tensors.
    """
    types = {key: _type(raw[key]) for key in ("text_config", *towers_of(raw)) if raw.get(key)}
    parts = ", ".join(f"{key} of model_type '{name}'" if name else key for key, name in types.items())
    kind = f"{file} describes a multimodal model ({parts})"
    text = raw.get("text_config")
    if not isinstance(text, dict) or not text:
        raise UserError(
            f"{kind} whose text part is not there: expected text_config, the settings of its language model."
        )
    if (model_type := str(raw.get("model_type"))) in NOT_CAUSAL:
        raise UserError(f"{kind} of model_type '{model_type}', which {NOT_CAUSAL[model_type]}: not implemented.")
    if _type(text) not in FAMILIES:
        raise UserError(
            f"{kind}. All else would be carried through as it is, but its text part, model_type '{_type(text)}', is not "
            f"implemented; there are: {', '.join(sorted(FAMILIES))}."
        )
    names = _tensor_names(file.parent) if names is None else names
    layout = _layout(raw, kind, names) if names is not None else LAYOUTS[1]
    alone = dict(text)
    if names is not None or raw.get("tie_word_embeddings") is not None:
        alone["tie_word_embeddings"] = with_tie(raw)["tie_word_embeddings"]
    if names is not None and text.get("tie_word_embeddings") and not any(n.startswith(layout.head) for n in names):
        alone["tie_word_embeddings"] = True  # as the text part says, where the whole says no (LLaVA)
    for key in ("quantization_config", "num_labels"):
        alone |= {key: raw[key]} if raw.get(key) is not None else {}
    return TextPart(family(_type(text)), layout), alone


def _tensor_names(directory: Path) -> list[str] | None:
    """Return the names of all tensors of a checkpoint; None: it has no weights yet."""
    files = shards(directory)
    if not all(file.is_file() for file in files):
        return None
    names = [name for name, _ in read_empty(files)]
    index = directory / "model.safetensors.index.json"
    if index.is_file() and (missing := sorted(weight_map(index).keys() - set(names))):
        raise UserError(
            f"{index} names tensors that its files lack: {', '.join(missing[:5])}{', ...' * (len(missing) > 5)}. "
            f"Download them again."
        )
    return names


def _type(part: Any) -> str:
    return str(part.get("model_type", ""))[:50] if isinstance(part, dict) else ""


def _layout(raw: dict[str, Any], kind: str, names: Collection[str]) -> Layout:
    """Return the layout of the text part among the `names` of tensors."""
    found = [layout for layout in LAYOUTS if any(name.startswith(layout.body) for name in names)]
    if not found:
        expected = ", ".join(f"{layout.body}*" for layout in LAYOUTS)
        raise UserError(
            f"{kind}, but the text part is not in the weights beside it: expected tensors {expected}; found "
            f"{', '.join(sorted(names)[:3]) or 'none'}{', ...' * (len(names) > 3)}. Download it again."
        )
    if len(found) > 1:
        raise UserError(
            f"{kind}, and the weights beside it hold two text parts: {' and '.join(f'{one.body}*' for one in found)}; "
            f"expected one of them."
        )
    others = [name.lower() for name in names if not name.startswith(found[0].body)]
    for key in towers_of(raw):
        if not any(word in name for word in WORDS[key] for name in others):
            raise UserError(
                f"{kind}, but the weights beside it have no tensor of {key}, so that a result could not be loaded as "
                f"{', '.join(raw.get('architectures') or ['what it was'])}. Download it again."
            )
    return found[0]


def with_tie(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with `tie_word_embeddings`, whose default differs from wrapper to wrapper.

    Where it is nowhere, the weights decide: tied, unless they have another head (`config.untied`).
    """
    ties = (raw.get("tie_word_embeddings"), raw["text_config"].get("tie_word_embeddings"), True)
    return {**raw, "tie_word_embeddings": next(tie for tie in ties if tie is not None)}


def changed_config(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return config.json `raw` with `changes` of the text part, wherever it has these keys, and its tie."""
    raw = with_tie(raw)
    text = {key: value for key, value in raw["text_config"].items() if key != "torch_dtype"}  # since v5: `dtype`
    inside = {key: value for key, value in changes.items() if key in IN_TEXT and (key in text or IN_TEXT[key])}
    outside = {key: value for key, value in changes.items() if key in raw or not IN_TEXT.get(key)}
    return {**raw, **outside, "text_config": {**text, **inside}}


def in_wrapper(name: str, in_model: str) -> str:
    """Return the name of a module of the text part in the whole model of transformers.

    Args:
        in_model: how the names of the body begin there (`Layout.in_model`).
    """
    return in_model + name.removeprefix(BODY) if name.startswith(BODY) else name


def to_peft(
    tensors: dict[str, Tensor], config: dict[str, Any], by_method: dict[Any, dict[str, Any]], in_model: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what PEFT's files say of the text part alone as they say it of the whole model.

    Its settings name modules of the text part only, since towers have a `q_proj`, too.

    Args:
        by_method: class of the adapter layers -> full names of their modules.
    """
    renamed = {PREFIX + in_wrapper(key.removeprefix(PREFIX), in_model): tensor for key, tensor in tensors.items()}
    heads = [target for target in config["target_modules"] if f"{target}." == HEAD]
    others = "|".join(re.escape(target) for target in config["target_modules"] if target not in heads)
    inside = [rf"{re.escape(in_model)}(?:.*\.)?(?:{others})"] if others else []
    changes: dict[str, Any] = {"target_modules": "|".join([*inside, *heads]) or []}
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            changes[key] = {in_wrapper(name, in_model): value for name, value in config[key].items()}
    if in_full := by_method.get(ModulesToSaveLayer):
        changes["modules_to_save"] = sorted(in_wrapper(name, in_model) for name in in_full)
    return renamed, config | changes


def to_own_names(adapter: Any, in_model: str) -> None:
    """Give the tensors of an adapter, of a model of transformers 4 or 5, the names that modules have in the text part."""
    adapter.in_whole_model = in_model
    body, head, _ = LAYOUTS[0]
    for tensors in (adapter.layers, adapter.full, adapter.tokens, adapter.vocabulary):
        for name in list(tensors):
            pairs = ((in_model, BODY), (body, BODY), (head, HEAD))
            owns = [new + f"{name}.".removeprefix(old) for old, new in pairs if f"{name}.".startswith(old)]
            tensors[owns[0][:-1] if owns else name] = tensors.pop(name)
