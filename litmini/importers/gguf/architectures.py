"""Settings and tensor names of each `general.architecture` of GGUF files.

Defaults are those of llama.cpp (src/models/*.cpp); its converter (conversion/*.py) shows which settings and tensors exist.
A setting that is not implemented is an error, never ignored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litmini.errors import UserError
from litmini.importers.gguf.settings import Settings
from litmini.models import gemma, gemma2, gemma3, gemma4, gpt2, llama, qwen2, qwen3


def _llama(s: Settings) -> llama.Config:
    sizes, theta = s.sizes(), s.get("rope.freq_base", 10_000.0)
    scaling = None
    if s.metadata.get("llama.rope.scaling.type") == "linear":
        scaling = llama.RopeScaling("linear", s.need("rope.scaling.factor", float))
        s.expect(rope__scaling__type="linear")
    elif "rope_freqs.weight" in s.tensors:
        scaling = _llama3_scaling(s.tensors["rope_freqs.weight"].read(0, 1)[0], theta, s.metadata.file)
    biases: dict[str, Any] = {
        "attn_bias": "blk.0.attn_q.bias" in s.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in s.tensors,
    }
    return llama.Config(**sizes, rope_theta=theta, rope_scaling=scaling, **biases)


def _llama3_scaling(divisors: np.ndarray, theta: float, file: Path) -> llama.RopeScaling:
    """Check that Llama 3's rule gives the divisors of the frequencies, which is what GGUF stores."""
    s = llama.RopeScaling("llama3", factor=float(divisors.max()))
    turns = s.original_positions * theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clip(0, 1)
    if not np.allclose(1 / (blend + (1 - blend) / s.factor), divisors, rtol=1e-3):
        raise UserError(f"{file}: rope_freqs.weight is not Llama 3's rotary scaling, the only one implemented.")
    return s


def _yarn(s: Settings) -> dict[str, Any] | None:
    if s.metadata.get(f"{s.architecture}.rope.scaling.type") != "yarn":
        return None
    s.expect(rope__scaling__type="yarn", rope__scaling__finetuned=True)
    factor = s.need("rope.scaling.factor", float)
    original = s.need("rope.scaling.original_context_length")
    return {"factor": factor, "original_positions": original, "attention_factor": 0.1 * math.log(max(factor, 1.0)) + 1}


def _qwen2(s: Settings) -> qwen2.Config:
    yarn = _yarn(s)
    theta = s.get("rope.freq_base", 10_000.0)
    return qwen2.Config(**s.sizes(), rope_theta=theta, yarn=qwen2.Yarn(**yarn) if yarn else None)


def _qwen3(s: Settings) -> qwen3.Config:
    yarn = _yarn(s)
    theta = s.get("rope.freq_base", 10_000.0)
    return qwen3.Config(**s.sizes(), rope_theta=theta, yarn=qwen3.Yarn(**yarn) if yarn else None)


def _gemma(s: Settings) -> gemma.Config:
    return gemma.Config(**s.sizes(), rope_theta=s.get("rope.freq_base", 10_000.0))


def _query_scalar(sizes: dict[str, Any], layers_of_27b: int) -> int:
    """Return the square of the divisor of attention scores: the width of a head, but in 27B the model's width by heads."""
    return sizes["dim"] // sizes["n_heads"] if sizes["n_layers"] == layers_of_27b else sizes["head_dim"]


def _gemma2(s: Settings) -> gemma2.Config:
    sizes = s.sizes()
    return gemma2.Config(
        **sizes,
        window=s.need("attention.sliding_window"),
        query_scalar=_query_scalar(sizes, 46),
        attn_softcap=s.need("attn_logit_softcapping", float),
        logit_softcap=s.need("final_logit_softcapping", float),
        rope_theta=s.get("rope.freq_base", 10_000.0),
    )


def _gemma3(s: Settings) -> gemma3.Config:
    sizes, factor = s.sizes(), 1.0
    if s.metadata.get("gemma3.rope.scaling.type") == "linear":
        factor = s.need("rope.scaling.factor", float)
        s.expect(rope__scaling__type="linear")
    return gemma3.Config(
        **sizes,
        window=s.need("attention.sliding_window"),
        global_every=s.get("attention.sliding_window_pattern", 6),
        query_scalar=_query_scalar(sizes, 62),
        rope_theta=s.get("rope.freq_base", 1_000_000.0),
        rope_factor=factor,
        rope_local_theta=s.get("rope.freq_base_swa", 10_000.0),
    )


def _gemma4(s: Settings) -> gemma4.Config:
    """Whatever differs by layer is a list: Config says it in a few numbers, and then both must agree."""
    n_layers, n_shared = s.need("block_count"), s.count("attention.shared_kv_layers")
    is_local = s.layers("attention.sliding_window_pattern", n_layers)
    widths, heads = (s.layers(key, n_layers) for key in ("feed_forward_length", "attention.head_count_kv"))
    head_dim, global_head_dim = s.need("attention.key_length_swa"), s.need("attention.key_length")
    s.expect(attention__value_length_swa=head_dim, attention__value_length=global_head_dim)
    s.expect(rope__dimension_count_swa=head_dim, rope__dimension_count=global_head_dim)
    first = is_local.index(0)
    local_heads = heads[is_local.index(1)] if 1 in is_local else heads[first]
    divisors = s.tensors["rope_freqs.weight"].read(0, 1)[0] if "rope_freqs.weight" in s.tensors else np.ones(1)
    experts = {"n_experts": "expert_count", "n_active": "expert_used_count", "expert_dim": "expert_feed_forward_length"}
    config = gemma4.Config(
        vocab_size=s.tensors["token_embd.weight"].shape[0],
        dim=s.need("embedding_length"),
        n_layers=n_layers,
        n_heads=s.need("attention.head_count"),
        n_kv_heads=local_heads,
        ffn_dim=widths[0],
        max_positions=s.need("context_length"),
        window=s.need("attention.sliding_window"),
        global_every=first + 1,
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        n_global_kv_heads=None if heads[first] == local_heads else heads[first],
        k_eq_v=f"blk.{first}.attn_v.weight" not in s.tensors,
        n_shared=n_shared,
        double_wide=n_shared > 0 and widths[-1] == 2 * widths[0],
        ple_dim=s.count("embedding_length_per_layer_input"),
        logit_softcap=s.need("final_logit_softcapping", float),
        rope_theta=s.get("rope.freq_base", 1_000_000.0),
        rotary_pct=float((divisors == 1).mean()),  # the other frequencies are divided by 1e30
        rope_local_theta=s.get("rope.freq_base_swa", 10_000.0),
        norm_eps=s.need("attention.layer_norm_rms_epsilon", float),
        tied="output.weight" not in s.tensors,
        **{field: s.count(key) for field, key in experts.items()},
    )
    kinds = [config.is_global(i) for i in range(n_layers)]
    implied = {
        "sliding_window_pattern": (is_local, [int(not kind) for kind in kinds]),
        "head_count_kv": (heads, [heads[first] if kind else local_heads for kind in kinds]),
        "feed_forward_length": (
            widths,
            [widths[0] * (1 + (config.double_wide and config.source(i) != i)) for i in range(n_layers)],
        ),
    }
    if wrong := [key for key, (found, expected) in implied.items() if found != expected]:
        raise ValueError(f"{', '.join(wrong)} of its layers is not implemented: {implied[wrong[0]][0]}")
    return config


def _gpt2(s: Settings) -> gpt2.Config:
    n_heads = s.need("attention.head_count")
    s.expect(attention__head_count_kv=n_heads)
    return gpt2.Config(
        vocab_size=s.tensors["token_embd.weight"].shape[0],
        dim=s.need("embedding_length"),
        n_layers=s.need("block_count"),
        n_heads=n_heads,
        ffn_dim=s.need("feed_forward_length"),
        max_positions=s.need("context_length"),
        norm_eps=s.need("attention.layer_norm_epsilon", float),
        tied="output.weight" not in s.tensors,
    )


NAMES = {  # of Llama, and of all that were built after it
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.*.attn_norm": "model.layers.*.input_layernorm",
    "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
    "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
    "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
    "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
    "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
    "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
    "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
}
HEAD_NORMS = {
    "blk.*.attn_q_norm": "model.layers.*.self_attn.q_norm",
    "blk.*.attn_k_norm": "model.layers.*.self_attn.k_norm",
}
FOUR_NORMS = {  # ffn_norm is not what it is in Llama
    "blk.*.post_attention_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.ffn_norm": "model.layers.*.pre_feedforward_layernorm",
    "blk.*.post_ffw_norm": "model.layers.*.post_feedforward_layernorm",
}
GEMMA4_NAMES = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "blk.*.inp_gate": "model.layers.*.per_layer_input_gate",
    "blk.*.proj": "model.layers.*.per_layer_projection",
    "blk.*.post_norm": "model.layers.*.post_per_layer_input_norm",
    "blk.*.layer_output_scale": "model.layers.*.layer_scalar",
    "blk.*.ffn_gate_inp": "model.layers.*.router",
    "blk.*.ffn_gate_up_exps": "model.layers.*.experts.gate_up_proj",
    "blk.*.ffn_down_exps": "model.layers.*.experts.down_proj",
    "blk.*.ffn_down_exps.scale": "model.layers.*.router.per_expert_scale",
    "blk.*.post_ffw_norm_1": "model.layers.*.post_feedforward_layernorm_1",
    "blk.*.pre_ffw_norm_2": "model.layers.*.pre_feedforward_layernorm_2",
    "blk.*.post_ffw_norm_2": "model.layers.*.post_feedforward_layernorm_2",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.*.attn_norm": "transformer.h.*.ln_1",
    "blk.*.attn_qkv": "transformer.h.*.attn.c_attn",
    "blk.*.attn_output": "transformer.h.*.attn.c_proj",
    "blk.*.ffn_norm": "transformer.h.*.ln_2",
    "blk.*.ffn_up": "transformer.h.*.mlp.c_fc",
    "blk.*.ffn_down": "transformer.h.*.mlp.c_proj",
}


@dataclass(frozen=True)
class Architecture:
    """How a `general.architecture` is read. Another one is another row of ARCHITECTURES."""

    model_type: str
    """Hugging Face's name, a key of litmini.models.FAMILIES."""
    config: Callable[[Settings], Any]
    """The family's Config."""
    names: dict[str, str]
    """GGUF's tensor names -> those of the family's model, without .weight and .bias, with * for the layer's number."""
    interleaved: tuple[str, ...] = ()
    """Tensors whose rows are stored in pairs, for interleaved rotary embedding."""
    consumed: tuple[str, ...] = ()
    """Tensors that `config` has turned into settings."""
    norms_plus_one: bool = False
    """GGUF stores 1 + weight of every norm, Hugging Face the weight."""


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, NAMES, ("blk.*.attn_q", "blk.*.attn_k"), ("rope_freqs.weight",)),
    "qwen2": Architecture("qwen2", _qwen2, NAMES),
    "qwen3": Architecture("qwen3", _qwen3, NAMES | HEAD_NORMS),
    "gemma": Architecture("gemma", _gemma, NAMES, norms_plus_one=True),
    "gemma2": Architecture("gemma2", _gemma2, NAMES | FOUR_NORMS, norms_plus_one=True),
    "gemma3": Architecture("gemma3_text", _gemma3, NAMES | HEAD_NORMS | FOUR_NORMS, norms_plus_one=True),
    "gemma4": Architecture(
        "gemma4_text", _gemma4, NAMES | HEAD_NORMS | FOUR_NORMS | GEMMA4_NAMES, consumed=("rope_freqs.weight",)
    ),
    "gpt2": Architecture("gpt2", _gpt2, GPT2_NAMES),
}
