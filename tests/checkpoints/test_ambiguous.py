"""Directories that say two things: weights twice, and a config.json that ties what the file has apart."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from numerics import assert_close
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_model, save_trained
from litmini.checkpoints.peft import save_adapter
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.files import read_json, write_atomically, write_json
from litmini.importers.convert import convert
from litmini.methods.adapters import add_adapters
from litmini.models import llama

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tiny(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "tiny"))


@pytest.mark.parametrize(
    "other", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", INDEX]
)
def test_a_directory_with_weights_twice_is_refused(tiny, tmp_path, other):
    (tiny / other).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (tiny / "model-1.safetensors").touch()
    for read in (load_model, lambda path: convert(path, tmp_path / "out"), lambda path: export(path, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"holds weights more than once: model.safetensors and {re.escape(other)}"):
            read(tiny)
    (tiny / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))  # the same file
    if other == INDEX:
        assert load_model(tiny)
    else:  # giving the file says which is meant
        with pytest.raises(
            UserError, match="refused|truncated or damaged|supported kind"
        ):  # it is read, and is no such file
            convert(tiny / other, tmp_path / "out")
        convert(tiny / "model.safetensors", tmp_path / "out")


@pytest.fixture
def own_head(tmp_path, tokenizer_dir) -> Path:
    """A checkpoint whose config.json says tied, and whose file has another head."""
    config = dataclasses.replace(llama.PRESETS["tiny"], tied=True)
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(1))
    directory = tmp_path / "base"
    directory.mkdir()
    tensors = [(name, p.detach().bfloat16().float()) for name, p in model.named_parameters()]
    tensors.append(("lm_head.weight", tensors[0][1] * 2))
    save_model(directory, llama.config_to_hf(config), tensors, side_files=tokenizer_dir)
    return directory


def check_own_head(directory: Path, factor: float = 2.0) -> None:
    tensors = dict(read_tensors(shards(directory)))
    assert torch.equal(tensors["lm_head.weight"].float(), tensors["model.embed_tokens.weight"].float() * factor)
    assert read_json(directory / "config.json")["tie_word_embeddings"] is False
    model = load_model(directory, torch.float32)
    assert torch.equal(model.lm_head.weight, model.model["embed_tokens"].weight * factor)


def test_a_head_of_its_own_is_used_though_the_config_says_tied(own_head, tmp_path, capsys):
    """As in transformers; what is written says so."""
    model = load_model(own_head, torch.float32)
    assert torch.equal(model.lm_head.weight, model.model["embed_tokens"].weight * 2)
    theirs = AutoModelForCausalLM.from_pretrained(own_head, dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert_close(model(tokens), theirs(tokens).logits)
    load_model(own_head)
    assert capsys.readouterr().err.count("config.json ties lm_head.weight to model.embed_tokens.weight, but") == 1
    with write_atomically(tmp_path / "trained") as aside:
        save_trained(model, aside, own_head)
    convert(own_head, tmp_path / "converted")
    export(own_head, tmp_path / "exported")
    for name in ("trained", "converted", "exported"):
        check_own_head(tmp_path / name)
    add_adapters(model, LoraConfig(rank=2, targets=["q_proj"]))
    torch.nn.init.ones_(model.model["layers"][0].self_attn.q_proj.lora_B)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(own_head))
    export(own_head, tmp_path / "merged", tmp_path / "adapter")
    check_own_head(tmp_path / "merged")


@pytest.mark.parametrize("kind", ["bin", "shards", "another dtype"])
def test_a_head_is_compared_by_value_in_every_layout(own_head, tmp_path, tokenizer_dir, kind):
    tensors = load_file(own_head / "model.safetensors")
    for factor in (2.0, 1.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float() * factor
        source = Path(shutil.copytree(own_head, tmp_path / f"{factor}"))
        (source / "model.safetensors").unlink()
        if kind == "bin":
            torch.save(tensors, source / "pytorch_model.bin")
        elif kind == "shards":
            save_file({"lm_head.weight": tensors["lm_head.weight"].bfloat16()}, source / "a.safetensors")
            save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, source / "b.safetensors")
            write_json(source / INDEX, {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
        else:
            save_file(tensors, source / "model.safetensors")
        convert(source, tmp_path / f"{factor}-converted")
        if factor == 2.0:
            check_own_head(tmp_path / f"{factor}-converted")
        else:
            assert "lm_head.weight" not in dict(read_tensors(shards(tmp_path / f"{factor}-converted")))
