"""DeepSeek-V3 and R1, and models of their shape: Moonlight-16B-A3B, and GLM-4.7-Flash (`glm4_moe_lite`), in one file.

Features: RMSNorm before attention and MLP; multi-head latent attention: keys and values are made of a latent of each token,
normed between two linears, and queries of another one or, in Moonlight, of the input; each head has a part without
positions and a rotated one (interleaved pairs, YaRN whose factor scales scores, too), which all heads of keys share. The
first layers have a SwiGLU MLP, all others experts, of which a router chooses by sigmoid scores plus a bias of each expert,
in DeepSeek-V3 only from the best groups; their outputs are added, weighted by the scores alone, scaled to a sum, and to
them that of shared experts. No biases, head not tied.

Differs from qwen3_moe.py in the attention, the router, the shared experts and the first layers. The router's biases, which
balance experts, are in fp32, and are not trained; no balance loss is added, as in transformers. A KV cache holds expanded
keys and values, which need no matmuls when they are read, not the latents, which are smaller; values are padded to the
width of keys, since kernels take one width. Multi-token prediction layers, which follow the others, are carried through.

Papers: DeepSeek-V3 (arXiv 2412.19437), DeepSeek-V2 for latent attention (2405.04434), YaRN (2309.00071).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import (
    Table,
    Yarn,
    read_fields,
    read_rope,
    read_value,
    read_yarn,
    refuse,
    write_fields,
    write_rope,
)
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.experts import Groups, group_experts, split_experts
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm_llama, swiglu

LATENT_EPS = 1e-6
"""Of the norms between the linears of latents, whatever `norm_eps` is."""


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    dense_ffn_dim: int  # of the first layers
    ffn_dim: int  # of one expert
    max_positions: int
    n_experts: int
    n_active: int  # experts that a token goes to
    n_shared: int = 1  # experts that every token goes to, as one MLP
    n_dense: int = 1  # first layers, which have an MLP
    n_mtp: int = 1  # multi-token prediction layers in its files, which are not loaded
    n_groups: int = 1  # of experts
    n_active_groups: int = 1  # from which a token's experts come
    q_rank: int | None = None  # width of the latent of queries; none: there is none
    kv_rank: int = 512
    nope_dim: int = 128  # of a head of queries and keys: without positions
    rope_dim: int = 64  # and rotated
    v_dim: int = 128
    normalize: bool = True  # scale the scores of a token's experts to a sum of 1
    route_scale: float = 1.0  # by which they are multiplied then
    rope_theta: float = 10_000.0
    interleaved: bool = True  # neighbours are rotated, not the halves of a head
    yarn: Yarn | None = None
    mscale: float = 0.0  # of YaRN: grows scores with the length
    attn_bias: bool = False
    norm_eps: float = 1e-6
    tied: bool = False
    model_type: str = "deepseek_v3"

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim {self.rope_dim} is odd: rotary embedding rotates pairs")
        if self.v_dim > self.nope_dim + self.rope_dim:
            raise ValueError(
                f"v_dim {self.v_dim} is above that of keys, {self.nope_dim} + {self.rope_dim}: not implemented"
            )
        if self.n_experts % self.n_groups or self.n_experts < 2 * self.n_groups:
            raise ValueError(f"n_experts {self.n_experts} in n_groups {self.n_groups}: expected two or more in each")
        if not 1 <= self.n_active_groups <= self.n_groups:
            raise ValueError(f"n_active_groups {self.n_active_groups} is outside 1..n_groups {self.n_groups}")
        if not 1 <= self.n_active <= (most := self.n_experts // self.n_groups * self.n_active_groups):
            raise ValueError(f"n_active {self.n_active} is outside 1..{most}, the experts of n_active_groups")
        if not 0 <= self.n_dense <= self.n_layers:
            raise ValueError(f"n_dense {self.n_dense} is outside 0..n_layers {self.n_layers}")

    @property
    def head_dim(self) -> int:
        """The mean width of a head's keys and values, by which FLOPs are counted."""
        return (self.nope_dim + self.rope_dim + self.v_dim) // 2


_YARN = Yarn(40.0, 4096, 1.0)
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, dense_ffn_dim, ffn_dim, max_positions, n_experts, n_active
    "tiny": Config(  # for tests
        *(512, 64, 2, 4, 128, 64, 256, 8, 2),
        n_groups=2,
        n_active_groups=2,
        q_rank=64,
        kv_rank=64,
        nope_dim=16,
        rope_dim=16,
        v_dim=16,
        route_scale=1.5,
        yarn=Yarn(4.0, 64, 1.0),
        mscale=1.0,
    ),
    "moonshotai/Moonlight-16B-A3B": Config(
        *(163_840, 2048, 27, 16, 11264, 1408, 8192, 64, 6),
        n_shared=2,
        n_mtp=0,
        route_scale=2.446,
        rope_theta=50_000.0,
        norm_eps=1e-5,
    ),
    # wider values, a latent of queries, longer
    "zai-org/GLM-4.7-Flash": Config(
        *(154_880, 2048, 47, 20, 10240, 1536, 202_752, 64, 4),
        q_rank=768,
        nope_dim=192,
        v_dim=256,
        route_scale=1.8,
        rope_theta=1_000_000.0,
        norm_eps=1e-5,
        model_type="glm4_moe_lite",
    ),
    # wider, deeper, groups, YaRN
    "deepseek-ai/DeepSeek-V3": Config(
        *(129_280, 7168, 61, 128, 18432, 2048, 163_840, 256, 8),
        n_dense=3,
        n_groups=8,
        n_active_groups=4,
        q_rank=1536,
        route_scale=2.5,
        yarn=_YARN,
        mscale=1.0,
    ),
}

HF: Table = {  # field of Config: (key of config.json, DeepSeek-V3's value if it is missing)
    "vocab_size": ("vocab_size", 129_280),
    "dim": ("hidden_size", 7168),
    "n_layers": ("num_hidden_layers", 61),
    "n_heads": ("num_attention_heads", 128),
    "dense_ffn_dim": ("intermediate_size", 18432),
    "ffn_dim": ("moe_intermediate_size", 2048),
    "max_positions": ("max_position_embeddings", 4096),
    "n_experts": ("n_routed_experts", 256),
    "n_active": ("num_experts_per_tok", 8),
    "n_shared": ("n_shared_experts", 1),
    "n_groups": ("n_group", 8),
    "n_active_groups": ("topk_group", 4),
    "kv_rank": ("kv_lora_rank", 512),
    "nope_dim": ("qk_nope_head_dim", 128),
    "rope_dim": ("qk_rope_head_dim", 64),
    "v_dim": ("v_head_dim", 128),
    "normalize": ("norm_topk_prob", True),
    "route_scale": ("routed_scaling_factor", 2.5),
    "interleaved": ("rope_interleave", True),
    "attn_bias": ("attention_bias", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "model_type": "model_type",
}
GLM = {  # what is another value in glm4_moe_lite if it is missing
    "vocab_size": 154_880,
    "hidden_size": 2048,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "max_position_embeddings": 202_752,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "yarn"),
    "partial_rotary_factor": 1.0,
    "attention_dropout": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
FP32 = ("e_score_correction_bias",)
"""How names of tensors end that stay in fp32, whatever the others are in: rounded, they would choose other experts."""


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    is_glm = hf["model_type"] == "glm4_moe_lite"
    hf = {**(GLM if is_glm else {}), **hf}
    rope, fields = read_rope(hf), read_fields(HF, hf)
    mlps = read_value(hf, "mlp_layer_types", list, None) if is_glm else None
    n_dense = (mlps.count("dense") if mlps else 1) if is_glm else read_value(hf, "first_k_dense_replace", int, 3)
    checks = {
        "mlp_layer_types": mlps in (None, _mlp_layer_types(fields["n_layers"], n_dense)),
        "first_k_dense_replace": hf.get("first_k_dense_replace", n_dense) == n_dense,
        "num_key_value_heads": hf.get("num_key_value_heads") in (None, fields["n_heads"]),
        "mscale": True,
        "truncate": True,
    }
    refuse("deepseek_v3.py", hf, rope, IMPLEMENTED, **checks)
    yarn = read_yarn(rope, fields["max_positions"])
    return Config(
        **fields,
        n_dense=n_dense,
        n_mtp=read_value(hf, "num_nextn_predict_layers", int, 1) or 0,
        q_rank=read_value(hf, "q_lora_rank", int, 1536, zero=False),
        rope_theta=rope["rope_theta"],
        yarn=yarn,
        mscale=(read_value(rope, "mscale_all_dim", float, None) or 0.0) if yarn else 0.0,
    )


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    is_glm = config.model_type == "glm4_moe_lite"
    rope = write_rope(config.rope_theta, config.yarn)
    if config.mscale:
        rope |= {key: {**rope[key], "mscale_all_dim": config.mscale} for key in ("rope_scaling", "rope_parameters")}
    mlps = _mlp_layer_types(config.n_layers, config.n_dense)
    return {
        "architectures": ["Glm4MoeLiteForCausalLM" if is_glm else "DeepseekV3ForCausalLM"],
        **write_fields(HF, config),
        "num_key_value_heads": config.n_heads,
        "q_lora_rank": config.q_rank,
        **({"mlp_layer_types": mlps} if is_glm else {"first_k_dense_replace": config.n_dense}),
        "num_nextn_predict_layers": config.n_mtp,
        **rope,
        "hidden_act": "silu",
    }


def _mlp_layer_types(n_layers: int, n_dense: int) -> list[str]:
    return ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense)


def carried(config: Config) -> tuple[str, ...]:
    """Return how the names of tensors begin that are not loaded, but written as they are: multi-token prediction."""
    return tuple(f"model.layers.{i}." for i in range(config.n_layers, config.n_layers + config.n_mtp))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_llama(x, self.weight, self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, rope_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float32, device=positions.device) / config.rope_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (rope_dim / 2,)
    attention_factor = 1.0
    if y := config.yarn:
        # the pair whose frequency makes so many turns within the original length
        first, last = (
            config.rope_dim * math.log(y.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (y.beta_fast, y.beta_slow)
        )
        if y.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.rope_dim - 1)
        pairs = torch.arange(config.rope_dim // 2, dtype=torch.float32, device=positions.device)
        stretched = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)  # 0: kept, 1: all of it
        frequencies = frequencies * (1 - stretched) + frequencies / y.factor * stretched
        attention_factor = y.attention_factor
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, rope_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, rope_dim)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of x (B, heads, T, rope_dim): (x[2 i], x[2 i + 1]), which become (i, i + rope_dim / 2), or these."""
    if interleaved:
        x = x.unflatten(-1, (-1, 2)).mT.flatten(-2)  # (B, heads, T, rope_dim): those with even numbers first
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        c, self.config = config, config
        self.qk_dim = c.nope_dim + c.rope_dim
        self.scale = self.qk_dim**-0.5
        if c.yarn and c.mscale and c.yarn.factor > 1:
            self.scale *= (0.1 * c.mscale * math.log(c.yarn.factor) + 1.0) ** 2
        if c.q_rank is None:
            self.q_proj = nn.Linear(c.dim, c.n_heads * self.qk_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.dim, c.q_rank, bias=c.attn_bias)
            self.q_a_layernorm = RMSNorm(c.q_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(c.q_rank, c.n_heads * self.qk_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.dim, c.kv_rank + c.rope_dim, bias=c.attn_bias)
        self.kv_a_layernorm = RMSNorm(c.kv_rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(c.kv_rank, c.n_heads * (c.nope_dim + c.v_dim), bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.v_dim, c.dim, bias=c.attn_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        (B, T, _), c = x.shape, self.config
        q = self.q_proj(x) if c.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, -1, self.qk_dim).transpose(1, 2)  # (B, n_heads, T, nope_dim + rope_dim)
        q, q_rotated = q.split((c.nope_dim, c.rope_dim), -1)
        latent, k_rotated = self.kv_a_proj_with_mqa(x).split((c.kv_rank, c.rope_dim), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, -1, c.nope_dim + c.v_dim).transpose(1, 2)
        k, v = kv.split((c.nope_dim, c.v_dim), -1)  # (B, n_heads, T, nope_dim), (B, n_heads, T, v_dim)
        q_rotated = rotate(q_rotated, *rope, c.interleaved)  # (B, n_heads, T, rope_dim)
        k_rotated = rotate(k_rotated[:, None], *rope, c.interleaved)  # (B, 1, T, rope_dim)
        q = torch.cat((q, q_rotated.to(q.dtype)), -1)  # under autocast, rotary leaves them in fp32
        k = torch.cat((k, k_rotated.to(k.dtype).expand(-1, c.n_heads, -1, -1)), -1)
        v = F.pad(v, (0, self.qk_dim - c.v_dim))  # (B, n_heads, T, nope_dim + rope_dim), as q and k are
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_heads, S, nope_dim + rope_dim)
        y = attend(q, k, v, mask, self.scale)[..., : c.v_dim]  # (B, n_heads, T, v_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Chooses the experts of each token, in fp32. No `nn.Linear`: adapters and 4-bit leave it alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_active, self.n_groups, self.n_active_groups = config.n_active, config.n_groups, config.n_active_groups
        self.normalize, self.route_scale = config.normalize, config.route_scale
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return for x (N, dim) weights (N, n_active) of the chosen experts, in fp32, and these."""
        is_autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if is_autocast else nullcontext():
            scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (N, n_experts)
        groups = (scores + self.e_score_correction_bias).unflatten(-1, (self.n_groups, -1))
        best = groups.topk(2).values.sum(-1).topk(self.n_active_groups).indices  # (N, n_active_groups)
        others = torch.ones(groups.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
        chosen = groups.masked_fill(others[..., None], -math.inf).flatten(1).topk(self.n_active).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, chosen

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Let `.to(...)` move the biases to another device; another dtype is for the weight only."""
        bias = self.e_score_correction_bias
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype) if t is bias else fn(t), recurse)


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
        self.shared_experts = MLP(config.dim, config.n_shared * config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (B * T, dim)
        shared = self.shared_experts(x)
        y = self.experts(rows.to(shared.dtype), *self.gate(rows))  # grouped_mm ignores autocast, linears do not
        return y.view_as(x) + shared


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.dense_ffn_dim) if layer < config.n_dense else SparseMoE(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings, linears, router and experts: normal, std 0.02; biases: 0; norms: 1."""
        initialize(self, {"norm": 1.0, "bias": 0.0}, generator)

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
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)


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
