"""The settings in a GGUF file's metadata that belong to its architecture."""

from typing import Any

from litmini.errors import UserError
from litmini.importers.gguf.reader import Metadata, StoredTensor
from litmini.models.hf_config import MAX_INT, MAX_LAYERS


class Settings:
    """The settings of a file's architecture. Those that are never read are refused at the end."""

    def __init__(self, metadata: Metadata, tensors: dict[str, StoredTensor], architecture: str) -> None:
        self.metadata, self.architecture, self.tensors = metadata, architecture, tensors
        self.expected: dict[str, Any] = {"attention.causal": True}
        self.read = {"vocab_size"}  # some files have it; the rows of the embedding decide

    def get(self, key: str, default: Any) -> Any:
        """Return a setting, of the type of `default`, which stands for a missing one."""
        full_name = f"{self.architecture}.{key}"
        return self.need(key, type(default)) if full_name in self.metadata.fields else default

    def need(self, key: str, kind: type = int) -> Any:
        self.read.add(key)
        full_name = f"{self.architecture}.{key}"
        value = self.metadata.need(full_name, kind)
        most = MAX_LAYERS if key == "block_count" else MAX_INT
        if kind in (int, float) and not 0 < value <= most:  # NaN is not
            raise UserError(f"{self.metadata.file}: metadata {full_name} is {value:,}; expected above 0, to {most:,}.")
        return value

    def count(self, key: str) -> int:
        """Return a number that may be zero, as it is where it is missing."""
        value = self.metadata.optional(f"{self.architecture}.{key}", 0)
        return self.need(key) if value else value

    def layers(self, key: str, n_layers: int) -> list[int]:
        """Return a number of each layer, of which there may be one for all."""
        self.read.add(key)
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, list):
            return [self.need(key)] * n_layers
        if len(value) != n_layers:
            raise ValueError(f"{key} has {len(value)} numbers for {n_layers} layers")
        return [int(one) for one in value]

    def expect(self, **implied: Any) -> None:
        """Allow settings with this value only; __ stands for the dot in a name."""
        self.expected |= {key.replace("__", "."): value for key, value in implied.items()}

    def sizes(self) -> dict[str, Any]:
        """Return what the Config of every family but GPT-2 has in common."""
        dim, n_heads = self.need("embedding_length"), self.need("attention.head_count")
        head_dim = self.get("attention.key_length", dim // n_heads)
        self.expect(attention__value_length=head_dim, rope__dimension_count=head_dim)
        return {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "dim": dim,
            "n_layers": self.need("block_count"),
            "n_heads": n_heads,
            "n_kv_heads": self.get("attention.head_count_kv", n_heads),
            "head_dim": head_dim,
            "ffn_dim": self.need("feed_forward_length"),
            "max_positions": self.need("context_length"),
            "norm_eps": self.need("attention.layer_norm_rms_epsilon", float),
            "tied": "output.weight" not in self.tensors,
        }

    def refuse_the_rest(self) -> None:
        prefix = f"{self.architecture}."
        existing = {key: self.metadata.get(key) for key in self.metadata.fields if key.startswith(prefix)}
        rest = {key: value for key, value in existing.items() if key.removeprefix(prefix) not in self.read}
        unsupported = {k: v for k, v in rest.items() if v not in ("none", self.expected.get(k.removeprefix(prefix), 0))}
        if unsupported:
            listing = ", ".join(f"{key} = {value!r}" for key, value in unsupported.items())
            raise UserError(
                f"{self.metadata.file}: not implemented for GGUF architecture '{self.architecture}': {listing}."
            )
