"""GPT-2, 124M to 1.5B, and models of its shape such as nanoGPT's.

Features: learned positions added to the embedding, LayerNorm with bias before attention and MLP, q, k and v from one
fused linear, no grouped-query attention, GELU (tanh form), biases in every linear, head tied to the embedding.

Differs from llama.py in: positions (a table of `max_positions` rows, not rotary), norm, the fused linear, the MLP without
gate, biases, smaller initial weights where a block ends. Hugging Face keeps these linears as "Conv1D", (in, out):
`from_hf` and `to_hf` transpose them. While training, dropout (0.1 in the published files) on the embedding, on the weights
of attention, and on what attention and MLP add.

Paper: Language Models are Unsupervised Multitask Learners (Radford et al. 2019).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, refuse, write_fields
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
    max_positions: int
    norm_eps: float = 1e-5
    tied: bool = True
    embd_dropout: float = 0.0  # while training: on the sum of embeddings
    attn_dropout: float = 0.0  # on the weights of attention
    resid_dropout: float = 0.0  # on the outputs of attention and MLP

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


PUBLISHED: dict[str, Any] = {"embd_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1}
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 256, 256),  # for tests
    "openai-community/gpt2": Config(50257, 768, 12, 12, 3072, 1024, **PUBLISHED),
    "openai-community/gpt2-medium": Config(50257, 1024, 24, 16, 4096, 1024, **PUBLISHED),  # wider, twice as deep
    "openai-community/gpt2-large": Config(50257, 1280, 36, 20, 5120, 1024, **PUBLISHED),
    "openai-community/gpt2-xl": Config(50257, 1600, 48, 25, 6400, 1024, **PUBLISHED),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing); the same in transformers 4 and 5
    "vocab_size": "vocab_size",
    "dim": ("n_embd", 768),
    "n_layers": ("n_layer", 12),
    "n_heads": ("n_head", 12),
    "ffn_dim": ("n_inner", None),  # none: 4 * dim
    "max_positions": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "embd_dropout": ("embd_pdrop", 0.1),
    "attn_dropout": ("attn_pdrop", 0.1),
    "resid_dropout": ("resid_pdrop", 0.1),
    "tied": ("tie_word_embeddings", True),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    refuse("gpt2.py", hf, {}, IMPLEMENTED)
    fields = read_fields(HF, hf)
    fields["ffn_dim"] = fields["ffn_dim"] or 4 * fields["dim"]
    return Config(**fields)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **write_fields(HF, config),
        "n_ctx": config.max_positions,  # the older name
        "activation_function": "gelu_new",
    }


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attn_dropout
        self.c_attn = nn.Linear(config.dim, 3 * config.dim)
        self.c_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        parts = self.c_attn(x).chunk(3, dim=-1)  # first all heads of q, then of k, then of v
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in parts)  # (B, n_heads, T, head_dim)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_heads, S, head_dim)
        y = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)  # (B, n_heads, T, head_dim)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.dim, config.ffn_dim)
        self.c_proj = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.dim)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.max_positions, config.dim),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": nn.LayerNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = wte.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02, divided by sqrt(2 n_layers) in c_proj; biases: 0; norms: 1."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)  # 2 n_layers of c_proj add up in the residual stream
        initialize(self, {"bias": 0.0, "ln_": 1.0}, generator, stds={"c_proj": residual})

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets."""
        stop = tokens.shape[1] + (0 if cache is None else cache.length)
        if positions is None and stop > self.config.max_positions:  # else a GPU would stop in the middle of a kernel
            raise ValueError(f"{stop} tokens, but there are learned positions for {self.config.max_positions}")
        positions = advance(tokens, positions, cache)
        mask = make_mask(positions, documents, cache, window=None)
        # (B, T, dim); padding has no row in the table: any will do, no real token sees it
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions.clamp(min=0))
        x = F.dropout(x, self.config.embd_dropout, self.training)
        for i, block in enumerate(self.transformer["h"].children()):
            x = block(x, mask, None if cache is None else cache[i])
        x = self.transformer["ln_f"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)


CONV1D = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors as the model has them; also of the first files, which lack `transformer.` in names."""
    for name, tensor in tensors:
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, in old files
            continue
        name = name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"
        yield name, tensor.T.contiguous() if name.endswith(CONV1D) else tensor


def to_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """The way back: Conv1D keeps its weight as (in, out)."""
    for name, tensor in tensors:
        yield name, tensor.T.contiguous() if name.endswith(CONV1D) else tensor
