"""GPT-NeoX: Pythia 14M to 12B, and models trained from or like them (Dolly 2, RedPajama-INCITE).

Features: attention and MLP side by side, each with a LayerNorm of its own, both added to the same residual (RedPajama:
one after the other), rotary embedding on the first `rotary_pct` of each head (half-split layout), q, k and v from one
fused linear with each head's three side by side, no grouped-query attention, GELU, biases everywhere but in the
head, which has weights of its own.

Differs from llama.py in: the parallel block, LayerNorm for RMSNorm, part of a head rotated, the fused linear, biases,
MLP without gate. Names are Hugging Face's; `from_hf` only leaves out what old files hold beside the weights.

Papers: GPT-NeoX-20B (arXiv 2204.06745), Pythia (2304.01373).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rotary_pct: float = 0.25  # the fraction of each head that is rotated
    norm_eps: float = 1e-5
    parallel: bool = True  # attention and MLP read the same residual

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head_dim {self.head_dim} is {self.rotary_dim}: rotary rotates pairs"
            )

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    @property
    def tied(self) -> bool:
        return False


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, ffn_dim, max_positions = 2048
    "tiny": Config(512, 64, 2, 4, 256, 256),  # for tests
    "EleutherAI/pythia-14m": Config(50304, 128, 6, 4, 512),
    "EleutherAI/pythia-31m": Config(50304, 256, 6, 8, 1024),  # wider
    "EleutherAI/pythia-70m": Config(50304, 512, 6, 8, 2048),  # wider, heads of 64
    "EleutherAI/pythia-160m": Config(50304, 768, 12, 12, 3072),
    "EleutherAI/pythia-410m": Config(50304, 1024, 24, 16, 4096),
    "EleutherAI/pythia-1b": Config(50304, 2048, 16, 8, 8192),  # heads of 256
    "EleutherAI/pythia-1.4b": Config(50304, 2048, 24, 16, 8192),  # heads of 128
    "EleutherAI/pythia-2.8b": Config(50304, 2560, 32, 32, 10240),  # heads of 80
    "EleutherAI/pythia-6.9b": Config(50432, 4096, 32, 32, 16384),  # heads of 128
    "EleutherAI/pythia-12b": Config(50688, 5120, 36, 40, 20480),
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": Config(50432, 2560, 32, 32, 10240, rotary_pct=1.0, parallel=False),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "parallel": ("use_parallel_residual", True),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "gelu",
    "rope_type": "default",
    "attention_bias": True,
    "attention_dropout": False,
    "hidden_dropout": False,
    "tie_word_embeddings": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    names_of_4 = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    rope = read_rope(hf | {new: read_value(hf, old, float, None) for new, old in names_of_4.items()}, partial=0.25)
    fields = read_fields(HF, hf)
    head_dim = read_value(hf, "head_dim", int, None)
    refuse("gpt_neox.py", hf, rope, IMPLEMENTED, head_dim=head_dim in (None, fields["dim"] // fields["n_heads"]))
    return Config(**fields, rope_theta=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_pct}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **write_fields(HF, config),
        "hidden_act": "gelu",
        "attention_bias": True,
        "rotary_emb_base": config.rope_theta,  # transformers 4's names
        "rotary_pct": config.rotary_pct,
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
    }


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, rotary_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (rotary_dim / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, rotary_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, rotary_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + rotary_dim / 2]) by its angle; return the rest of x (B, heads, T, head_dim) unchanged."""
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    x1, x2 = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-x2, x1), dim=-1) * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim)
        self.dense = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, -1, 3 * self.head_dim).transpose(1, 2)  # q, k and v of a head together
        q, k, v = qkv.chunk(3, dim=-1)  # (B, n_heads, T, head_dim) each
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.dense(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.dim, config.ffn_dim)
        self.dense_4h_to_h = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.input_layernorm = nn.LayerNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.dim, config.norm_eps)  # when parallel, of x itself
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        y = self.attention(self.input_layernorm(x), rope, mask, cache)
        if self.parallel:
            return self.mlp(self.post_attention_layernorm(x)) + y + x
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gpt_neox = nn.ModuleDict(
            {
                "embed_in": nn.Embedding(config.vocab_size, config.dim),
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "final_layer_norm": nn.LayerNorm(config.dim, config.norm_eps),
            }
        )
        self.embed_out = nn.Linear(config.dim, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02; biases: 0; norms: 1."""
        initialize(self, {"bias": 0.0, "norm": 1.0}, generator)

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
        mask = make_mask(positions, documents, cache, window=None)
        x = self.gpt_neox["embed_in"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.gpt_neox["layers"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.gpt_neox["final_layer_norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.embed_out, labels)
        return self.embed_out(x)  # (B, T, vocab_size)


BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")  # of old files


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors without the masks and frequencies that old files hold, too."""
    return ((name, tensor) for name, tensor in tensors if not name.endswith(BUFFERS))
