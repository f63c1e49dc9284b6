"""GPT-2 is numerically that of transformers, and its transposed linears go in and out unchanged."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch, reference
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import gpt2
from litmini.ops.kv_cache import KVCache

SIZES = {**SMALL, "n_positions": 256}
PUBLISHED = {  # the values of config.json on the hub: n_embd, n_layer, n_head
    "openai-community/gpt2": (768, 12, 12),
    "openai-community/gpt2-medium": (1024, 24, 16),
    "openai-community/gpt2-large": (1280, 36, 20),
    "openai-community/gpt2-xl": (1600, 48, 25),
}


class TestGPT2(FamilyTests):
    module = gpt2
    absolute_positions = True
    cases: ClassVar = {
        "tied": GPT2Config(**SIZES),
        "untied": GPT2Config(**SIZES, tie_word_embeddings=False),
        "inner-eps": GPT2Config(**{**SIZES, "num_hidden_layers": 3}, n_inner=96, layer_norm_epsilon=1e-2),
        "tanh-by-its-other-name": GPT2Config(**{**SIZES, "n_positions": T}, activation_function="gelu_pytorch_tanh"),
    }
    refused: ClassVar = {
        "activation_function = 'relu'": GPT2Config(**SIZES, activation_function="relu").to_dict(),
        "scale_attn_weights = False": GPT2Config(**SIZES, scale_attn_weights=False).to_dict(),
        "scale_attn_by_inverse_layer_idx": GPT2Config(**SIZES, scale_attn_by_inverse_layer_idx=True).to_dict(),
        "reorder_and_upcast_attn": GPT2Config(**SIZES, reorder_and_upcast_attn=True).to_dict(),
        "add_cross_attention": GPT2Config(**SIZES, add_cross_attention=True).to_dict(),
        "quantization_config": {**GPT2Config(**SIZES).to_dict(), "quantization_config": {"quant_method": "gptq"}},
    }
    counts: ClassVar = {
        "openai-community/gpt2": 124_439_808,
        "openai-community/gpt2-medium": 354_823_168,
        "openai-community/gpt2-large": 774_030_080,
        "openai-community/gpt2-xl": 1_557_611_200,
    }

    def test_dropout_is_where_that_of_transformers_is(self, directory):
        # the same random values, in the same order, hit the same elements
        theirs = reference(GPT2Config(**SIZES, attn_implementation="eager"))
        model, (tokens, _) = load_model(directory(theirs), torch.float32).train(), batch()
        outputs = []
        for run in (model, lambda t: theirs.train()(t, use_cache=False).logits):
            torch.manual_seed(5)
            outputs.append(run(tokens))
        assert_close(*outputs)
        assert (model(tokens) - outputs[0]).abs().max() > 0.1

    def test_files_of_2019(self, directory):
        """Names without `transformer.`, causal masks among the weights, no head."""
        theirs = reference(GPT2Config(**SIZES))
        path = directory(theirs)
        file = path / "model.safetensors"
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(256, 256).tril().view(1, 1, 256, 256)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, file, metadata={"format": "pt"})
        tokens, _ = batch()
        expected = theirs(tokens, use_cache=False).logits
        assert_close(load_model(path, torch.float32)(tokens), expected)
        empty = ((name, t.to("meta")) for name, t in tensors.items())  # shapes alone go the same way
        with torch.device("meta"):
            model = gpt2.Model(gpt2.config_from_hf(theirs.config.to_dict()))
        found = {name: t.shape for name, t in gpt2.from_hf(empty, model.config)}
        assert found == {name: p.shape for name, p in model.named_parameters()}

    @pytest.mark.parametrize("cached", [False, True])
    def test_left_padded_batch(self, directory, cached):
        """Padding has positions below 0, for which the table has no rows."""
        theirs = reference(GPT2Config(**SIZES))
        model, (tokens, _) = load_model(directory(theirs), torch.float32), batch()
        positions = torch.arange(T) - torch.tensor([[0], [20]])
        real = positions >= 0
        expected = theirs(
            tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0), use_cache=False
        ).logits
        with torch.no_grad():
            if cached:
                cache = KVCache(model.config, 2, T, torch.float32)
                parts = zip(
                    tokens.split([30, *[1] * (T - 30)], 1), positions.split([30, *[1] * (T - 30)], 1), strict=True
                )
                found = torch.cat([model(part, where, cache=cache) for part, where in parts], 1)
            else:
                found = model(tokens, positions)
        assert_close(found[real], expected[real])


def tiny() -> gpt2.Model:
    model = gpt2.Model(gpt2.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    dim, layers, heads = PUBLISHED[name]
    raw = {"activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "n_ctx": 1024}
    raw |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "layer_norm_epsilon": 1e-05}
    raw |= {"n_embd": dim, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}
    assert gpt2.config_from_hf(raw) == gpt2.PRESETS[name]
    theirs = GPT2Config(**{k: v for k, v in raw.items() if k != "model_type"})
    assert gpt2.config_from_hf(json.loads(theirs.to_json_string())) == gpt2.PRESETS[name]


def test_values_that_are_left_out_are_those_of_transformers():
    assert gpt2.config_from_hf({"model_type": "gpt2", "vocab_size": 50257}) == gpt2.config_from_hf(
        GPT2Config().to_dict()
    )


def test_more_tokens_than_positions_is_an_error():
    model = tiny()
    with pytest.raises(ValueError, match="257 tokens, but there are learned positions for 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))
    packed = torch.arange(150).repeat(2)[None]  # a row of documents may be longer
    assert model(torch.zeros_like(packed), packed, torch.arange(2).repeat_interleave(150)[None]).isfinite().all()


def test_impossible_values_raise():
    with pytest.raises(ValueError, match="dim 64 is not a multiple of n_heads 3"):
        replace(gpt2.PRESETS["tiny"], n_heads=3)


def test_initial_weights():
    model = gpt2.Model(replace(gpt2.PRESETS["tiny"], dim=256, n_layers=8, ffn_dim=1024))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.005 if "c_proj" in name else 0.02, rel=0.05), name


def test_adapters_on_every_linear():
    model = tiny()
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 4 * model.config.n_layers
    tokens = torch.randint(0, 512, (2, 32))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(names) and all(g is not None and g.isfinite().all() for g in gradients.values())
