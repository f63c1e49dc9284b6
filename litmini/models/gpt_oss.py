"""gpt-oss 20B and 120B: experts in place of each MLP, and attention sinks, in one file.

Features: RMSNorm before attention and experts, multiplied by its weight in fp32, rotary embedding on the whole head
(half-split layout, YaRN), heads whose sizes do not add up to the model's, grouped-query attention with biases and one
sink for each head (a score beside those of the keys, whose value is zero), a sliding window in every second layer, and a
router with a bias that sends each token to its four experts of highest logit, whose outputs are added, weighted by the
softmax of these four. Experts have biases and a SwiGLU of which both factors are clamped, with 1 added to the second. In
training, a balance loss keeps all experts in use. Published weights of experts are in MXFP4; `convert_to_litmini.py`
dequantises them.

Differs from qwen3_moe.py in sinks, biases, windows, YaRN and the experts' activation; the columns of their first matmul
alternate between gate and up. `from_hf` / `to_hf` transpose the experts, which files hold (in, out).

Papers: gpt-oss model card (arXiv 2508.10925), attention sinks (2309.17453), YaRN (2309.00071).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import (
    Table,
    Yarn,
    layer_types,
    read_fields,
    read_rope,
    read_yarn,
    refuse,
    write_fields,
    write_rope,
)
from litmini.ops.attention import Mask, advance, attend, document_ids, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.experts import balance_loss
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm


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
    n_experts: int
    n_active: int = 4  # experts that a token goes to
    window: int = 128  # keys that a query sees, itself included, in every layer but each second
    attn_bias: bool = True
    alpha: float = 1.702  # of the experts' activation
    limit: float = 7.0  # its factors are clamped to it
    balance_coef: float = 0.001  # of the balance loss
    rope_theta: float = 150_000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"n_active {self.n_active} is outside 1..n_experts {self.n_experts}")
        if self.window < 1:
            raise ValueError(f"window {self.window} is below 1")


_YARN = Yarn(32.0, 4096, 0.1 * math.log(32.0) + 1.0, truncate=False)
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions, n_experts
    "tiny": Config(512, 64, 2, 4, 2, 32, 64, 256, 4, n_active=2, window=32, yarn=Yarn(4.0, 64, 1.1, truncate=False)),
    "openai/gpt-oss-20b": Config(201088, 2880, 24, 64, 8, 64, 2880, 131072, 32, yarn=_YARN),
    "openai/gpt-oss-120b": Config(201088, 2880, 36, 64, 8, 64, 2880, 131072, 128, yarn=_YARN),  # deeper, more experts
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 201088),
    "dim": ("hidden_size", 2880),
    "n_layers": ("num_hidden_layers", 36),
    "n_heads": ("num_attention_heads", 64),
    "n_kv_heads": ("num_key_value_heads", 8),  # null: n_heads
    "head_dim": ("head_dim", 64),  # null: dim // n_heads
    "ffn_dim": ("intermediate_size", 2880),
    "max_positions": ("max_position_embeddings", 131072),
    "n_experts": ("num_local_experts", 128),
    "n_active": ("num_experts_per_tok", 4),
    "window": ("sliding_window", 128),
    "attn_bias": ("attention_bias", True),
    "alpha": ("swiglu_alpha", 1.702),
    "limit": ("swiglu_limit", 7.0),
    "balance_coef": ("router_aux_loss_coef", 0.001),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tied": ("tie_word_embeddings", False),
}
ROPE = {  # where config.json has no rotary settings
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "yarn"),
    "partial_rotary_factor": 1.0,
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling")
    rope = read_rope(hf if given else {**hf, "rope_parameters": ROPE}, theta=150_000.0)
    fields = read_fields(HF, hf)
    kinds = layer_types(fields["n_layers"], full_every=2)
    refuse("gpt_oss.py", hf, rope, IMPLEMENTED, truncate=True, layer_types=(hf.get("layer_types") or kinds) == kinds)
    return Config(**fields, rope_theta=rope["rope_theta"], yarn=read_yarn(rope, fields["max_positions"]))


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **write_fields(HF, config),
        **write_rope(config.rope_theta, config.yarn),
        "hidden_act": "silu",
        "layer_types": layer_types(config.n_layers, full_every=2),
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (head_dim / 2,)
    attention_factor = 1.0
    if y := config.yarn:
        # the pair of the head whose frequency makes so many turns within the original length
        first, last = (
            config.head_dim * math.log(y.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (y.beta_fast, y.beta_slow)
        )
        if y.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        pairs = torch.arange(config.head_dim // 2, dtype=torch.float32, device=positions.device)
        stretched = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)  # 0: kept, 1: all of it
        frequencies = frequencies * (1 - stretched) + frequencies / y.factor * stretched
        attention_factor = y.attention_factor
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.attn_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.attn_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.attn_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.attn_bias)
        self.sinks = nn.Parameter(torch.zeros(config.n_heads))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask, sinks=self.sinks)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Router(nn.Module):
    """Chooses the experts of each token. No `nn.Linear`: adapters and 4-bit leave it alone, as in transformers 5."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_active = config.n_active
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.bias = nn.Parameter(torch.zeros(config.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for x (N, dim) the logits (N, n_experts), and weights (N, n_active) of the chosen experts."""
        logits = F.linear(x, self.weight, self.bias)
        highest, chosen = logits.topk(self.n_active)
        return logits, highest.softmax(-1), chosen


class GroupedLinear(nn.Module):
    """One linear for each expert. The rows of x are sorted by expert; those of expert i end before offsets[i]."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.to(x.dtype).mT, offs=offsets)


class Experts(nn.Module):
    """MLPs, grouped. Tokens are sorted by expert, so that each expert computes all of its own in one matmul."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_experts, self.alpha, self.limit = config.n_experts, config.alpha, config.limit
        self.gate_up_proj = GroupedLinear(config.n_experts, config.dim, 2 * config.ffn_dim)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(config.n_experts, 2 * config.ffn_dim))
        self.down_proj = GroupedLinear(config.n_experts, config.ffn_dim, config.dim)
        self.down_proj_bias = nn.Parameter(torch.zeros(config.n_experts, config.dim))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (N, dim) for x (N, dim), and weights and chosen experts (N, n_active) each."""
        n_active = chosen.shape[1]
        experts, order = chosen.flatten().sort(stable=True)  # (N * n_active,): sorted by expert
        ids = torch.arange(self.n_experts, device=x.device)
        offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)  # (n_experts,); no tokens, no work
        rows = x.index_select(0, order // n_active)  # (N * n_active, dim)
        both = self.gate_up_proj(rows, offsets) + self.gate_up_proj_bias.to(x.dtype).index_select(0, experts)
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)  # (N * n_active, ffn_dim) each: they alternate
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        y = self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.alpha)), offsets)  # (N * n_active, dim)
        y = y + self.down_proj_bias.to(x.dtype).index_select(0, experts)
        y = y.index_select(0, order.argsort()).unflatten(0, (-1, n_active))  # (N, n_active, dim), tokens in order again
        return (y * weights[..., None]).sum(1).to(x.dtype)


class SparseMoE(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, dim), and the router's logits (B * T, n_experts)."""
        rows = x.flatten(0, 1)  # (B * T, dim)
        logits, weights, chosen = self.router(rows)
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
        """Embeddings, linears, router and experts: normal, std 0.02; biases and sinks: 0; norms: 1."""
        initialize(self, {"bias": 0.0, "sinks": 0.0, "norm": 1.0}, generator)

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
        full, local = (
            make_mask(positions, documents, cache, window, changes_scores=True) for window in (None, self.config.window)
        )
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        routing = []  # each layer's router logits, (B * T, n_experts)
        for i, block in enumerate(self.model["layers"].children()):
            x, logits = block(x, rope, full if i % 2 else local, None if cache is None else cache[i])
            routing.append(logits)
        x = self.model["norm"](x)
        if labels is None:
            return self.lm_head(x)  # (B, T, vocab_size)
        loss, n_targets = linear_cross_entropy(x, self.lm_head, labels)
        if self.training and self.config.balance_coef > 0 and loss.dim() == 0:  # other heads return no summed loss
            real = positions >= 0 if documents is None else document_ids(documents) > 0
            loss = loss + n_targets * self.config.balance_coef * balance_loss(routing, self.config.n_active, real)
        return loss, n_targets


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's tensors as the model has them: experts are (n_experts, out, in)."""
    for name, tensor in tensors:
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and tensor.dim() == 3:
            yield f"{name}.weight", tensor.mT.contiguous()
        else:
            yield name, tensor


def to_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors as Hugging Face's files have them: experts are (n_experts, in, out)."""
    for name, tensor in tensors:
        if name.endswith((".experts.gate_up_proj.weight", ".experts.down_proj.weight")):
            yield name.removesuffix(".weight"), tensor.mT.contiguous()
        else:
            yield name, tensor
