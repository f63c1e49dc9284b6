"""litgpt's lit_model.pth in: the tensors and logits of the model that it was made from."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf_files import randomize
from litgpt_files import AFTER, FOUR_NORMS, TWO_NORMS, lit_state
from numerics import assert_close
from test_architectures import CASES, SHAPE
from test_convert import TOKENS, hf, no_model, refused, same

from litmini.checkpoints.hf import load_model
from litmini.files import read_json
from litmini.importers.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return no_model(tmp_path / "source")


@pytest.mark.parametrize(
    ("config", "norms"),
    [
        (tf.Olmo2Config(**SHAPE), AFTER),
        (tf.Qwen3Config(**SHAPE, head_dim=32), TWO_NORMS),
        (CASES["gemma3"], FOUR_NORMS),
    ],
    ids=["olmo2", "qwen3", "gemma3"],
)
def test_litgpt_norms(source: Path, tmp_path: Path, config: tf.PreTrainedConfig, norms: dict[str, str]) -> None:
    """Which norm of litgpt's is which differs by family; the logits are those of transformers."""
    model = randomize(tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    tensors = hf(source, model)
    torch.save(lit_state(tensors, model.config, False, norms), source / "lit_model.pth")
    out = convert(source, tmp_path / "out")
    same(out, tensors)
    with torch.no_grad():
        assert_close(load_model(out, torch.float32)(TOKENS), model(TOKENS).logits)


@pytest.mark.parametrize("by_group", [True, False])
def test_litgpt(source: Path, tmp_path: Path, by_group: bool) -> None:
    model = randomize(tf.AutoModelForCausalLM.from_config(tf.Qwen2Config(**SHAPE, tie_word_embeddings=True)))
    tensors = hf(source, model)
    state = lit_state(tensors, model.config, by_group)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    torch.save({"model": state}, source / "lit_model.pth")
    out = convert(source, tmp_path / "out")
    same(out, tensors)
    with torch.no_grad():
        assert_close(load_model(out, torch.float32)(TOKENS), model(TOKENS).logits)
    state["lm_head.weight"] = state["lm_head.weight"] * 2  # litgpt trains it apart from the embedding
    torch.save(state, source / "lit_model.pth")
    untied = convert(source, tmp_path / "untied")
    same(untied, {**tensors, "lm_head.weight": state["lm_head.weight"]})
    assert read_json(untied / "config.json")["tie_word_embeddings"] is False
    torch.save({**state, "transformer.h.0.attn.qkv.lora_A": torch.ones(2)}, source / "lit_model.pth")
    assert "holds an adapter (transformer.h.0.attn.qkv.lora_A). Merge it first" in refused(source, tmp_path / "bad")


def test_litgpt_gpt_neox(source: Path, tmp_path: Path) -> None:
    """Fused in both, in another order."""
    config = tf.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"})
    model = randomize(tf.AutoModelForCausalLM.from_config(config))
    tensors = hf(source, model)
    names = {
        "dense_h_to_4h": "mlp.fc",
        "dense_4h_to_h": "mlp.proj",
        "dense": "attn.proj",
        "query_key_value": "attn.qkv",
    }
    names |= {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
    top = {"embed_in": "transformer.wte", "final_layer_norm": "transformer.ln_f", "embed_out": "lm_head"}
    state = {}
    for name, tensor in tensors.items():
        leaf, kind = name.split(".")[-2:]
        if leaf == "query_key_value":  # by head in Hugging Face's files
            tensor = tensor.view(4, 3, 16, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        new = f"transformer.h.{name.split('.')[2]}.{names[leaf]}" if leaf in names else top[leaf]
        state[f"{new}.{kind}"] = tensor
    torch.save(state, source / "lit_model.pth")
    same(convert(source, tmp_path / "out"), tensors)
