"""Qwen 3 MoE, 30B-A3B and 235B-A22B: Qwen 3 with 128 small experts in place of each MLP.

Features: RMSNorm before attention and experts, RMSNorm on each head of q and k before the rotary embedding (half-split
layout, whole head), heads whose sizes do not add up to the model's, grouped-query attention, no biases, and a router
that sends each token to the eight experts of highest probability, whose SwiGLU outputs are added, weighted by these
probabilities scaled to a sum of 1. In training, a balance loss keeps all experts in use.

Differs from llama.py in the norms of q and k, in Router, Experts and what belongs to them: `Block` also returns its
router's logits, from which `Model` computes the balance loss, and `from_hf` / `to_hf` group the experts of a layer,
which files hold one by one, and split them again. Adapters go over experts where they are named; the router is left
alone. Differs from mixtral.py in those norms, in names and sizes, and in having no windows.

Papers: Qwen3 (arXiv 2505.09388), Switch Transformers (2101.03961) for the balance loss.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, refuse, write_fields, write_rope
from litmini.ops.attention import Mask, advance, attend, document_ids, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.experts import Groups, balance_loss, group_experts, split_experts
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm_llama, swiglu


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int  # of one expert
    max_positions: int
    n_experts: int = 128
    n_active: int = 8  # experts that a token goes to
    normalize: bool = True  # scale the probabilities of a token's experts to a sum of 1
    balance_coef: float = 0.001  # of the balance loss
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"n_active {self.n_active} is outside 1..n_experts {self.n_experts}")


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 32, 64, 256, n_experts=8, n_active=2),  # for tests
    "Qwen/Qwen3-30B-A3B-Base": Config(151936, 2048, 48, 32, 4, 128, 768, 32768),
    "Qwen/Qwen3-30B-A3B": Config(151936, 2048, 48, 32, 4, 128, 768, 40960),  # longer
    "Qwen/Qwen3-235B-A22B": Config(151936, 4096, 94, 64, 4, 128, 1536, 40960),  # wider, deeper
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "ffn_dim": ("moe_intermediate_size", 768),
    "max_positions": ("max_position_embeddings", 32768),
    "n_experts": ("num_experts", 128),
    "n_active": ("num_experts_per_tok", 8),
    "normalize": ("norm_topk_prob", False),
    "balance_coef": ("router_aux_loss_coef", 0.001),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0, null and [], too
    "hidden_act": "silu",
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "attention_dropout": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf)
    refuse("qwen3_moe.py", hf, rope, IMPLEMENTED)
    fields = read_fields(HF, hf)
    if "num_local_experts" in hf:  # as transformers 5 writes it
        fields |= read_fields({"n_experts": "num_local_experts"}, hf)
    return Config(**fields, rope_theta=rope["rope_theta"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **write_fields(HF, config),
        **write_rope(config.rope_theta),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_llama(x, self.weight, self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (head_dim / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)  # each head by itself
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Router(nn.Module):
    """Chooses the experts of each token. No `nn.Linear`: adapters and 4-bit leave it alone, as in transformers 5."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_active = config.n_active
        self.normalize = config.normalize
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for x (N, dim) the logits (N, n_experts), and weights (N, n_active) of the chosen experts."""
        logits = F.linear(x, self.weight)
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.n_active)
        if self.normalize:  # norm_topk_prob; transformers' default is False, all published files say True
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen


class GroupedLinear(nn.Module):
    """One linear for each expert. The rows of x are sorted by expert; those of expert i end before offsets[i]."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.to(x.dtype).mT, offs=offsets)  # (rows, out_features)


class Experts(nn.Module):
    """SwiGLU MLPs, grouped. Tokens are sorted by expert, so that each expert computes all of its own in one matmul."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.gate_up_proj = GroupedLinear(config.n_experts, config.dim, 2 * config.ffn_dim)
        self.down_proj = GroupedLinear(config.n_experts, config.ffn_dim, config.dim)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (N, dim) for x (N, dim), and weights and chosen experts (N, n_active) each."""
        n_active = chosen.shape[1]
        experts, order = chosen.flatten().sort(stable=True)  # (N * n_active,): sorted by expert
        ids = torch.arange(self.n_experts, device=x.device)
        offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)  # (n_experts,); no tokens, no work
        rows = x.index_select(0, order // n_active)  # (N * n_active, dim)
        gate, up = self.gate_up_proj(rows, offsets).chunk(2, dim=-1)  # (N * n_active, ffn_dim) each
        y = self.down_proj(swiglu(gate, up), offsets)  # (N * n_active, dim)
        y = y.index_select(0, order.argsort()).unflatten(0, (-1, n_active))  # (N, n_active, dim), tokens in order again
        return (y * weights[..., None]).sum(1).to(x.dtype)


class SparseMoE(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, dim), and the router's logits (B * T, n_experts)."""
        rows = x.flatten(0, 1)  # (B * T, dim)
        logits, weights, chosen = self.gate(rows)
        y = self.experts(rows.to(logits.dtype), weights, chosen)  # grouped_mm ignores autocast, the router does not
        return y.view_as(x), logits


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SparseMoE(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        y, logits = self.mlp(self.post_attention_layernorm(x))
        return x + y, logits


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings, linears, router and experts: normal, std 0.02; norms: 1."""
        initialize(self, {"norm": 1.0}, generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets.

        In training mode the loss is cross entropy + targets * balance_coef * balance loss of this batch, as transformers
        computes it with `output_router_logits`; in evaluation mode it is cross entropy alone. Padding is not balanced.
        """
        positions = advance(tokens, positions, cache)
        mask = make_mask(positions, documents, cache, window=None)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        routing = []  # each layer's router logits, (B * T, n_experts)
        for i, block in enumerate(self.model["layers"].children()):
            x, logits = block(x, rope, mask, None if cache is None else cache[i])
            routing.append(logits)
        x = self.model["norm"](x)
        if labels is None:
            return self.lm_head(x)  # (B, T, vocab_size)
        loss, n_targets = linear_cross_entropy(x, self.lm_head, labels)
        if self.training and self.config.balance_coef > 0 and loss.dim() == 0:  # other heads return no summed loss
            real = positions >= 0 if documents is None else document_ids(documents) > 0
            loss = loss + n_targets * self.config.balance_coef * balance_loss(routing, self.config.n_active, real)
        return loss, n_targets


def expert_groups(config: Config) -> Groups:
    """Return the linears of an expert, as files name them, that each grouped linear consists of, and their shapes."""
    return {
        "gate_up_proj": (("gate_proj", "up_proj"), (config.ffn_dim, config.dim)),
        "down_proj": (("down_proj",), (config.dim, config.ffn_dim)),
    }


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's tensors as the model has them, with grouped experts."""
    return group_experts(tensors, "mlp.experts", expert_groups(config), config.n_experts)


def to_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors as Hugging Face's files have them, experts one by one."""
    return split_experts(tensors, expert_groups(config))
