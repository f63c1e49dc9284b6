"""Names and layouts of other programs' checkpoints: Meta's consolidated.*.pth and litgpt's lit_model.pth.

Meta's: https://github.com/meta-llama/llama-models (model parallel parts, interleaved rotary pairs). litgpt's: its
scripts/convert_lit_checkpoint.py (q, k and v in one tensor: side by side since December 2024, by group before).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litmini.errors import UserError
from litmini.importers.gguf.convert import half_split
from litmini.importers.pickles import Pickle
from litmini.models import family, llama

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


def _rename(name: str, names: dict[str, str]) -> str:
    """A tensor's new name by that of its layers with * for numbers; the old one if there is none."""
    stem, _, kind = name.rpartition(".")
    new = names.get(re.sub(r"\.\d+(?=\.|$)", ".*", stem))
    for number in re.findall(r"\.(\d+)(?=\.|$)", stem) if new else ():
        new = new.replace("*", number, 1) if new else new
    return f"{new}.{kind}" if new else name


def read_meta(directory: Path, params: dict[str, Any], states: list[Pickle]) -> tuple[dict[str, Any], Read]:
    """`config.json` and the reader of Meta's checkpoint; `states` are its model parallel parts in order.

    Raises:
        UserError: params.json is incomplete, or the parts are not of one model.
    """
    names = [name for name in states[0].found if name != "rope.freqs"]
    if differing := [state.file for state in states if set(state.found) != set(states[0].found)]:
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
            new = _rename(old, META_NAMES)
            tensor = _join([state.get(old, meta) for state in states], shapes.get(new))
            if new.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = half_split(tensor.contiguous(), config.head_dim)
            yield new, tensor

    return llama.config_to_hf(config), read


def _join(parts: list[Tensor], shape: tuple[int, ...] | None) -> Tensor:
    """A tensor from its model parallel parts: along the dimension in which one part falls short of `shape`."""
    if len(parts) == 1 or shape is None or parts[0].shape == shape:
        return parts[0]
    short = [i for i, (there, whole) in enumerate(zip(parts[0].shape, shape, strict=False)) if there != whole]
    return torch.cat(parts, short[0] if short else 0)


def _meta_config(params: dict[str, Any], states: list[Pickle]) -> llama.Config:
    """What params.json does not say is seen in the tensors, or known of the generation."""
    first, dim, n_heads = states[0].found, params["dim"], params["n_heads"]
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


LIT = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "transformer.h.*.norm_1": "model.layers.*.input_layernorm",
    "transformer.h.*.norm_2": "model.layers.*.post_attention_layernorm",
    "transformer.h.*.attn.proj": "model.layers.*.self_attn.o_proj",
    "transformer.h.*.attn.norm_q": "model.layers.*.self_attn.q_norm",
    "transformer.h.*.attn.norm_k": "model.layers.*.self_attn.k_norm",
    "transformer.h.*.mlp.fc_1": "model.layers.*.mlp.gate_proj",
    "transformer.h.*.mlp.fc_2": "model.layers.*.mlp.up_proj",
    "transformer.h.*.mlp.proj": "model.layers.*.mlp.down_proj",
}
_FOUR_NORMS = {
    "transformer.h.*.post_attention_norm": "model.layers.*.post_attention_layernorm",
    "transformer.h.*.norm_2": "model.layers.*.pre_feedforward_layernorm",
    "transformer.h.*.post_mlp_norm": "model.layers.*.post_feedforward_layernorm",
}
_OLMO2 = {
    "transformer.h.*.post_attention_norm": "model.layers.*.post_attention_layernorm",
    "transformer.h.*.post_mlp_norm": "model.layers.*.post_feedforward_layernorm",
}
_MIXTRAL = {
    "transformer.h.*.mlp.gate": "model.layers.*.block_sparse_moe.gate",
    "transformer.h.*.mlp.experts.*.fc_1": "model.layers.*.block_sparse_moe.experts.*.w1",
    "transformer.h.*.mlp.experts.*.fc_2": "model.layers.*.block_sparse_moe.experts.*.w3",
    "transformer.h.*.mlp.experts.*.proj": "model.layers.*.block_sparse_moe.experts.*.w2",
}
_QWEN3_MOE = {
    "transformer.h.*.mlp.gate": "model.layers.*.mlp.gate",
    "transformer.h.*.mlp.experts.*.fc_1": "model.layers.*.mlp.experts.*.gate_proj",
    "transformer.h.*.mlp.experts.*.fc_2": "model.layers.*.mlp.experts.*.up_proj",
    "transformer.h.*.mlp.experts.*.proj": "model.layers.*.mlp.experts.*.down_proj",
}
_NEOX = {
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "transformer.h.*.norm_1": "gpt_neox.layers.*.input_layernorm",
    "transformer.h.*.norm_2": "gpt_neox.layers.*.post_attention_layernorm",
    "transformer.h.*.attn.proj": "gpt_neox.layers.*.attention.dense",
    "transformer.h.*.mlp.fc": "gpt_neox.layers.*.mlp.dense_h_to_4h",
    "transformer.h.*.mlp.proj": "gpt_neox.layers.*.mlp.dense_4h_to_h",
}
_PHI = {
    "transformer.ln_f": "model.final_layernorm",
    "transformer.h.*.attn.proj": "model.layers.*.self_attn.dense",
    "transformer.h.*.mlp.fc": "model.layers.*.mlp.fc1",
    "transformer.h.*.mlp.proj": "model.layers.*.mlp.fc2",
}
LITGPT = {  # model_type -> names
    **dict.fromkeys(("llama", "mistral", "gemma", "qwen2", "qwen3"), LIT),
    **dict.fromkeys(("gemma2", "gemma3_text"), LIT | _FOUR_NORMS),
    "olmo2": LIT | _OLMO2,
    "mixtral": LIT | _MIXTRAL,
    "qwen3_moe": LIT | _QWEN3_MOE,
    "gpt_neox": _NEOX,
    "phi": LIT | _PHI,
}


def read_litgpt(state: Pickle, raw: dict[str, Any]) -> Read:
    """The reader of litgpt's checkpoint; `raw` is the config.json that litgpt keeps beside it.

    Raises:
        UserError: it holds an adapter, or a family that is not implemented.
    """
    file, kind = state.file, raw.get("model_type")
    if kind not in LITGPT:
        raise UserError(f"{file}: of litgpt's files, model_type '{kind}' is not read; there are: {', '.join(LITGPT)}.")
    if adapters := [name for name in state.found if "lora_" in name or "adapter" in name or "gating_factor" in name]:
        raise UserError(f"{file} holds an adapter ({adapters[0]}). Merge it first: litgpt merge_lora {file.parent}")
    config = family(kind).config_from_hf(raw)

    def read(meta: bool) -> Iterator[tuple[str, Tensor]]:
        for old in state.found:
            tensor = state.get(old, meta)
            stem, _, leaf = old.rpartition(".")
            if not stem.endswith((".attn.qkv", ".attn.attn")):
                yield _rename(old, LITGPT[kind]), tensor
                continue
            number = re.findall(r"\d+", stem)[0]
            parts = _split_qkv(tensor, config, by_group=stem.endswith(".attn.attn"))
            if kind == "gpt_neox":
                yield f"gpt_neox.layers.{number}.attention.query_key_value.{leaf}", _by_group(*parts, config)
            else:
                yield from (
                    (f"model.layers.{number}.self_attn.{c}_proj.{leaf}", t) for c, t in zip("qkv", parts, strict=True)
                )
            del parts  # or they would be held while the next one is read

    return read


def _split_qkv(tensor: Tensor, config: Any, by_group: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a fused tensor: one after the other, or, by group, the queries of each key, that key, its value."""
    per_key = config.n_heads // config.n_kv_heads
    if not by_group:
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        a, b, c = tensor.split((q, kv, kv))
        return a, b, c
    groups = tensor.view(config.n_kv_heads, per_key + 2, config.head_dim, *tensor.shape[1:])
    q, k, v = groups.split((per_key, 1, 1), dim=1)
    return q.reshape(-1, *tensor.shape[1:]), k.reshape(-1, *tensor.shape[1:]), v.reshape(-1, *tensor.shape[1:])


def _by_group(q: Tensor, k: Tensor, v: Tensor, config: Any) -> Tensor:
    """GPT-NeoX's own order in Hugging Face's files: q, k, v of each head."""
    heads = [part.view(config.n_kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(heads, dim=1).reshape(-1, *q.shape[1:])
