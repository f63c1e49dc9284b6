"""Checkpoints in Meta's layout, made from a model of transformers."""

import numpy as np
import torch
import transformers as tf
from gguf_files import permute


def meta_parts(model: tf.PreTrainedModel, parts: int, embedding_dim: int) -> list[dict[str, torch.Tensor]]:
    """Meta's layout: pairs side by side in q and k, split over model parallel ranks as fairscale's layers are."""
    names = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output", "o_proj": "attention.wo"}
    names |= {f"{x}_proj": f"attention.w{x}" for x in "qkv"}
    names |= {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    split = {"tok_embeddings": embedding_dim, "output": 0, "attention.wo": 1, "feed_forward.w2": 1}
    states: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.ones(8)} for _ in range(parts)]
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        array = parameter.detach().numpy()
        whole = torch.from_numpy(np.ascontiguousarray(permute(array, heads[leaf]) if leaf in heads else array))
        prefix = f"layers.{name.split('.')[2]}." if "layers" in name else ""
        split_at = split.get(names[leaf], 0)
        pieces = [whole] * parts if whole.ndim == 1 else whole.chunk(parts, split_at)
        for state, piece in zip(states, pieces, strict=True):
            state[f"{prefix}{names[leaf]}.weight"] = piece.clone()
    return states
