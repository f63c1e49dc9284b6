"""Gemma 4 (E2B, E4B, 31B, 26B-A4B): the text part of its `gemma4` checkpoints, in one file.

Features: RMSNorm before and after both attention and MLP, and on each head's queries, keys (before they are rotated) and
values (without a weight); scores are not scaled. Some layers with a sliding window and a short rotary base, then a global
one with a long base, of whose larger heads only the first pairs are rotated, and whose values may be its keys before
norm and rotary embedding. GeGLU, a scalar on what leaves each layer, embedding scaled by sqrt(dim), logits capped softly,
head tied to the embedding. E2B and E4B give each layer a small embedding of its own for each token, which a gate adds,
and their later layers read keys and values of the last layer of their kind that has some, in E2B with an MLP twice as
wide. 26B-A4B adds 128 experts beside each MLP, eight for each token, whose weights are scaled by expert; as in
transformers, no balance loss is added in training.

Differs from gemma3.py in all but the four norms of a block, the order of windows, and GeGLU; RMSNorm multiplies by its
weight. Shared keys and values go from block to block as arguments, so that their gradients reach the layer that made
them; with a cache, they are those of its cache. `from_hf` / `to_hf` rename layer scalars and experts. What shared layers
have of unused keys and values in published files is carried through.

Papers: Gemma 3 (arXiv 2503.19786), Gemma 3n's model card for per-layer embeddings, rotary on a part (2410.06205).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import LAYER_TYPES, Table, read_fields, read_rope, read_value, refuse, write_fields
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.norms import geglu, rms_norm

KV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    max_positions: int
    window: int  # keys that a query of a local layer sees, itself included
    global_every: int = 6  # layers 5, 11, 17, ... and the last one see everything
    head_dim: int = 256
    global_head_dim: int = 512  # of global layers
    n_global_kv_heads: int | None = None  # of global layers; none: n_kv_heads
    k_eq_v: bool = False  # global layers have no v_proj
    n_shared: int = 0  # last layers, which have no keys and values of their own
    double_wide: bool = False  # the MLP of these layers is twice as wide
    ple_dim: int = 0  # of per-layer embeddings; 0: there are none
    n_experts: int = 0
    n_active: int = 0  # experts that a token goes to
    expert_dim: int = 0  # ffn_dim of one expert
    logit_softcap: float | None = 30.0
    rope_theta: float = 1_000_000.0  # of global layers
    rotary_pct: float = 0.25  # the fraction of each of their heads that is rotated
    rope_local_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True

    def __post_init__(self) -> None:
        for name, n_kv_heads in (("n_kv_heads", self.n_kv_heads), ("n_global_kv_heads", self.n_global_kv_heads)):
            if n_kv_heads is not None and (n_kv_heads < 1 or self.n_heads % n_kv_heads):
                raise ValueError(f"n_heads {self.n_heads} is not a multiple of {name} {n_kv_heads}")
        if self.n_global_kv_heads is not None and not self.k_eq_v:
            raise ValueError(f"n_global_kv_heads {self.n_global_kv_heads} goes with k_eq_v only")
        if self.head_dim % 2 or self.global_head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} or global_head_dim {self.global_head_dim} is odd")
        if min(self.window, self.global_every) < 1:
            raise ValueError(f"window {self.window} or global_every {self.global_every} is below 1")
        if not 0 <= self.rotary_pct <= 1:
            raise ValueError(f"rotary_pct {self.rotary_pct} is outside 0..1")
        kinds = [self.is_global(i) for i in range(self.n_layers)]
        if not 0 <= self.n_shared < self.n_layers or set(kinds[: self.n_layers - self.n_shared]) != set(kinds):
            raise ValueError(f"n_shared {self.n_shared} of {self.n_layers} layers leaves no keys and values to some")
        if self.n_experts and not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"n_active {self.n_active} is outside 1..n_experts {self.n_experts}")

    def is_global(self, layer: int) -> bool:
        """Whether a layer has no window."""
        return (layer + 1) % self.global_every == 0 or layer == self.n_layers - 1

    def source(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads: itself, or the last one of its kind that has some."""
        own = self.n_layers - self.n_shared
        return layer if layer < own else max(i for i in range(own) if self.is_global(i) == self.is_global(layer))


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, ffn_dim, max_positions, window
    "tiny": Config(  # for tests: all features at once
        *(512, 64, 4, 4, 2, 128, 256, 16),
        global_every=2,
        head_dim=16,
        global_head_dim=32,
        n_global_kv_heads=1,
        k_eq_v=True,
        n_shared=2,
        double_wide=True,
        ple_dim=64,
        n_experts=4,
        n_active=2,
        expert_dim=64,
    ),
    "google/gemma-4-E2B": Config(
        262_144, 1536, 35, 8, 1, 6144, 131072, 512, global_every=5, n_shared=20, double_wide=True, ple_dim=256
    ),
    # wider, deeper, fewer shared layers, whose MLP is that of the others
    "google/gemma-4-E4B": Config(262_144, 2560, 42, 8, 2, 10240, 131072, 512, n_shared=18, ple_dim=256),
    # from here on without per-layer embeddings and shared layers, and longer
    "google/gemma-4-31B": Config(262_144, 5376, 60, 32, 16, 21504, 262144, 1024, n_global_kv_heads=4, k_eq_v=True),
    "google/gemma-4-26B-A4B": Config(  # experts beside a narrow MLP
        *(262_144, 2816, 30, 16, 8, 2112, 262144, 1024),
        n_global_kv_heads=2,
        k_eq_v=True,
        n_experts=128,
        n_active=8,
        expert_dim=704,
    ),
}

HF: Table = {  # field of Config: (key of config.json, value if it is missing)
    "vocab_size": ("vocab_size", 262_144),
    "dim": ("hidden_size", 2304),
    "n_layers": ("num_hidden_layers", 30),
    "n_heads": ("num_attention_heads", 8),
    "n_kv_heads": ("num_key_value_heads", 4),
    "ffn_dim": ("intermediate_size", 9216),
    "max_positions": ("max_position_embeddings", 131_072),
    "window": ("sliding_window", 512),
    "head_dim": ("head_dim", 256),
    "k_eq_v": ("attention_k_eq_v", False),
    "double_wide": ("use_double_wide_mlp", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", True),
}
EXPERTS: Table = {"n_experts": "num_experts", "n_active": "top_k_experts", "expert_dim": "moe_intermediate_size"}
ROPE = {  # where config.json has no rotary settings
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_type": ("default", "proportional"),
    "rope_scaling": None,
    "factor": 1.0,
    "attention_bias": False,
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    fields = read_fields(HF, hf)
    types = read_value(hf, "layer_types", list, None) or []
    fields["global_every"] = types.index("full_attention") + 1 if "full_attention" in types else 6
    types = types or layer_types(fields["n_layers"], fields["global_every"])
    by_type = read_value(hf, "rope_parameters", dict, None) or ROPE
    rope, local = (
        read_rope({"rope_parameters": by_type}, layer_type=f"{kind}_attention") for kind in ("full", "sliding")
    )
    ple_dim = read_value(hf, "hidden_size_per_layer_input", int, 256) or 0
    changes, only_global = _global_changes(hf, fields, types)
    checks = {
        "layer_types": types == layer_types(fields["n_layers"], fields["global_every"]),
        "rope_parameters": by_type.keys() == LAYER_TYPES and local["rope_type"] == "default",
        "per_layer_config": only_global and changes.keys() <= {"head_dim", "num_key_value_heads"},
        "vocab_size_per_layer_input": not ple_dim
        or hf.get("vocab_size_per_layer_input", 262_144) == fields["vocab_size"],
    }
    if hf.get("use_bidirectional_attention") == "vision":  # of the patches of an image, which text has not
        hf = {**hf, "use_bidirectional_attention": None}
    refuse("gemma4.py", hf, rope, IMPLEMENTED, **checks)
    heads = read_value(changes, "num_key_value_heads", int, fields["n_kv_heads"], zero=False)
    return Config(
        **fields,
        **(read_fields(EXPERTS, hf) if read_value(hf, "enable_moe_block", bool, False) else {}),
        global_head_dim=read_value(changes, "head_dim", int, fields["head_dim"], zero=False),
        n_global_kv_heads=None if heads == fields["n_kv_heads"] else heads,
        n_shared=read_value(hf, "num_kv_shared_layers", int, 0) or 0,
        ple_dim=ple_dim,
        logit_softcap=read_value(hf, "final_logit_softcapping", float, None, zero=False),
        rope_theta=rope["rope_theta"],
        rotary_pct=1.0 if rope["rope_type"] == "default" else rope["partial_rotary_factor"],
        rope_local_theta=local["rope_theta"],
    )


def _global_changes(hf: dict[str, Any], fields: dict[str, Any], types: list[str]) -> tuple[dict[str, Any], bool]:
    """Return what global layers have in place of other layers' settings, and whether these layers, and no others, have it.

    Published files have keys of their own for it, and transformers 5.24 writes the changes of each layer by its number.
    """
    if "per_layer_config" not in hf:
        heads = hf.get("num_global_key_value_heads") if fields["k_eq_v"] else None
        return {"head_dim": hf.get("global_head_dim", 512)} | (
            {} if heads is None else {"num_key_value_heads": heads}
        ), True
    by_layer = {int(layer): changes for layer, changes in (read_value(hf, "per_layer_config", dict) or {}).items()}
    changes: dict[str, Any] = next(iter(by_layer.values()), {})
    wanted = [i for i, kind in enumerate(types) if kind == "full_attention"] if changes else []
    return changes, by_layer == dict.fromkeys(wanted, changes)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, as transformers reads it since Gemma 4 is there."""
    experts = write_fields(EXPERTS, config)
    full = {**ROPE["full_attention"], "rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_pct}
    local = {**ROPE["sliding_attention"], "rope_theta": config.rope_local_theta}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **write_fields(HF, config),
        "layer_types": layer_types(config.n_layers, config.global_every),
        "global_head_dim": config.global_head_dim,
        "num_global_key_value_heads": config.n_global_kv_heads,
        "num_kv_shared_layers": config.n_shared,
        "hidden_size_per_layer_input": config.ple_dim,
        "vocab_size_per_layer_input": config.vocab_size,
        "enable_moe_block": config.n_experts > 0,
        **{key: value or None for key, value in experts.items()},
        "final_logit_softcapping": config.logit_softcap,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def layer_types(n_layers: int, global_every: int) -> list[str]:
    """Return the kind of each layer, as transformers calls them; the last one is always global."""
    is_global = [(i + 1) % global_every == 0 or i == n_layers - 1 for i in range(n_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_global]


def carried(config: Config) -> tuple[str, ...]:
    """Return how the names of tensors begin that are not loaded, but written as they are: what shared layers do not use."""
    layers = range(config.n_layers - config.n_shared, config.n_layers)
    return tuple(
        f"model.layers.{i}.self_attn.{part}." for i in layers for part in ("k_proj", "v_proj", "k_norm", "v_norm")
    )


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of x without a weight."""
    return rms_norm(x, torch.ones(x.shape[-1], device=x.device), eps)


def rotary(positions: Tensor, head_dim: int, theta: float, pct: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents  # (head_dim / 2,)
    frequencies[int(pct * head_dim // 2) :] = 0.0  # these pairs are not rotated
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        is_global, sources = config.is_global(layer), [config.source(i) for i in range(config.n_layers)]
        self.head_dim = config.global_head_dim if is_global else config.head_dim
        self.eps = config.norm_eps
        self.is_read = layer in sources[layer + 1 :]  # by later layers
        self.q_proj = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        if sources[layer] == layer:
            n_kv_heads = (is_global and config.n_global_kv_heads) or config.n_kv_heads
            self.k_proj = nn.Linear(config.dim, n_kv_heads * self.head_dim, bias=False)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.v_proj = (
                None if is_global and config.k_eq_v else nn.Linear(config.dim, n_kv_heads * self.head_dim, bias=False)
            )

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, shared: KV | None, cache: Any
    ) -> tuple[Tensor, KV | None]:
        """Return (B, T, dim), and keys and values if later layers read them; `shared` are those of an earlier layer."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        q = rotate(self.q_norm(q), *rope)
        if shared is not None:
            k, v = shared
        else:
            k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
            v = k if self.v_proj is None else self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            k, v = rotate(self.k_norm(k), *rope), plain_norm(v, self.eps)
            if cache is not None:
                k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask, scale=1.0)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), (k, v) if self.is_read else None


class MLP(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Chooses the experts of each token. No `nn.Linear`: adapters and 4-bit leave it alone, as in other families."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_active, self.eps = config.n_active, config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.scale = nn.Parameter(torch.ones(config.dim))
        self.per_expert_scale = nn.Parameter(torch.ones(config.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for x (N, dim) the logits (N, n_experts), and weights (N, n_active) of the chosen experts."""
        logits = F.linear(plain_norm(x, self.eps) * self.scale * x.shape[-1] ** -0.5, self.weight)
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.n_active)
        weights = weights / weights.sum(-1, keepdim=True) * self.per_expert_scale[chosen]
        return logits, weights, chosen


class GroupedLinear(nn.Module):
    """One linear for each expert. The rows of x are sorted by expert; those of expert i end before offsets[i]."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.to(x.dtype).mT, offs=offsets)


class Experts(nn.Module):
    """GeGLU MLPs, grouped. Tokens are sorted by expert, so that each expert computes all of its own in one matmul."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.gate_up_proj = GroupedLinear(config.n_experts, config.dim, 2 * config.expert_dim)
        self.down_proj = GroupedLinear(config.n_experts, config.expert_dim, config.dim)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return (N, dim) for x (N, dim), and weights and chosen experts (N, n_active) each."""
        n_active = chosen.shape[1]
        experts, order = chosen.flatten().sort(stable=True)  # (N * n_active,): sorted by expert
        ids = torch.arange(self.n_experts, device=x.device)
        offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)  # (n_experts,); no tokens, no work
        rows = x.index_select(0, order // n_active)  # (N * n_active, dim)
        gate, up = self.gate_up_proj(rows, offsets).chunk(2, dim=-1)  # (N * n_active, expert_dim) each
        y = self.down_proj(geglu(gate, up), offsets)  # (N * n_active, dim)
        y = y.index_select(0, order.argsort()).unflatten(0, (-1, n_active))  # (N, n_active, dim), tokens in order again
        return (y * weights[..., None]).sum(1).to(x.dtype)


class LayerScalar(nn.Module):
    """Multiplies by one value, which transformers does not train, either."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        width = 2 if config.double_wide and config.source(layer) != layer else 1
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, width * config.ffn_dim)
        self.post_feedforward_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.layer_scalar = LayerScalar()
        self.has_experts = config.n_experts > 0
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(config.dim, config.norm_eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(config.dim, config.norm_eps)
            self.post_feedforward_layernorm_2 = RMSNorm(config.dim, config.norm_eps)
        if config.ple_dim:
            self.per_layer_input_gate = nn.Linear(config.dim, config.ple_dim, bias=False)
            self.per_layer_projection = nn.Linear(config.ple_dim, config.dim, bias=False)
            self.post_per_layer_input_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        own: Tensor | None,
        shared: KV | None,
        cache: Any = None,
    ) -> tuple[Tensor, KV | None]:
        """Return (B, T, dim), and what `Attention` gives later layers.

        Args:
            own: (B, T, ple_dim), this layer's embedding of each token; None: it has none.
        """
        y, kv = self.self_attn(self.input_layernorm(x), rope, mask, shared, cache)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        if self.has_experts:
            y = self.post_feedforward_layernorm_1(y) + self.post_feedforward_layernorm_2(self.mix(x))
        x = x + self.post_feedforward_layernorm(y)
        if own is not None:
            y = self.per_layer_projection(geglu(self.per_layer_input_gate(x), own))
            x = x + self.post_per_layer_input_norm(y)
        return self.layer_scalar(x), kv

    def mix(self, x: Tensor) -> Tensor:
        """Return what the experts give for x (B, T, dim)."""
        logits, weights, chosen = self.router(x.flatten(0, 1))
        rows = self.pre_feedforward_layernorm_2(x).flatten(0, 1)  # (B * T, dim)
        y = self.experts(rows.to(logits.dtype), weights, chosen)  # grouped_mm ignores autocast, the router does not
        return y.view_as(x)


class PerLayerEmbedding(nn.Embedding):
    """An embedding of tokens for all layers, (vocab_size, n_layers * ple_dim)."""


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sources = [config.source(i) for i in range(config.n_layers)]
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict({"embed_tokens": embed_tokens})
        if config.ple_dim:
            width = config.n_layers * config.ple_dim
            self.model["embed_tokens_per_layer"] = PerLayerEmbedding(config.vocab_size, width)
            self.model["per_layer_model_projection"] = nn.Linear(config.dim, width, bias=False)
            self.model["per_layer_projection_norm"] = RMSNorm(config.ple_dim, config.norm_eps)
        self.model["layers"] = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.model["norm"] = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings, linears, router and experts: normal, std 0.02; norms and scales: 1."""
        initialize(self, {"norm": 1.0, "scal": 1.0}, generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets."""
        positions, c = advance(tokens, positions, cache), self.config
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        x = x * torch.tensor(c.dim**0.5, dtype=x.dtype)  # in bf16, sqrt(1536) = 39.19 becomes 39.25
        own = self.per_layer_inputs(tokens, x) if c.ple_dim else None
        local = (
            rotary(positions, c.head_dim, c.rope_local_theta, 1.0, x.dtype),
            make_mask(positions, documents, cache, c.window, changes_scores=c.head_dim > 256),
        )
        everywhere = (
            rotary(positions, c.global_head_dim, c.rope_theta, c.rotary_pct, x.dtype),
            make_mask(positions, documents, cache, window=None, changes_scores=c.global_head_dim > 256),
        )
        kept: dict[int, KV] = {}  # layer: its keys and values, if later layers read them
        for i, block in enumerate(self.model["layers"].children()):
            rope, mask = everywhere if c.is_global(i) else local
            embedded = None if own is None else own[:, :, i]  # (B, T, ple_dim)
            shared = kept.get(self.sources[i])  # its own are not there yet
            x, kv = block(x, rope, mask, embedded, shared, None if cache is None else cache[i])
            if kv is not None:
                kept[i] = kv
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels, c.logit_softcap)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        return logits if c.logit_softcap is None else c.logit_softcap * torch.tanh(logits / c.logit_softcap)

    def per_layer_inputs(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Return each layer's embedding of each token (B, T, n_layers, ple_dim), half of the token, half of x (B, T, dim)."""
        c = self.config
        own = self.model["embed_tokens_per_layer"](tokens)  # (B, T, n_layers * ple_dim)
        own = (own * torch.tensor(c.ple_dim**0.5, dtype=own.dtype)).unflatten(-1, (c.n_layers, c.ple_dim))
        projected = self.model["per_layer_model_projection"](x) * c.dim**-0.5
        projected = self.model["per_layer_projection_norm"](projected.unflatten(-1, (c.n_layers, c.ple_dim)))
        return (projected + own) * 2**-0.5


RENAMED = {"layer_scalar": "layer_scalar.weight", "router.proj.weight": "router.weight"}
RENAMED |= {f"experts.{name}": f"experts.{name}.weight" for name in ("gate_up_proj", "down_proj")}
"""How names end in Hugging Face's files, and in the model: buffers and experts are the `weight` of a module there."""


def from_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's tensors under the names that the model has."""
    return _renamed(tensors, RENAMED)


def to_hf(tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors under the names of Hugging Face's files."""
    return _renamed(tensors, {new: old for old, new in RENAMED.items()})


def _renamed(tensors: Iterable[tuple[str, Tensor]], endings: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        end = next((end for end in endings if name.endswith(f".{end}")), "")
        yield name.removesuffix(end) + endings.get(end, ""), tensor
