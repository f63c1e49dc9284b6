"""Meta's consolidated.*.pth of Llama: https://github.com/meta-llama/llama-models

They are model parallel parts, and their rotary pairs are interleaved.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litmini.errors import UserError
from litmini.importers.names import half_split, rename
from litmini.importers.pickles import Pickle
from litmini.models import llama

Tensors = Iterable[tuple[str, Tensor]]
Read = Callable[[bool], Tensors]

META_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.wq": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.wk": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.wv": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.wo": "model.layers.*.self_attn.o_proj",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.feed_forward.w1": "model.layers.*.mlp.gate_proj",
    "layers.*.feed_forward.w3": "model.layers.*.mlp.up_proj",
    "layers.*.feed_forward.w2": "model.layers.*.mlp.down_proj",
}


def read_meta(directory: Path, params: dict[str, Any], states: list[Pickle]) -> tuple[dict[str, Any], Read]:
    """Return `config.json` and the reader of Meta's checkpoint; `states` are its model parallel parts in order.

    Raises:
        UserError: params.json is incomplete, or the parts are not of one model.
    """
    names = [name for name in states[0].tensors if name != "rope.freqs"]
    if differing := [state.file for state in states if set(state.tensors) != set(states[0].tensors)]:
        raise UserError(f"{differing[0]} has other tensors than the first part.")
    try:
        config = _meta_config(params, states)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{directory}/params.json does not describe a Llama ({type(error).__name__}: {error})."
        ) from None
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in llama.Model(config).named_parameters(remove_duplicate=False)}

    def read(meta: bool) -> Iterator[tuple[str, Tensor]]:
        for old in names:
            new = rename(old, META_NAMES)
            tensor = _join([state.get(old, meta) for state in states], shapes.get(new))
            if new.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = half_split(tensor.contiguous(), config.head_dim)
            yield new, tensor

    return llama.config_to_hf(config), read


def _join(parts: list[Tensor], shape: tuple[int, ...] | None) -> Tensor:
    """Concatenate model parallel parts along the dimension in which one part falls short of `shape`."""
    if len(parts) == 1 or shape is None or parts[0].shape == shape:
        return parts[0]
    short = [i for i, (size, full) in enumerate(zip(parts[0].shape, shape, strict=False)) if size != full]
    return torch.cat(parts, short[0] if short else 0)


def _meta_config(params: dict[str, Any], states: list[Pickle]) -> llama.Config:
    """Return the settings: those that params.json lacks follow from the tensors, or from the generation."""
    first, dim, n_heads = states[0].tensors, params["dim"], params["n_heads"]
    theta = float(params.get("rope_theta", 10_000.0))
    scaled, generation = bool(params.get("use_scaled_rope")), params.get("norm_eps", 1e-5)
    small = dim <= 3072  # Llama 3.2 1B and 3B, whose head is the embedding
    factor = float(params.get("rope_scaling_factor", 32.0 if small else 8.0))
    positions = 131_072 if scaled else {500_000.0: 8192, 1_000_000.0: 16_384}.get(theta, 0)
    output = first.get("output.weight")
    pair = ("output.weight", "tok_embeddings.weight")
    tied = output is None or (len(states) == 1 and torch.equal(*map(states[0].get, pair)))
    vocab = first["tok_embeddings.weight"].shape[0] if output is None else output.shape[0] * len(states)
    return llama.Config(
        vocab_size=vocab,
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=params.get("n_kv_heads") or n_heads,
        head_dim=dim // n_heads,
        ffn_dim=first["layers.0.feed_forward.w1.weight"].shape[0] * len(states),
        max_positions=positions or (2048 if generation == 1e-6 else 4096),  # Llama 1, Llama 2
        rope_theta=theta,
        rope_scaling=llama.RopeScaling("llama3", factor) if scaled else None,
        norm_eps=generation,
        tied=tied,
    )
