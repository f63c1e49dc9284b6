"""Mamba-2, 130M to 2.7B, and Codestral Mamba (7B): state space models without any attention.

Features: each block is one Mamba2 mixer (a causal depthwise convolution over its inputs, a selective state space model,
an RMSNorm of the gated output) after an RMSNorm; there is no MLP. The residual stream is in fp32. Heads share their inputs
b and c in groups (one group; eight in Codestral Mamba). No positions: a sequence may have any length, and a cache does not
grow with it. Head tied to the embedding in the smaller models.

Differs from granite_hybrid.py in having nothing but the mixer, which is the same, and in names. PEFT refuses adapters of
the kind of LoRA over `out_proj` in this family, so `all-linear` means `in_proj` here.

Paper: Mamba2 (arXiv 2405.21060).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_value, refuse, write_fields
from litmini.ops.attention import advance
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.linear_attention import Runs, causal_conv, make_runs
from litmini.ops.norms import rms_norm_llama
from litmini.ops.recompute import recomputed
from litmini.ops.state_space import state_space_scan


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    ssm_heads: int
    ssm_head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1  # of heads with the same inputs b and c
    kernel_size: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    has_fp32_residual: bool = True
    max_positions: int = 1_048_576  # no limit of the model, but scripts want one
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.ssm_heads % self.n_groups:
            raise ValueError(f"ssm_heads {self.ssm_heads} is not a multiple of n_groups {self.n_groups}")
        if self.ssm_heads * self.ssm_head_dim % self.dim:
            raise ValueError(
                f"ssm_heads {self.ssm_heads} x ssm_head_dim {self.ssm_head_dim} is not a multiple of dim {self.dim}"
            )

    @property
    def n_heads(self) -> int:
        return self.ssm_heads

    @property
    def head_dim(self) -> int:
        return self.ssm_head_dim


PRESETS = {  # columns: vocab_size, dim, n_layers, ssm_heads
    "tiny": Config(512, 64, 2, 8, 16, 16, 2, max_positions=256),  # for tests
    "AntonV/mamba2-130m-hf": Config(50288, 768, 24, 24),
    "AntonV/mamba2-370m-hf": Config(50288, 1024, 48, 32),  # wider, deeper
    "AntonV/mamba2-780m-hf": Config(50288, 1536, 48, 48),  # wider
    "AntonV/mamba2-1.3b-hf": Config(50288, 2048, 48, 64),  # wider
    "AntonV/mamba2-2.7b-hf": Config(50288, 2560, 64, 80),  # wider, deeper
    "mistralai/Mamba-Codestral-7B-v0.1": Config(32768, 4096, 64, 128, n_groups=8, tied=False),  # wider
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 32768),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 64),
    "ssm_heads": ("num_heads", 128),
    "ssm_head_dim": ("head_dim", 64),
    "d_state": ("state_size", 128),
    "n_groups": ("n_groups", 8),
    "kernel_size": ("conv_kernel", 4),
    "conv_bias": ("use_conv_bias", True),
    "proj_bias": ("use_bias", False),
    "has_fp32_residual": ("residual_in_fp32", True),
    "max_positions": ("max_position_embeddings", 1_048_576),  # transformers knows no such key
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied": ("tie_word_embeddings", False),
}
IMPLEMENTED = {"hidden_act": ("silu", "swish"), "rms_norm": True}  # key: the values that this file implements
NO_LIMITS: tuple[Any, ...] = (None, [0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}])
"""Of step sizes, as JSON, Python and transformers 5 write them."""


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    fields = read_fields(HF, hf)
    width = read_fields({"expand": ("expand", 2)}, hf)["expand"] * fields["dim"]
    types = read_value(hf, "layer_types", list, None)
    checks = {
        "head_dim": fields["ssm_head_dim"] * fields["ssm_heads"] == width,
        "layer_types": types in (None, ["linear_attention"] * fields["n_layers"]),
        "time_step_limit": hf.get("time_step_limit") in NO_LIMITS,
    }
    refuse("mamba2.py", {"head_dim": 64, **hf}, {}, IMPLEMENTED, **checks)
    return Config(**fields)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **write_fields(HF, config),
        "expand": config.ssm_heads * config.ssm_head_dim // config.dim,
        "hidden_act": "silu",
        "pad_token_id": None,
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


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = Mamba2(config)

    def forward(self, x: Tensor, dtype: torch.dtype, runs: Runs, cache: Any = None) -> Tensor:
        """Return the residual stream (B, T, dim) in x's dtype; the mixer computes in `dtype`."""
        return x + self.mixer(self.norm(x.to(dtype)), runs, cache)


class Model(nn.Module):
    unadapted = ("out_proj",)
    """Linears that PEFT has no LoRA for in this family: the kernels of transformers read their weights directly."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.backbone = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "norm_f": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embeddings.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02; convolutions: as torch's; their biases: 0; norms and D: 1; decays: 1, 2,
        3, ...; step sizes: from 0.001 to 0.1, uniform in their logarithm.
        """
        constants = {"norm": 1.0, "dt_bias": 0.0, "bias": 0.0, "A_log": 0.0, "mixer.D": 1.0}
        initialize(self, constants, generator, stds={"conv1d": (3 * self.config.kernel_size) ** -0.5})
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("A_log"):
                    parameter.copy_(torch.arange(1, len(parameter) + 1, device=parameter.device).log())
                elif name.endswith("dt_bias"):
                    steps = parameter.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
                    parameter.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus

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
        runs = make_runs(positions, documents, cache)
        x = self.backbone["embeddings"](tokens)  # (B, T, dim)
        dtype, x = x.dtype, x.float() if self.config.has_fp32_residual else x
        for i, block in enumerate(self.backbone["layers"].children()):
            x = block(x, dtype, runs, None if cache is None else cache.state(i))
        x = self.backbone["norm_f"](x).to(dtype)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
