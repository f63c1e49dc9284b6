"""Qwen 3.5 (dense; also 3.6, 3.8): the text part of 0.8B to 27B, and their base models, in one file.

Features: three of four layers have linear attention (Gated DeltaNet: a causal depthwise convolution over q, k and v, a
recurrent state with decay and delta rule, a gated RMSNorm), every fourth layer has grouped-query attention whose output
is gated by a sigmoid (q_proj makes the gates, too), with RMSNorm on each head of q and k and rotary embedding on a
quarter of the head (half-split layout). RMSNorm multiplies by 1 + weight, but for the gated one. SwiGLU, no biases, head
tied in the smaller models. Weights of the multi-token prediction module (`mtp.`) are not loaded, but carried through.

Differs from qwen3.py in the linear attention, the output gates, the part of the head that is rotated, and 1 + weight.

Papers: Gated Delta Networks (arXiv 2412.06464), Gated Attention (2505.06708).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields, write_rope
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.linear_attention import Runs, causal_conv, gated_delta_rule, make_runs
from litmini.ops.norms import rms_norm, rms_norm_llama, swiglu


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    linear_v_heads: int
    linear_k_heads: int = 16
    linear_v_dim: int = 128
    linear_k_dim: int = 128
    kernel_size: int = 4
    full_every: int = 4  # every so many-th layer has attention, the others linear attention
    head_dim: int = 256
    rotary_pct: float = 0.25  # the fraction of each head that is rotated
    rope_theta: float = 10_000_000.0
    max_positions: int = 262144
    norm_eps: float = 1e-6
    tied: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.linear_v_heads % self.linear_k_heads:
            raise ValueError(
                f"linear_v_heads {self.linear_v_heads} is not a multiple of linear_k_heads {self.linear_k_heads}"
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head_dim {self.head_dim} is {self.rotary_dim}: rotary rotates pairs"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, ffn_dim, linear_v_heads
    "tiny": Config(512, 64, 3, 4, 2, 128, 16, 4, 8, 16, full_every=2, head_dim=32, max_positions=256),  # for tests
    "Qwen/Qwen3.5-0.8B": Config(248320, 1024, 24, 8, 2, 3584, 16, tied=True),
    "Qwen/Qwen3.5-2B": Config(248320, 2048, 24, 8, 2, 6144, 16, tied=True),  # wider
    "Qwen/Qwen3.5-4B": Config(248320, 2560, 32, 16, 4, 9216, 32, tied=True),  # deeper, twice the value heads
    "Qwen/Qwen3.5-9B": Config(248320, 4096, 32, 16, 4, 12288, 32),  # wider, untied from here on
    "Qwen/Qwen3.5-27B": Config(248320, 5120, 64, 24, 4, 17408, 48),  # deeper, three value heads for each key head
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 248320),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 16),
    "n_kv_heads": ("num_key_value_heads", 4),
    "ffn_dim": ("intermediate_size", 12288),
    "linear_v_heads": ("linear_num_value_heads", 32),
    "linear_k_heads": ("linear_num_key_heads", 16),
    "linear_v_dim": ("linear_value_head_dim", 128),
    "linear_k_dim": ("linear_key_head_dim", 128),
    "kernel_size": ("linear_conv_kernel_dim", 4),
    "full_every": ("full_attention_interval", 4),
    "head_dim": ("head_dim", 256),
    "max_positions": ("max_position_embeddings", 32768),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": "default",
    "attention_bias": False,
    "attention_dropout": False,
    "attn_output_gate": True,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf, partial=0.25)
    fields = read_fields(HF, hf)
    types = read_value(hf, "layer_types", list, None)
    if types and "full_attention" in types:  # which count, if both are there
        fields["full_every"] = types.index("full_attention") + 1
    are_regular = types in (None, layer_types(fields["n_layers"], fields["full_every"]))
    refuse("qwen3_5.py", hf, rope, IMPLEMENTED, layer_types=are_regular)
    return Config(**fields, rope_theta=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_pct}
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **write_fields(HF, config),
        **write_rope(config.rope_theta),
        "rope_parameters": rope,
        "layer_types": layer_types(config.n_layers, config.full_every),
        "hidden_act": "silu",
        "attention_bias": False,
    }


def carried(config: Config) -> tuple[str, ...]:
    """Return how the names of tensors begin that are not loaded, but written as they are."""
    return ("mtp.",)


def layer_types(n_layers: int, full_every: int) -> list[str]:
    """Return the kind of each layer, as transformers calls them."""
    return ["linear_attention" if (i + 1) % full_every else "full_attention" for i in range(n_layers)]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class GatedRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return (rms_norm_llama(x, self.weight, self.eps) * F.silu(gate.float())).to(x.dtype)


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
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, 2 * q_dim, bias=False)  # for each head q, then its gate
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q, gate = self.q_proj(x).view(B, T, -1, 2 * self.head_dim).chunk(2, -1)  # (B, T, n_heads, head_dim) each
        q = q.transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)  # each head by itself
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)  # (B, T, n_heads * head_dim)
        return self.o_proj(y * torch.sigmoid(gate.reshape(B, T, -1)))


class GatedDeltaNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.k_dim, self.v_dim = config.linear_k_dim, config.linear_v_dim
        self.k_width = config.linear_k_heads * config.linear_k_dim
        self.v_width = config.linear_v_heads * config.linear_v_dim
        self.state_size = self.v_width * config.linear_k_dim  # values that each token reads and changes
        width = 2 * self.k_width + self.v_width
        self.conv1d = nn.Conv1d(width, width, config.kernel_size, groups=width, bias=False)  # its weight is used
        self.dt_bias = nn.Parameter(torch.ones(config.linear_v_heads))
        self.A_log = nn.Parameter(torch.zeros(config.linear_v_heads))
        self.norm = GatedRMSNorm(config.linear_v_dim, config.norm_eps)
        self.in_proj_qkv = nn.Linear(config.dim, width, bias=False)
        self.in_proj_z = nn.Linear(config.dim, self.v_width, bias=False)
        self.in_proj_b = nn.Linear(config.dim, config.linear_v_heads, bias=False)
        self.in_proj_a = nn.Linear(config.dim, config.linear_v_heads, bias=False)
        self.out_proj = nn.Linear(self.v_width, config.dim, bias=False)

    def forward(self, x: Tensor, runs: Runs, cache: Any) -> Tensor:
        qkv = self.in_proj_qkv(x)  # (B, T, 2 * k_width + v_width)
        tail = state = None
        if cache is not None:
            K, heads = self.conv1d.kernel_size[0], len(self.A_log)
            sizes = [((K - 1, qkv.shape[-1]), qkv.dtype), ((heads, self.k_dim, self.v_dim), torch.float32)]
            tail, state = old = cache.read(runs.positions, sizes)
        qkv, tail = causal_conv(qkv, self.conv1d.weight, runs, tail)
        q, k, v = F.silu(qkv).split((self.k_width, self.k_width, self.v_width), -1)
        q, k = q.unflatten(-1, (-1, self.k_dim)), k.unflatten(-1, (-1, self.k_dim))  # (B, T, linear_k_heads, k_dim)
        v = v.unflatten(-1, (-1, self.v_dim))  # (B, T, linear_v_heads, v_dim)
        beta = torch.sigmoid(self.in_proj_b(x))  # (B, T, linear_v_heads)
        decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        y, state = gated_delta_rule(q, k, v, decay, beta, runs, state)  # (B, T, linear_v_heads, v_dim)
        if cache is not None:
            cache.write(old, [tail, state])
        y = self.norm(y, self.in_proj_z(x).unflatten(-1, (-1, self.v_dim)))
        return self.out_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config, is_linear: bool) -> None:
        super().__init__()
        self.is_linear = is_linear
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        if is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, runs: Runs, cache: Any = None) -> Tensor:
        h = self.input_layernorm(x)
        x = x + (self.linear_attn(h, runs, cache) if self.is_linear else self.self_attn(h, rope, mask, cache))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        types = layer_types(config.n_layers, config.full_every)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config, kind == "linear_attention") for kind in types),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings, linears and convolutions: normal, std 0.02; norms: 0, gated ones 1; decays: exp(-uniform(0.01, 16))."""
        initialize(self, {"linear_attn.norm": 1.0, "norm": 0.0, "dt_bias": 1.0, "A_log": 0.0}, generator)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("A_log"):
                    parameter.uniform_(0.01, 16, generator=generator).log_()

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
        mask, runs = make_mask(positions, documents, cache, None), make_runs(positions, documents, cache)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            is_linear = (i + 1) % self.config.full_every != 0
            layer_cache = None if cache is None else cache.state(i) if is_linear else cache[i]
            x = block(x, rope, mask, runs, layer_cache)
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
