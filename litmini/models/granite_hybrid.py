"""Granite 4 (350M to 32B): with Mamba2 layers among a few attention layers (H), or all attention; dense and with experts.

Features: most layers are Mamba2 (a causal depthwise convolution, a selective state space model, an RMSNorm of the gated
output), a few have grouped-query attention without positions; in models without Mamba2 all have attention, with rotary
embedding (half-split layout, whole head). Each layer has a SwiGLU MLP whose first linear makes gate and up; with experts,
their outputs are added to it: a router sends each token to those of highest logit, weighted by the softmax of these. Four
multipliers: of the embedding, of attention scores, of what is added to the residual stream, and a divisor of logits.
RMSNorm, no biases but that of the convolution, head tied to the embedding. In training, a balance loss keeps all experts
in use.

Differs from qwen3_5.py in the recurrent layers, which have no delta rule and no normalized keys, in the multipliers, and
in attention, which is plain. `from_hf` / `to_hf` rename what belongs to experts. Adapters go over `in_proj` and `out_proj`
of Mamba2 as over other linears.

Papers: Mamba2 (arXiv 2405.21060), Power Scheduler (2408.13359) for the multipliers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields, write_rope
from litmini.ops.attention import Mask, advance, attend, document_ids, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.experts import aligned, balance_loss
from litmini.ops.initialize import initialize
from litmini.ops.linear_attention import Runs, causal_conv, make_runs
from litmini.ops.norms import rms_norm_llama, swiglu
from litmini.ops.recompute import recomputed
from litmini.ops.state_space import state_space_scan


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    shared_dim: int  # of the MLP that every token goes through
    attention: tuple[int, ...]  # the layers with attention; the others are Mamba2
    attention_multiplier: float  # of scores
    residual_multiplier: float  # of what is added to the residual stream
    logits_divisor: float
    embedding_multiplier: float = 12.0
    has_rotary: bool = False
    rope_theta: float = 10_000.0
    ssm_heads: int = 48
    ssm_head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1  # of heads with the same inputs b and c
    kernel_size: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    ffn_dim: int = 512  # of one expert
    n_experts: int = 0
    n_active: int = 0  # experts that a token goes to
    balance_coef: float = 0.001  # of the balance loss
    max_positions: int = 131072
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.has_rotary and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.ssm_heads % self.n_groups:
            raise ValueError(f"ssm_heads {self.ssm_heads} is not a multiple of n_groups {self.n_groups}")
        if self.ssm_heads * self.ssm_head_dim % self.dim:
            raise ValueError(
                f"ssm_heads {self.ssm_heads} x ssm_head_dim {self.ssm_head_dim} is not a multiple of dim {self.dim}"
            )
        if self.n_experts and not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"n_active {self.n_active} is outside 1..n_experts {self.n_experts}")
        if not set(self.attention) <= set(range(self.n_layers)):
            raise ValueError(f"attention {self.attention} names layers outside 0..{self.n_layers - 1}")


PRESETS = {  # vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, shared_dim, attention, attention_multiplier,
    # residual_multiplier, logits_divisor
    "tiny": Config(  # for tests
        *(512, 64, 3, 4, 2, 16, 64, (1,), 0.125, 2.0, 0.5),
        embedding_multiplier=0.5,
        ssm_heads=8,
        ssm_head_dim=16,
        d_state=16,
        n_groups=2,
        ffn_dim=64,
        n_experts=8,
        n_active=2,
        max_positions=256,
    ),
    "ibm-granite/granite-4.0-350m": Config(  # all attention
        *(100352, 1024, 28, 16, 4, 64, 2048, tuple(range(28)), 0.015625, 0.263, 4.0),
        has_rotary=True,
        ssm_heads=32,  # of no layer, but transformers checks it
        max_positions=32768,
    ),
    "ibm-granite/granite-4.0-1b": Config(  # wider, deeper
        *(100352, 2048, 40, 16, 4, 128, 4096, tuple(range(40)), 0.0078125, 0.22, 8.0), has_rotary=True, ssm_heads=64
    ),
    "ibm-granite/granite-4.0-micro": Config(  # wider
        *(100352, 2560, 40, 40, 8, 64, 8192, tuple(range(40)), 0.015625, 0.22, 10.0),
        has_rotary=True,
        rope_theta=1e7,
        ssm_heads=80,
    ),
    "ibm-granite/granite-4.0-h-350m": Config(
        *(100352, 768, 32, 12, 4, 64, 2048, (10, 13, 17, 27), 0.015625, 0.246, 3.0),
        ssm_head_dim=32,
        max_positions=32768,
    ),
    "ibm-granite/granite-4.0-h-1b": Config(  # wider, deeper
        *(100352, 1536, 40, 12, 4, 128, 4096, (5, 15, 25, 35), 0.0078125, 0.22, 6.0)
    ),
    "ibm-granite/granite-4.0-h-micro": Config(  # wider
        *(100352, 2048, 40, 32, 8, 64, 8192, (5, 15, 25, 35), 0.015625, 0.22, 8.0), ssm_heads=64
    ),
    "ibm-granite/granite-4.0-h-tiny": Config(  # 64 experts
        *(100352, 1536, 40, 12, 4, 128, 1024, (5, 15, 25, 35), 0.0078125, 0.22, 6.0), n_experts=64, n_active=6
    ),
    "ibm-granite/granite-4.0-h-small": Config(  # wider, 72 experts
        *(100352, 4096, 40, 32, 8, 128, 1536, (5, 15, 25, 35), 0.0078125, 0.22, 16.0),
        ssm_heads=128,
        ffn_dim=768,
        n_experts=72,
        n_active=10,
    ),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 32000),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", None),  # none: n_heads
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "shared_dim": ("shared_intermediate_size", 1024),
    "attention_multiplier": ("attention_multiplier", 1.0),
    "residual_multiplier": ("residual_multiplier", 1.0),
    "logits_divisor": ("logits_scaling", 1.0),
    "embedding_multiplier": ("embedding_multiplier", 1.0),
    "ssm_heads": ("mamba_n_heads", 128),
    "d_state": ("mamba_d_state", 256),
    "n_groups": ("mamba_n_groups", 1),
    "kernel_size": ("mamba_d_conv", 4),
    "conv_bias": ("mamba_conv_bias", True),
    "proj_bias": ("mamba_proj_bias", False),
    "ffn_dim": ("intermediate_size", 11008),
    "balance_coef": ("router_aux_loss_coef", 0.001),
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "position_embedding_type": (None, "nope", "rope"),
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "normalization_function": "rmsnorm",
    "attention_bias": False,
    "attention_dropout": False,
}
NO_LIMITS: tuple[Any, ...] = (None, [0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}])
"""Of step sizes, as JSON, Python and transformers 5 write them."""
LAYER_TYPES = {"mamba": False, "linear_attention": False, "attention": True, "full_attention": True}
"""A layer's type as transformers 4 and 5 write it -> whether it has attention."""


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope, fields = read_rope(hf), read_fields(HF, hf)
    types = read_value(hf, "layer_types", list, None) or read_value(hf, "layers_block_type", list, None)
    types = types or ["mamba"] * fields["n_layers"]
    are_known = len(types) == fields["n_layers"] and all(isinstance(t, str) and t in LAYER_TYPES for t in types)
    width = read_fields({"expand": ("mamba_expand", 2)}, hf)["expand"] * fields["dim"]
    head_dim = hf.get("mamba_d_head", "auto")
    if head_dim in ("auto", None):
        head_dim = width // fields["ssm_heads"]
    fits = type(head_dim) is int and head_dim > 0 and head_dim * fields["ssm_heads"] == width
    checks = {"mamba_d_head": fits, "time_step_limit": hf.get("time_step_limit") in NO_LIMITS}
    refuse("granite_hybrid.py", hf, rope, IMPLEMENTED, layer_types=are_known, **checks)
    return Config(
        **fields,
        attention=tuple(i for i, kind in enumerate(types) if LAYER_TYPES[kind]),
        has_rotary=hf.get("position_embedding_type") == "rope",
        rope_theta=rope["rope_theta"],
        ssm_head_dim=head_dim,
        n_experts=read_value(hf, "num_local_experts", int, 8) or 0,
        n_active=read_value(hf, "num_experts_per_tok", int, 2) or 0,
    )


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **write_fields(HF, config),
        **write_rope(config.rope_theta),
        "layer_types": ["attention" if i in config.attention else "mamba" for i in range(config.n_layers)],
        "position_embedding_type": "rope" if config.has_rotary else "nope",
        "mamba_d_head": config.ssm_head_dim,
        "mamba_expand": config.ssm_heads * config.ssm_head_dim // config.dim,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.n_active,
        "hidden_act": "silu",
        "attention_bias": False,
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_llama(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """The norm of x * silu(gate), of each of `n_groups` parts by itself."""

    def __init__(self, dim: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = recomputed(self._norm, x, gate, self.weight)
        return y

    def _norm(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        h = (x.float() * F.silu(gate.float())).unflatten(-1, (self.n_groups, -1))  # (B, T, n_groups, dim / n_groups)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return weight * h.flatten(-2).to(x.dtype)


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
        self.scale = config.attention_multiplier
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask, self.scale)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Mamba2(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim, self.d_state, self.n_groups = config.ssm_head_dim, config.d_state, config.n_groups
        self.width = config.ssm_heads * config.ssm_head_dim
        self.state_size = self.width * config.d_state  # values that each token reads and changes
        conv_width = self.width + 2 * config.n_groups * config.d_state
        self.in_proj = nn.Linear(config.dim, self.width + conv_width + config.ssm_heads, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(conv_width, conv_width, config.kernel_size, groups=conv_width, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(config.ssm_heads))
        self.A_log = nn.Parameter(torch.zeros(config.ssm_heads))
        self.D = nn.Parameter(torch.ones(config.ssm_heads))
        self.norm = GatedRMSNorm(self.width, config.n_groups, config.norm_eps)
        self.out_proj = nn.Linear(self.width, config.dim, bias=config.proj_bias)

    def forward(self, x: Tensor, runs: Runs, cache: Any) -> Tensor:
        n_heads, group_width = len(self.A_log), self.n_groups * self.d_state
        gate, xbc, dt = self.in_proj(x).split((self.width, self.width + 2 * group_width, n_heads), -1)
        tail = state = None
        if cache is not None:
            K = self.conv1d.kernel_size[0]
            sizes = [((K - 1, xbc.shape[-1]), xbc.dtype), ((n_heads, self.d_state, self.head_dim), torch.float32)]
            tail, state = old = cache.read(runs.positions, sizes)
        xbc, tail = causal_conv(xbc, self.conv1d.weight, runs, tail, self.conv1d.bias)
        values, b, c = F.silu(xbc).split((self.width, group_width, group_width), -1)
        values = values.unflatten(-1, (-1, self.head_dim))  # (B, T, ssm_heads, ssm_head_dim)
        b, c = b.unflatten(-1, (-1, self.d_state)), c.unflatten(-1, (-1, self.d_state))  # (B, T, n_groups, d_state)
        dt = F.softplus(dt.float() + self.dt_bias.float())  # (B, T, ssm_heads)
        a = -self.A_log.float().exp()  # (ssm_heads,)
        y, state = state_space_scan(values, dt, a, b, c, self.D, runs, state)  # (B, T, ssm_heads, ssm_head_dim)
        if cache is not None:
            cache.write(old, [tail, state])
        return self.out_proj(self.norm(y.flatten(2), gate))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_linear = nn.Linear(config.dim, 2 * config.shared_dim, bias=False)  # gate, then up
        self.output_linear = nn.Linear(config.shared_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.input_linear(x).chunk(2, dim=-1)  # (B, T, shared_dim) each
        return self.output_linear(swiglu(gate, up))


class Router(nn.Module):
    """Chooses the experts of each token. No `nn.Linear`: adapters and 4-bit leave it alone, as in transformers 5."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_active = config.n_active
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for x (N, dim) the logits (N, n_experts), and weights (N, n_active) of the chosen experts."""
        logits = F.linear(x, self.weight)
        highest, chosen = logits.float().topk(self.n_active)
        return logits, highest.softmax(-1).to(logits.dtype), chosen


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
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, dim), and the router's logits (B * T, n_experts)."""
        rows = x.flatten(0, 1)  # (B * T, dim)
        logits, weights, chosen = self.router(rows)
        y = self.experts(rows.to(logits.dtype), weights, chosen)  # grouped_mm ignores autocast, the router does not
        return y.view_as(x), logits


class Block(nn.Module):
    def __init__(self, config: Config, has_attention: bool) -> None:
        super().__init__()
        self.has_attention, self.residual_multiplier = has_attention, config.residual_multiplier
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        if has_attention:
            self.self_attn = Attention(config)
        else:
            self.mamba = Mamba2(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.block_sparse_moe = SparseMoE(config) if config.n_experts else None
        self.shared_mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask, runs: Runs, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, T, dim), and the router's logits (B * T, n_experts); None without experts."""
        h, logits = self.input_layernorm(x), None
        h = self.self_attn(h, rope, mask, cache) if self.has_attention else self.mamba(h, runs, cache)
        x = x + h * self.residual_multiplier
        h = self.post_attention_layernorm(x)
        y = self.shared_mlp(h)
        if self.block_sparse_moe is not None:
            of_experts, logits = self.block_sparse_moe(h)
            y = of_experts + y
        return x + y * self.residual_multiplier, logits


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config, i in config.attention) for i in range(config.n_layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings, linears, router and experts: normal, std 0.02; convolutions: as torch's; their biases: 0; norms, step
        sizes before the softplus, and D: 1; decays: 1, 2, 3, ...
        """
        constants = {"norm": 1.0, "dt_bias": 1.0, "bias": 0.0, "A_log": 0.0, "mamba.D": 1.0}
        initialize(self, constants, generator, stds={"conv1d": (3 * self.config.kernel_size) ** -0.5})
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("A_log"):
                    parameter.copy_(torch.arange(1, len(parameter) + 1, device=parameter.device).log())

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets.

        With experts, in training mode, the loss is cross entropy + targets * balance_coef * balance loss of this batch, as
        transformers computes it with `output_router_logits`; in evaluation mode it is cross entropy alone. Padding is not
        balanced.
        """
        config = self.config
        positions = advance(tokens, positions, cache)
        mask, runs = make_mask(positions, documents, cache, None), make_runs(positions, documents, cache)
        x = self.model["embed_tokens"](tokens) * config.embedding_multiplier  # (B, T, dim)
        rope = rotary(positions, config, x.dtype) if config.has_rotary else None
        routing = []  # each layer's router logits, (B * T, n_experts)
        for i, block in enumerate(self.model["layers"].children()):
            layer_cache = None if cache is None else cache[i] if i in config.attention else cache.state(i)
            x, logits = block(x, rope, mask, runs, layer_cache)
            routing.append(logits)
        x = self.model["norm"](x) / config.logits_divisor
        if labels is None:
            return self.lm_head(x)  # (B, T, vocab_size)
        loss, n_targets = linear_cross_entropy(x, self.lm_head, labels)
        is_balanced = config.n_experts > 0 and config.balance_coef > 0
        if self.training and is_balanced and loss.dim() == 0:  # other heads return no summed loss
            real = positions >= 0 if documents is None else document_ids(documents) > 0
            loss = loss + n_targets * config.balance_coef * balance_loss(routing, config.n_active, real)
        return loss, n_targets


RENAMED = {  # in a block: name in Hugging Face's files -> name in the model
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj.weight",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj.weight",
    "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
}


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's tensors as the model names them."""
    for name, tensor in tensors:
        own = _renamed(name, RENAMED)
        yield own, aligned(tensor) if ".experts." in own else tensor


def to_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors as Hugging Face's files name them."""
    back = {ours: theirs for theirs, ours in RENAMED.items()}
    return ((_renamed(name, back), tensor) for name, tensor in tensors)


def _renamed(name: str, endings: dict[str, str]) -> str:
    return next((name.removesuffix(old) + new for old, new in endings.items() if name.endswith(old)), name)
