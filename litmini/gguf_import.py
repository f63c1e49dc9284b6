"""GGUF files in: a quantised llama.cpp file becomes an ordinary Hugging Face directory.

Weights are dequantised one tensor at a time; tokenizer, chat template and stop tokens come from the file's metadata.
What is in a file but not understood is an error, never ignored. The format and its metadata:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the order of rows in q and k: llama.cpp's converter.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor, nn
from tqdm import tqdm

from litmini.checkpoint import save_model
from litmini.config import UserError
from litmini.gguf_tokenizer import write_tokenizer
from litmini.models import family, llama


class Metadata:
    """A file's metadata, with floats as they were before they were stored in fp32 (1e-05, not 9.99e-06)."""

    def __init__(self, reader: GGUFReader, file: Path) -> None:
        self.fields, self.file = reader.fields, file

    def get(self, key: str, default: Any = None) -> Any:
        try:
            value = self.fields[key].contents() if key in self.fields else default
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.file} is damaged: metadata {key} cannot be read ({error}).") from None
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key)
        if not isinstance(value, kind):
            raise UserError(f"{self.file}: metadata {key} is {value!r}; expected one {kind.__name__}.")
        return value


@dataclass(frozen=True)
class Architecture:
    """What a `general.architecture` means here. Another one is another row of ARCHITECTURES."""

    model_type: str
    """Hugging Face's name, a key of litmini.models.FAMILIES."""
    config: Callable[[Metadata, dict[str, ReaderTensor]], Any]
    """Metadata and tensors -> the family's Config."""
    names: dict[str, str]
    """GGUF's tensor names -> Hugging Face's, without .weight and .bias, with * for the number of the layer."""
    interleaved: tuple[str, ...] = ()
    """Tensors whose rows GGUF stores in pairs, for interleaved rotary embedding."""
    consumed: tuple[str, ...] = ()
    """Tensors that `config` has turned into settings."""


LLAMA_KEYS: tuple[str, ...] = ("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size")
LLAMA_KEYS += ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base")


def _llama_config(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> llama.Config:
    dim, n_heads = metadata.need("llama.embedding_length"), metadata.need("llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", dim // n_heads)
    theta = metadata.get("llama.rope.freq_base", 10_000.0)
    scaling = None
    if metadata.get("llama.rope.scaling.type") == "linear":
        scaling = llama.RopeScaling("linear", metadata.need("llama.rope.scaling.factor", float))
    elif "rope_freqs.weight" in tensors:
        scaling = _llama3_scaling(tensors["rope_freqs.weight"].data, theta, metadata.file)
    implied = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim)
    if scaling and scaling.kind == "linear":
        implied |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    present = {key: metadata.get(key) for key in metadata.fields if key.startswith("llama.")}
    present = {key: value for key, value in present.items() if key.removeprefix("llama.") not in LLAMA_KEYS}
    lacking = {k: v for k, v in present.items() if v not in ("none", implied.get(k.removeprefix("llama."), 0))}
    if lacking:
        listing = ", ".join(f"{key} = {value!r}" for key, value in lacking.items())
        raise UserError(f"{metadata.file}: not implemented for GGUF architecture 'llama': {listing}.")
    return llama.Config(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        dim=dim,
        n_layers=metadata.need("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=metadata.need("llama.feed_forward_length"),
        max_positions=metadata.need("llama.context_length"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=metadata.need("llama.attention.layer_norm_rms_epsilon", float),
        tied="output.weight" not in tensors,
        attn_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )


def _llama3_scaling(divisors: np.ndarray, theta: float, file: Path) -> llama.RopeScaling:
    """GGUF stores what each frequency is divided by; here is checked that Llama 3's rule gives these very numbers."""
    s = llama.RopeScaling("llama3", factor=float(divisors.max()))
    turns = s.original_positions * theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clip(0, 1)
    if not np.allclose(1 / (blend + (1 - blend) / s.factor), divisors, rtol=1e-3):
        raise UserError(f"{file}: rope_freqs.weight is not Llama 3's rotary scaling, the only one implemented.")
    return s


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        config=_llama_config,
        names={
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
            "blk.*.attn_norm": "model.layers.*.input_layernorm",
            "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
            "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
            "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
            "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
            "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
            "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
            "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
            "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
        },
        interleaved=("blk.*.attn_q", "blk.*.attn_k"),
        consumed=("rope_freqs.weight",),
    ),
}


def read_gguf(file: Path) -> tuple[GGUFReader, Metadata]:
    """Open a GGUF file; its tensors stay on disk until they are used.

    Raises:
        UserError: it is missing, truncated, damaged or no GGUF file.
    """
    if not file.is_file():
        raise UserError(f"GGUF file not found: {file}")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is truncated, damaged or no GGUF file ({error}). Get it again.") from None
    return reader, Metadata(reader, file)


def import_gguf(file: Path, out_dir_aside: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Turn a GGUF file into a Hugging Face directory.

    Args:
        file: the GGUF file.
        out_dir_aside: an existing, empty directory.
        dtype: of the weights written.

    Returns:
        architecture, organization and license as in the metadata; quantization: how many tensors of each type;
        main_type: the type of most weights; bits: of that type.

    Raises:
        UserError: the file is damaged, or holds an architecture, tensor, setting or tokenizer that is not implemented.
    """
    reader, metadata = read_gguf(file)
    name = metadata.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(f"{file}: GGUF architecture '{name}' is not supported; there are: {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    module = family(architecture.model_type)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = architecture.config(metadata, tensors)
        with torch.device("meta"):
            model = module.Model(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{file}: its metadata and tensors make no {name} model ({error}).") from None
    kept = _fitting(tensors, architecture, model, file)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for old, new in tqdm(kept.items(), desc=f"dequantising {file.name}", unit=" tensors", disable=None):
            array = dequantize(tensors[old].data, tensors[old].tensor_type)
            values = torch.from_numpy(np.require(array, requirements=["C", "W"]))
            if _pattern(old) in architecture.interleaved:
                values = half_split(values, config.head_dim)
            yield new, values.to(dtype)

    ids = write_tokenizer(metadata, out_dir_aside, config.max_positions)
    try:
        save_model(out_dir_aside, {**module.config_to_hf(config), **ids}, stream())
    except NotImplementedError as error:
        raise UserError(f"{file}: {error} in the gguf package.") from None
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    main_type = max(weights, key=lambda key: weights[key])
    return {
        "architecture": name,
        "organization": metadata.get("general.organization"),
        "license": metadata.get("general.license"),
        "quantization": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "main_type": main_type,
        "bits": int(re.findall(r"\d+", main_type)[0]),
    }


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads * head_dim, ...), from llama.cpp's order (pairs side by side) to Hugging Face's."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


def _fitting(
    tensors: dict[str, ReaderTensor], architecture: Architecture, model: nn.Module, file: Path
) -> dict[str, str]:
    """GGUF's names -> Hugging Face's, of all tensors to keep; what does not fit `model` is reported in one error."""
    kept = {old: _hf_name(old, architecture) for old in tensors if old not in architecture.consumed}
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    found = {new: tuple(int(n) for n in reversed(tensors[old].shape)) for old, new in kept.items()}
    if problems := [f"{key} is missing" for key in expected if key not in found] + [
        f"{key} has shape {shape}, the metadata implies {expected.get(key, 'none such')}"
        for key, shape in found.items()
        if shape != expected.get(key)
    ]:
        listing = "\n  ".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
        raise UserError(f"the tensors in {file} do not fit its metadata:\n  {listing}")
    return kept


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name.rpartition(".")[0])


def _hf_name(name: str, architecture: Architecture) -> str:
    new = architecture.names.get(_pattern(name))
    layer = re.search(r"\d+", name)
    return f"{new.replace('*', layer[0] if layer else '')}.{name.rpartition('.')[2]}" if new else name
