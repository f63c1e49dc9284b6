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
from litmini.importers.gguf.reader import Metadata, StoredTensor
from litmini.models import gemma, gemma2, gemma3, gpt2, llama, qwen2, qwen3
from litmini.models.hf_config import MAX_INT, MAX_LAYERS


class Settings:
    """The settings of a file's architecture. Those that are never read are refused at the end."""

    def __init__(self, metadata: Metadata, tensors: dict[str, StoredTensor], architecture: str) -> None:
        self.metadata, self.architecture, self.tensors = metadata, architecture, tensors
        self.expected: dict[str, Any] = {"attention.causal": True}
        self.read = {"vocab_size"}  # some files have it; the rows of the embedding decide

    def get(self, key: str, default: Any) -> Any:
        """Return a setting, of the type of `default`, which stands for a missing one."""
        full_name = f"{self.architecture}.{key}"
        return self.need(key, type(default)) if full_name in self.metadata.fields else default

    def need(self, key: str, kind: type = int) -> Any:
        self.read.add(key)
        full_name = f"{self.architecture}.{key}"
        value = self.metadata.need(full_name, kind)
        most = MAX_LAYERS if key == "block_count" else MAX_INT
        if kind in (int, float) and not 0 < value <= most:  # NaN is not
            raise UserError(f"{self.metadata.file}: metadata {full_name} is {value:,}; expected above 0, to {most:,}.")
        return value

    def expect(self, **implied: Any) -> None:
        """Allow settings with this value only; __ stands for the dot in a name."""
        self.expected |= {key.replace("__", "."): value for key, value in implied.items()}

    def sizes(self) -> dict[str, Any]:
        """Return what the Config of every family but GPT-2 has in common."""
        dim, n_heads = self.need("embedding_length"), self.need("attention.head_count")
        head_dim = self.get("attention.key_length", dim // n_heads)
        self.expect(attention__value_length=head_dim, rope__dimension_count=head_dim)
        return {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "dim": dim,
            "n_layers": self.need("block_count"),
            "n_heads": n_heads,
            "n_kv_heads": self.get("attention.head_count_kv", n_heads),
            "head_dim": head_dim,
            "ffn_dim": self.need("feed_forward_length"),
            "max_positions": self.need("context_length"),
            "norm_eps": self.need("attention.layer_norm_rms_epsilon", float),
            "tied": "output.weight" not in self.tensors,
        }

    def refuse_the_rest(self) -> None:
        prefix = f"{self.architecture}."
        existing = {key: self.metadata.get(key) for key in self.metadata.fields if key.startswith(prefix)}
        rest = {key: value for key, value in existing.items() if key.removeprefix(prefix) not in self.read}
        unsupported = {k: v for k, v in rest.items() if v not in ("none", self.expected.get(k.removeprefix(prefix), 0))}
        if unsupported:
            listing = ", ".join(f"{key} = {value!r}" for key, value in unsupported.items())
            raise UserError(
                f"{self.metadata.file}: not implemented for GGUF architecture '{self.architecture}': {listing}."
            )


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
    "gpt2": Architecture("gpt2", _gpt2, GPT2_NAMES),
}
