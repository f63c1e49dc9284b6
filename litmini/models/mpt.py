"""MPT of MosaicML: 7B and 30B, base, instruct, chat and StoryWriter, in one file.

Features: LayerNorm without bias before attention and MLP, no positional embedding but ALiBi (each head takes its own
slope times the distance off its scores), q, k and v in one linear, optionally clipped, GELU MLP, no biases at all, head
tied to the embedding. Module names and shapes are Hugging Face's, so checkpoints load as they are.

Differs from llama.py in ALiBi for rotary, LayerNorm for RMSNorm, fused Wqkv for three linears, no grouped attention, and
an MLP without gate, four times as wide as the model.

StoryWriter sets alibi_bias_max to 16: MosaicML's code, vLLM and this file respect it; transformers 5.23 computes with 8.

Papers: MPT-7B (databricks.com/blog/mpt-7b), ALiBi (arXiv 2108.12409).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_value, refuse, write_fields
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    max_positions: int  # of pretraining; ALiBi itself goes on beyond
    alibi_max: int = 8  # the steepest head takes 2 ** -(8 / n_heads) per position, the flattest 2 ** -8
    clip_qkv: float | None = None  # q, k and v are clamped to [-clip_qkv, clip_qkv]
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv {self.clip_qkv} is not above 0")

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, max_positions
    "tiny": Config(512, 64, 2, 4, 256),  # for tests
    "mosaicml/mpt-7b": Config(50432, 4096, 32, 32, 2048),
    "mosaicml/mpt-7b-instruct": Config(50432, 4096, 32, 32, 2048),
    "mosaicml/mpt-7b-chat": Config(50432, 4096, 32, 32, 2048),
    "mosaicml/mpt-7b-storywriter": Config(50432, 4096, 32, 32, 65536, alibi_max=16, clip_qkv=6.0),  # flatter slopes
    "mosaicml/mpt-30b": Config(50432, 7168, 48, 64, 8192),  # wider and deeper; heads of 112
    "mosaicml/mpt-30b-instruct": Config(50432, 7168, 48, 64, 8192),
    "mosaicml/mpt-30b-chat": Config(50432, 7168, 48, 64, 8192),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "max_positions": ("max_seq_len", 2048),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied": ("tie_word_embeddings", True),
}
ATTENTION: Table = {  # the same, in its entry `attn_config`
    "alibi_max": ("alibi_bias_max", 8),
    "clip_qkv": ("clip_qkv", None, float),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "attn_config.attn_type": "multihead_attention",
    "attn_config.alibi": True,  # with it, MosaicML's code ignores learned_pos_emb
    "attn_config.rope": False,
    "attn_config.qk_ln": False,
    "attn_config.qk_gn": False,
    "attn_config.prefix_lm": False,
    "attn_config.softmax_scale": None,
    "attn_config.attn_uses_sequence_id": False,
    "attn_config.sliding_window_size": -1,
    "attn_config.attn_pdrop": False,
    "resid_pdrop": False,
    "emb_pdrop": False,
    "expansion_ratio": 4,
    "norm_type": ("layernorm", "low_precision_layernorm"),
    "no_bias": True,
    "logit_scale": None,
    "embedding_fraction": 1.0,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json, of transformers or of MosaicML's own code.

    Raises:
        ValueError: it asks for something that this file does not implement.
    """
    attn = read_value(hf, "attn_config", dict, None) or {}
    found = hf | {f"attn_config.{key}": value for key, value in attn.items()}
    mlp = (read_value(hf, "ffn_config", dict, None) or {}).get("ffn_type", "mptmlp") == "mptmlp"
    refuse("mpt.py", found, {}, IMPLEMENTED, ffn_config=mlp)
    fields = read_fields(HF, hf) | read_fields(ATTENTION, attn)
    fields["clip_qkv"] = fields["clip_qkv"] or None  # 0 is none, too
    return Config(**fields)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        **write_fields(HF, config),
        "expansion_ratio": 4,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_uses_sequence_id": False,
            "alibi": True,
            **write_fields(ATTENTION, config),
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "learned_pos_emb": False,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
    }


def alibi_slopes(config: Config, device: torch.device) -> Tensor:
    """What each head takes off its scores per position of distance, (n_heads,) fp32."""
    n = 2 ** math.ceil(math.log2(config.n_heads))  # the next power of two
    slopes = 1.0 / 2 ** (torch.arange(1, n + 1, dtype=torch.float32, device=device) * (config.alibi_max / n))
    if n != config.n_heads:  # every second slope first, then those between, as far as there are heads
        slopes = torch.cat((slopes[1::2], slopes[::2]))[: config.n_heads]
    return slopes


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.clip_qkv = config.clip_qkv
        self.Wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # all of q, then all of k, then all of v
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, slopes: Tensor, mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        qkv = self.Wqkv(x)  # (B, T, 3 * dim)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)  # each (B, n_heads, T, head_dim)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_heads, S, head_dim)
        y = attend(q, k, v, mask, slopes=slopes)  # (B, n_heads, T, head_dim)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down_proj = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.dim, config.norm_eps, bias=False)
        self.attn = Attention(config)
        self.norm_2 = nn.LayerNorm(config.dim, config.norm_eps, bias=False)
        self.ffn = MLP(config)

    def forward(self, x: Tensor, slopes: Tensor, mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.attn(self.norm_1(x), slopes, mask, cache)
        return x + self.ffn(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.dim)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "norm_f": nn.LayerNorm(config.dim, config.norm_eps, bias=False),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = wte.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embedding and linears: normal, std 0.02; norms: 1."""
        initialize(self, {"norm": 1.0}, generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets."""
        positions = advance(tokens, positions, cache)
        mask = make_mask(positions, documents, cache, None, changes_scores=True)
        x = self.transformer["wte"](tokens)  # (B, T, dim)
        slopes = alibi_slopes(self.config, x.device)
        for i, block in enumerate(self.transformer["blocks"].children()):
            x = block(x, slopes, mask, None if cache is None else cache[i])
        x = self.transformer["norm_f"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
