"""Shallower checkpoints: the values of the layers that are kept, what transformers makes of them, and what is refused."""

import json

import pytest
import torch
import transformers
from numerics import assert_close
from safetensors.torch import load_file
from script_runs import run_script
from tiny import make_family

from litmini.checkpoints.hf import load_model
from litmini.checkpoints.keep_layers import keep_layers
from litmini.errors import UserError
from litmini.models import FAMILIES

REPEATED = {"gemma2", "gemma3_text", "gpt_oss", "qwen3_5_moe_text", "qwen3_5_text", "smollm3"}
"""Families whose layers are of kinds that follow each other."""
OTHERS = {"gemma4_text", "glm4_moe_lite", "mistral", "olmo3"}
"""Where the last layers have keys and values of earlier ones; and families whose files have other tiny models."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - OTHERS))
def test_layers_of_every_family(family, tmp_path, tokenizer_dir):
    """The first and the last, or, where kinds follow each other, the first two; then transformers agrees."""
    source = make_family(family, tmp_path / "source", tokenizer_dir)
    n = load_model(source, torch.float32).config.n_layers
    layers = [0, 1] if family in REPEATED else [0, n - 1]
    after, before = keep_layers(source, tmp_path / "kept", layers)
    model, whole = (load_model(tmp_path / name, torch.float32) for name in ("kept", "source"))
    assert model.config.n_layers == 2 and after == sum(p.numel() for p in model.parameters()) and after <= before
    old = dict(whole.named_parameters())
    for name, value in model.named_parameters():
        first, dot, rest = name.partition(".layers." if ".layers." in name else ".h.")
        number, _, inside = rest.partition(".")
        source_name = f"{first}{dot}{layers[int(number)]}.{inside}" if number.isdigit() else name
        assert torch.equal(value, old[source_name]), name
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32).eval()
        assert_close(model(tokens), theirs(tokens, use_cache=False).logits, 10 * 256)
    assert (tmp_path / "kept/tokenizer.json").is_file()


def test_the_script(tiny_dir, tmp_path, capfd):
    out = run_script(
        capfd, "keep_layers", "--checkpoint_dir", tiny_dir, "--layers", "[1]", "--out_dir", tmp_path / "kept"
    )
    assert "139,584 parameters" in out and "written:" in out
    kept, whole = (load_file(directory / "model.safetensors") for directory in (tmp_path / "kept", tiny_dir))
    assert torch.equal(kept["model.layers.0.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((tmp_path / "kept/config.json").read_text())["num_hidden_layers"] == 1


def test_layers_are_put_into_the_order_that_is_given(tiny_dir, tmp_path):
    keep_layers(tiny_dir, tmp_path / "turned", [1, 0])
    turned, whole = (load_file(directory / "model.safetensors") for directory in (tmp_path / "turned", tiny_dir))
    assert torch.equal(turned["model.layers.0.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(turned["model.layers.1.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("layers", "says"), [([0, 2], "names 2; expected each once, of 0 to 1"), ([1, 1], "names 1"), ([], "is empty")]
)
def test_layers_that_are_not_there(tiny_dir, tmp_path, layers, says):
    with pytest.raises(UserError, match=says):
        keep_layers(tiny_dir, tmp_path / "kept", layers)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "qwen3_5_text"])
def test_kinds_in_another_order_are_refused(family, tmp_path, tokenizer_dir):
    """Also where config.json does not list them."""
    source = make_family(family, tmp_path / "source", tokenizer_dir)
    raw = json.loads((source / "config.json").read_text())
    for keys in ((), ("layer_types", "no_rope_layers")):
        (source / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in keys}))
        with pytest.raises(UserError, match="an order that models of this family do not have"):
            keep_layers(source, tmp_path / "kept", [1])


def test_layers_that_need_others_are_refused(tmp_path, tokenizer_dir):
    """In Gemma 4 the last layers have the keys and values of earlier ones."""
    source = make_family("gemma4_text", tmp_path / "source", tokenizer_dir)
    with pytest.raises(UserError, match=r"do not have \(.*leaves no keys and values to some"):
        keep_layers(source, tmp_path / "kept", [0, 3])


def test_a_directory_that_exists(tiny_dir, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        keep_layers(tiny_dir, tmp_path, [0])
