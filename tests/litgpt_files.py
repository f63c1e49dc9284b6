"""Checkpoints as litgpt keeps them: names and layout of its scripts/convert_hf_checkpoint.py."""

import torch
import transformers as tf

LIT = {"o_proj": "attn.proj", "gate_proj": "mlp.fc_1", "up_proj": "mlp.fc_2", "down_proj": "mlp.proj"}
LIT |= {"embed_tokens": "transformer.wte", "norm": "transformer.ln_f", "lm_head": "lm_head"}
LIT |= {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"}
TWO_NORMS = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_mlp_norm"}
FOUR_NORMS = {"input_layernorm": "norm_1", "pre_feedforward_layernorm": "norm_2", **AFTER}


def lit_state(
    tensors: dict[str, torch.Tensor], config: tf.PreTrainedConfig, by_group: bool, norms: dict[str, str] = TWO_NORMS
) -> dict[str, torch.Tensor]:
    """litgpt's layout of a decoder like Llama's; q, k and v side by side, or (before December 2024) by group."""
    names = LIT | norms
    state = {}
    for name, tensor in tensors.items():
        *above, leaf, kind = name.split(".")
        layer = above[2] if "layers" in above else None
        if leaf in ("q_proj", "k_proj", "v_proj"):
            if leaf == "q_proj":
                q, k, v = (tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
                heads = config.num_key_value_heads
                groups = zip(q.chunk(heads), k.chunk(heads), v.chunk(heads), strict=True)
                fused = torch.cat([part for group in groups for part in group] if by_group else [q, k, v])
                state[f"transformer.h.{layer}.attn.{'attn' if by_group else 'qkv'}.{kind}"] = fused
        else:
            new = f"transformer.h.{layer}.{names[leaf]}" if layer else names[leaf]
            state[f"{new}.{kind}"] = tensor
    return state
