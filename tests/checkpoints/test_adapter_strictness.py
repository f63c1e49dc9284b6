"""An adapter is whole, finite and of the types of PEFT, or it is refused with what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import adapters, add_adapters


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory) -> Path:
    model = load_model(tiny_dir, torch.float32)
    add_adapters(model, LoraConfig(rank=2, targets=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory, "base")
    return directory


def edited(adapter: Path, target: Path, settings=None, tensors=lambda tensors: tensors, raw=lambda text: text) -> Path:
    directory = Path(shutil.copytree(adapter, target))
    config = json.loads((directory / "adapter_config.json").read_text()) | (settings or {})
    (directory / "adapter_config.json").write_text(raw(json.dumps(config)))
    save_file(tensors(load_file(directory / "adapter_model.safetensors")), directory / "adapter_model.safetensors")
    return directory


def without(*parts: str):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


BROKEN = {
    "a layer is missing": ({"tensors": without("layers.1.")}, "layers.1.self_attn.q_proj: the adapter has no tensors"),
    "one is missing, an expression names it": (
        {
            "tensors": without("layers.1.self_attn.q_proj"),
            "settings": {"target_modules": r".*layers\.\d\.(self_attn.q|mlp.down)_proj"},
        },
        "layers.1.self_attn.q_proj: the adapter has no tensors for it, and its target_modules",
    ),
    "named by all-linear": (
        {"settings": {"target_modules": "all-linear"}},
        "layers.0.mlp.gate_proj: .* target_modules",
    ),
    "named in a layer": (
        {"settings": {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1]}},
        "layers.1.self_attn.v_proj: the adapter has no tensors for it, and its target_modules",
    ),
    "named but for some": (
        {"settings": {"target_modules": ["v_proj", "q_proj"], "exclude_modules": r".*layers\.0.*"}},
        "layers.1.self_attn.v_proj: the adapter has no tensors for it, and its target_modules",
    ),
    "a trained module is missing": ({"tensors": without("lm_head")}, "lm_head: .* its modules_to_save names it"),
    "a layer that the settings leave out": (
        {"settings": {"layers_to_transform": [0]}},
        "layers.1.self_attn.q_proj: the adapter has tensors for it, and its settings do not name it",
    ),
    "modules that the settings leave out": (
        {"settings": {"target_modules": ["q_proj"]}},
        "layers.0.mlp.down_proj: the adapter has tensors for it, and its settings do not name it",
    ),
    "a trained module with parts is missing": (
        {"settings": {"modules_to_save": ["lm_head", "mlp"]}},
        "layers.0.mlp: the adapter has no tensors for it, and its modules_to_save names it",
    ),
    "another base": (
        {"tensors": lambda s: {**s, "base_model.model.model.layers.0.mlp.down_proj.base_layer.weight": torch.ones(2)}},
        "unexpected tensors: base_model.model.model.layers.0.mlp.down_proj.base_layer.weight",
    ),
    "half of a pair": ({"tensors": without("layers.0.mlp.down_proj.lora_A")}, "lora_A or lora_B is missing"),
    "NaN": ({"tensors": lambda s: {k: v * torch.nan for k, v in s.items()}}, "has NaN or infinite values: "),
    "one infinity": (
        {
            "tensors": lambda s: {
                k: v.fill_diagonal_(torch.inf) if "1.mlp.down_proj.lora_A" in k else v for k, v in s.items()
            }
        },
        "has NaN or infinite values: model.layers.1.mlp.down_proj.lora_A.weight",
    ),
    "ints": ({"tensors": lambda s: {k: v.int() for k, v in s.items()}}, "unexpected tensors: .* of int32"),
    "infinite alpha": (
        {"raw": lambda text: text.replace('"lora_alpha": 32.0', '"lora_alpha": 1e999')},
        "lora_alpha = inf",
    ),
    "NaN in alpha_pattern": ({"settings": {"alpha_pattern": {"q_proj": float("nan")}}}, "no number above 0"),
    "no expression": ({"settings": {"rank_pattern": {"(": 4}}}, r"'\(' is no regular expression"),
    "no expression of layers": (
        {"settings": {"layers_to_transform": [0], "layers_pattern": ["("]}},
        r"'\(' is no regular expression",
    ),
    "no expression of modules": ({"settings": {"target_modules": "*"}}, r"'\*' is no regular expression"),
}
TYPES = {
    "r": [True, "4", 2.0, [4], None],
    "lora_alpha": [True, "16", {}, None],
    "rank_pattern": [[1], 5, "q_proj", {"q_proj": "4"}, {"q_proj": True}],
    "alpha_pattern": [[1], {"q_proj": "4"}],
    "modules_to_save": [5, "lm_head", {}, [5], [""]],
    "target_parameters": [5, "x", [None]],
    "target_modules": [5, {}, [5], True],
    "exclude_modules": [5, [5]],
    "layers_to_transform": ["1", [True], 1.5],
    "layers_pattern": [5],
    "feedforward_modules": [5, [5], {}],
    "use_dora": ["false", 0],
    "use_rslora": ["false", 1],
    "peft_type": [5, ["LORA"], {}],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_whole_is_named(adapter, tiny_dir, tmp_path, kind):
    change, reason = BROKEN[kind]
    with pytest.raises(UserError, match=reason):
        load_adapter(load_model(tiny_dir), edited(adapter, tmp_path / "x", **change))


@pytest.mark.parametrize("key", TYPES)
def test_settings_of_another_type_are_named(adapter, tiny_dir, tmp_path, key):
    model = load_model(tiny_dir)
    for i, value in enumerate(TYPES[key]):
        with pytest.raises(UserError, match=rf"{key} =|r or lora_alpha"):
            load_adapter(model, edited(adapter, tmp_path / str(i), {key: value}))


def changed_blocks(base: Path, adapter: Path) -> set[str]:
    """The numbers of the blocks that an adapter is in, after it was loaded."""
    model = load_model(base)
    load_adapter(model, adapter)
    return {name.split(".layers.")[1].split(".")[0] for name in adapters(model) if ".layers." in name}


def test_what_peft_writes_for_the_same_modules_loads(adapter, tiny_dir, tmp_path):
    """An expression, and layers: the same modules by another name."""
    same = {"target_modules": r".*\.(q_proj|down_proj)", "layers_to_transform": [0, 1], "layers_pattern": "layers"}
    assert changed_blocks(tiny_dir, edited(adapter, tmp_path / "x", same)) == {"0", "1"}
    only = {"layers_to_transform": 0, "target_modules": ["q_proj", "down_proj"]}
    assert changed_blocks(tiny_dir, edited(adapter, tmp_path / "y", only, tensors=without("layers.1."))) == {"0"}


@pytest.mark.parametrize("name", ["mlp", "layers", "model", "", "self_attn", "0"])
def test_modules_with_parts_are_refused_before_training(tiny_dir, name):
    with pytest.raises(
        UserError, match=r"lora.modules_to_save .* matches no module; there are: down_proj, embed_tokens"
    ):
        add_adapters(load_model(tiny_dir), LoraConfig(targets=["q_proj"], modules_to_save=[name]))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_expressions_that_do_not_end_are_ended(adapter, tiny_dir, tmp_path, monkeypatch, key):
    monkeypatch.setattr("litmini.checkpoints.peft_config.SECONDS", 0.2)
    settings = {"layers_to_transform": [0, 1], key: r"(layers|[a-z.0-9_]+)+Q"}
    with pytest.raises(UserError, match=r"take more than 0.2 s"):
        load_adapter(load_model(tiny_dir), edited(adapter, tmp_path / "x", settings))


def test_groups_in_an_expression_of_layers(adapter, tiny_dir, tmp_path):
    changed = edited(adapter, tmp_path / "x", {"layers_to_transform": [0, 1], "layers_pattern": "(lay)ers"})
    assert changed_blocks(tiny_dir, changed) == {"0", "1"}
