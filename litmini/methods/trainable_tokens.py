"""New tokens: embedding and head grow, and their rows are trained (PEFT's `trainable_token_indices`)."""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.adapters import adapters
from litmini.methods.base_layer import AdapterLayer, ModulesToSaveLayer, module_name
from litmini.methods.heads import head_name
from litmini.ops.cross_entropy import OutputHead

KEY = "token_adapter.trainable_tokens_delta"
SETTING = "trainable_token_indices"


class TrainableTokensLayer(AdapterLayer):
    """A frozen embedding or output head, in which the rows of some tokens are replaced by trained ones.

    They are kept in fp32, start as the rows of the base, and are rounded to its dtype where they are used, as in PEFT.

    Args:
        base: nn.Embedding, or nn.Linear without bias.
        indices: the ids of the tokens.
        rows: those of the embedding, which a tied head shares; its `peft_tensors` are the embedding's.
    """

    peft_keys = (KEY,)
    is_beside = True

    def __init__(self, base: Any, indices: list[int], rows: nn.Embedding | None = None) -> None:
        super().__init__()
        self.base, self.is_tied = base, rows is not None
        weight, ids = base.weight.detach(), torch.tensor(indices, dtype=torch.int64)
        if rows is None:
            own = weight[ids.to(weight.device)].float()
            rows = nn.Embedding(len(ids), weight.shape[1], _weight=own)
        self.rows = rows
        slots = torch.full((len(weight),), -1, dtype=torch.int64)
        slots[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids.to(weight.device), persistent=False)
        self.register_buffer("slots", slots.to(weight.device), persistent=False)
        self.ids: Tensor
        self.slots: Tensor
        """Token id -> its place in `rows`, or -1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings of tokens x (..., dim), or the logits of hidden states (..., vocab)."""
        y, rows = self.base(x), self.rows.weight.to(self.base.weight.dtype)
        if isinstance(self.base, nn.Embedding):
            slots = self.slots[x]
            return torch.where((slots >= 0)[..., None], F.embedding(slots.clamp(min=0), rows), y)
        return y.index_copy(-1, self.ids, F.linear(x, rows).to(y.dtype))

    def merged_weight(self) -> Tensor:
        return self.base.weight.detach().float().index_copy(0, self.ids, self.rows.weight.detach())

    def merge(self, generator: torch.Generator | None = None) -> nn.Module:
        weight = self.merged_weight().to(self.base.weight.dtype)
        merged = copy.copy(self.base)
        merged._parameters = {**self.base._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return merged  # type: ignore[no-any-return]

    # PEFT's format

    def peft_tensors(self) -> dict[str, Tensor]:
        """{KEY: (tokens, dim)}; {} for a tied head."""
        return {} if self.is_tied else {KEY: full_tensor(self.rows.weight)}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        if not self.is_tied:
            self.rows.weight.data.copy_(tensors[KEY])

    @classmethod
    def from_peft(cls, base: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterLayer:
        return cls(base, indices_of(config, name))

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        return {SETTING: {module_name(n): layer.ids.tolist() for n, layer in layers.items() if not layer.is_tied}}


def indices_of(config: dict[str, Any], name: str) -> list[int]:
    """Return the ids of the tokens that `adapter_config.json` names for the module `name`; a list is the embedding's."""
    setting = config[SETTING]
    if isinstance(setting, list):
        return setting
    return next((ids for module, ids in setting.items() if name.endswith(module)), [])


def embedding_name(model: nn.Module) -> str:
    """Return the name of a model's token embedding: its first one, adapted or not.

    Raises:
        UserError: it has none.
    """
    for name, module in model.named_modules():
        if isinstance(module.base if isinstance(module, AdapterLayer) else module, nn.Embedding):
            return name
    raise UserError("this model has no nn.Embedding, so its vocabulary cannot grow.")


def vocabulary_modules(model: nn.Module) -> list[str]:
    """Return the names of the token embedding and of the output head, if it gives logits of tokens."""
    head = head_name(model)
    module = model.get_submodule(head)
    names = [embedding_name(model), f"{head}.original" if isinstance(module, OutputHead) else head]
    return names[:1] if isinstance(module, OutputHead) and module.original is None else names


def grown(weight: Tensor, first: int, count: int) -> Tensor:
    """Return the weight or bias of an embedding or a head, in which `count` rows from `first` on are the mean of those before.

    Rows that follow them stay. The mean is computed in fp32, the same each time.
    """
    mean = weight[:first].mean(0, dtype=torch.float32, keepdim=True).to(weight.dtype)
    return torch.cat([weight[:first], mean.expand(count, *mean.shape[1:]), weight[first + count :]])


def grow_vocabulary(model: nn.Module, first: int, count: int) -> None:
    """Initialize `count` rows of embedding and head from `first` on with the mean of those before; what has fewer rows grows.

    A tied head stays tied. A module that is trained in full beside adapters starts again from the grown base.

    Raises:
        UserError: the head has an adapter.
    """
    new: dict[Any, nn.Parameter] = {}
    for name in vocabulary_modules(model):
        layer: Any = model.get_submodule(name)
        in_full = isinstance(layer, ModulesToSaveLayer)
        if isinstance(layer, AdapterLayer) and not in_full:
            raise UserError(
                f"{module_name(name)} has an adapter, which does not go with new tokens: leave it out of lora.targets, or "
                f"name it in lora.modules_to_save."
            )
        base = layer.base if in_full else layer
        for key, old in list(base.named_parameters(recurse=False)):
            if old not in new:
                new[old] = nn.Parameter(grown(old.detach(), first, count), requires_grad=old.requires_grad)
            setattr(base, key, new[old])
        if isinstance(base, nn.Embedding):
            base.num_embeddings = len(base.weight)
        else:
            base.out_features = len(base.weight)
        if in_full:
            model.set_submodule(name, ModulesToSaveLayer(base))
    config: Any = model.config
    model.config = dataclasses.replace(config, vocab_size=max(config.vocab_size, first + count))  # type: ignore[assignment]


def add_tokens(model: nn.Module, ids: list[int], known: int) -> None:
    """Give the new tokens `ids` rows; beside adapters, only these are trained, but for what is trained in full anyway.

    Args:
        known: number of ids of the tokenizer before; rows from there on are initialized with the mean of the others.

    Raises:
        UserError: the model has fewer rows than the tokenizer has ids, or PEFT could not read the result.
    """
    config: Any = model.config
    if known > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {known - 1}, the model rows for 0 to {config.vocab_size - 1} only: new tokens "
            f"cannot follow them. The tokenizer does not belong to this model."
        )
    if count := sum(i >= known for i in ids):
        if name := next((n for n, m in model.named_modules() if type(m).__name__ == "PerLayerEmbedding"), None):
            raise UserError(f"new tokens would need rows in {name}, too, which is not implemented.")
        grow_vocabulary(model, known, count)
    if not adapters(model):
        return
    names = vocabulary_modules(model)
    rest = [name for name in names if not isinstance(model.get_submodule(name), ModulesToSaveLayer)]
    if is_tied(model, names) and len(rest) == 1:
        both = " and ".join(map(module_name, names))
        raise UserError(f"{both} are tied: with new tokens, name both of them in lora.modules_to_save, or none.")
    for name, layer in token_layers(model, dict.fromkeys(rest, ids)).items():
        model.set_submodule(name, layer.train(model.training))


def is_tied(model: nn.Module, names: list[str]) -> bool:
    """Return whether the modules `names`, an embedding and a head, share their weight, adapted or not."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    weights = [(layer.base if isinstance(layer, AdapterLayer) else layer).weight for layer in layers]
    return len(weights) == 2 and weights[0] is weights[1]


def token_layers(model: nn.Module, indices: dict[str, list[int]]) -> dict[str, TrainableTokensLayer]:
    """Return a layer over each module of `indices`, and over a head that is tied to one of them, with the same rows.

    Raises:
        UserError: the head has a bias, which PEFT would leave out.
    """
    names = vocabulary_modules(model)
    layers: dict[str, TrainableTokensLayer] = {}
    if indices and is_tied(model, names):
        embedding, head = names
        ids = indices.get(embedding, indices.get(head, []))
        if indices.get(head, ids) != ids:
            raise UserError(f"{SETTING} names other tokens for {head} than for {embedding}, to which it is tied.")
        layers[embedding] = TrainableTokensLayer(model.get_submodule(embedding), ids)
        layers[head] = TrainableTokensLayer(model.get_submodule(head), ids, layers[embedding].rows)
        return layers
    for name, ids in indices.items():
        base: Any = model.get_submodule(name)
        if isinstance(base, nn.Linear) and base.bias is not None:
            raise UserError(
                f"{name} has a bias, which PEFT leaves out beside trained tokens: name {module_name(name)} in "
                f"lora.modules_to_save, or use finetune_full.py."
            )
        layers[name] = TrainableTokensLayer(base, ids)
    return layers
