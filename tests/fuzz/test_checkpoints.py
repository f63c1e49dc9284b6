"""Every field of every family's config.json, and every file of a checkpoint and an adapter, changed by type and value.

Each case ends as right (the value that the file says, or the same model as before) or as a UserError: never another
exception, never other values without a word. LITMINI_FUZZ multiplies the number of random cases.
"""

import copy
import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_amount import seeds
from safetensors.torch import load_file, save, save_file

import litmini
from litmini.checkpoints.config import parse_config, parse_model
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters, merge_adapters
from litmini.models import FAMILIES, deepseek_v3, llama, mixtral, olmo2, phi3, qwen2, qwen3
from litmini.models import family as family_of
from litmini.models.hf_config import Yarn

VALUES: list[Any] = [None, True, False, 0, 1, 2, 3, 7, -1, 2**31, 10**30, 0.5, 4.0, -0.5, math.inf, -math.inf, math.nan]
VALUES += ["", "0", "1", "4", "0.5", "true", "false", "null", "relu", "yarn", "linear", "x" * 10**5, [], [1], ["x"]]
VALUES += [
    ["full_attention"],
    ["sliding_attention"] * 2,
    {},
    {"a": 1},
    {"rope_type": "yarn"},
    [[]],
    [None],
    {"full_attention": 1},
]


def config_files() -> dict[str, dict[str, Any]]:
    """config.json of each family's tiny preset and of those with more settings, in the spelling of transformers 4 and 5."""
    tiny = {name: family_of(name).PRESETS["tiny"] for name in sorted({v: k for k, v in FAMILIES.items()}.values())}
    yarn = Yarn(4.0, 64, 1.3, 16.0, 2.0)
    tiny |= {
        "llama3": dataclasses.replace(
            llama.PRESETS["tiny"], rope_scaling=llama.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
        ),
        "linear": dataclasses.replace(llama.PRESETS["tiny"], rope_scaling=llama.RopeScaling("linear", 2.0)),
        "glm": dataclasses.replace(deepseek_v3.PRESETS["tiny"], yarn=None, mscale=0.0, model_type="glm4_moe_lite"),
        "mistral": dataclasses.replace(llama.PRESETS["tiny"], window=16, model_type="mistral"),
        "mixtral-window": dataclasses.replace(mixtral.PRESETS["tiny"], window=16),
        "qwen2-yarn": dataclasses.replace(qwen2.PRESETS["tiny"], yarn=yarn),
        "qwen2-window": dataclasses.replace(qwen2.PRESETS["tiny"], window=16, first_window_layer=1),
        "qwen3-yarn": dataclasses.replace(qwen3.PRESETS["tiny"], yarn=yarn),
        "olmo3": dataclasses.replace(olmo2.PRESETS["tiny"], window=16, yarn=yarn, model_type="olmo3"),
        "phi3-long": dataclasses.replace(
            phi3.PRESETS["tiny"], long_rope=phi3.LongRope((1.0,) * 8, (2.0,) * 8, 64), window=16
        ),
    }
    files = {}
    for name, config in tiny.items():
        module = __import__(type(config).__module__, fromlist=["x"])
        raw = json.loads(json.dumps(module.config_to_hf(config)))
        five = {k: v for k, v in raw.items() if k not in OLD_ROPE} if "rope_parameters" in raw else raw
        files[f"{name}, 5"] = five
        if "rope_parameters" in raw and not {"full_attention", "sliding_attention"} & raw["rope_parameters"].keys():
            files[f"{name}, 4"] = {k: v for k, v in raw.items() if k != "rope_parameters"}
    return files


OLD_ROPE = (
    "rope_theta",
    "rope_scaling",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "rope_local_base_freq",
)
EXTRA: dict[str, Any] = {  # keys that transformers heeds in every family, or in several, and no tiny preset writes
    "is_causal": True,
    "layer_types": None,
    "quantization_config": None,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "vision_config": None,
    "use_bidirectional_attention": None,
}
CONFIGS = config_files()


def paths(raw: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON object, those of objects and lists included."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw[:2]):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*above, key))


def at(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        raw = raw[key] if isinstance(raw, list) or (isinstance(raw, dict) and key in raw) else None
    return raw


def changed(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    new = copy.deepcopy(raw)
    at(new, path[:-1])[path[-1]] = value
    return new


def same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


# Where a value changes nothing, or is written otherwise, and that is right: transformers does the same
SAYS_NOTHING = {
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "n_ctx",
    "attn_impl",
    "learned_pos_emb",
}


def is_right(path: tuple[Any, ...], value: Any, raw: dict[str, Any]) -> bool:
    key, kind = path[-1], raw["model_type"]
    rope = isinstance(value, dict) and not value.keys() & {"rope_type", "type", "factor", "rope_theta"}
    truth = isinstance(value, int | float) and 0 < abs(value) < math.inf
    return (
        value in (None, 0, [], {})
        or bool(SAYS_NOTHING & set(path))
        or (rope and key in ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention", "attn_config"))
        or (
            key == "rope_scaling"
            and value == {"rope_type": at(raw, ("rope_parameters", "full_attention", "rope_type"))}
        )
        or (key == "attn_config" and isinstance(value, dict))
        or (kind == "lfm2" and key == "attention_dropout")  # which it does not have
        or (kind in ("gpt2", "mamba2", "mpt") and key in ("rope_scaling", "attention_dropout"))
        or (key in ("sliding_window", "max_window_layers") and not raw.get("use_sliding_window") and type(value) is int)
        or (key == "use_sliding_window" and value is True and raw.get("sliding_window") is None)
        or (kind == "phi3" and key == "original_max_position_embeddings" and type(value) is int)
        or (kind == "phi3" and (value == "yarn" or path[-2:] == ("rope_parameters", "type")))  # longrope's first names
        or (kind == "gemma3_text" and key == "sliding_window_pattern" and type(value) is int)  # layer_types says it
        or (kind.startswith("qwen3_5") and key == "full_attention_interval" and type(value) is int)  # so does it here
        or (kind == "gemma3_text" and key == "factor" and value == 1)
        or (key == "layer_types" and len(set(map(str, value))) == 1)
        or (key in ("alibi", "no_bias", "parallel_attn", "attention_bias") and truth)
    )


def check_config(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """A value is used as it stands, or means what was there before, or is refused."""
    mutated = changed(raw, path, value)
    try:
        module, config = parse_config(mutated, Path("config.json"))
        if config != family_of(raw["model_type"]).config_from_hf(raw):
            parse_model(mutated, Path("config.json"))
            found = at(module.config_to_hf(config), path)
        else:
            found = at(raw, path)
    except UserError as error:
        assert len(str(error)) < 2000
        return
    assert same(found, value) or is_right(path, value, raw), f"{path} = {value!r:.100} became {found!r:.100}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_config_json(name):
    raw, chance = CONFIGS[name] | {k: v for k, v in EXTRA.items() if k not in CONFIGS[name]}, random.Random(name)
    for path in paths(raw):
        for value in chance.sample(VALUES, min(len(VALUES), len(seeds(12)) + 1)):
            check_config(raw, path, value)


def test_several_fields_at_once():
    """Never another exception."""
    chance = random.Random(0)
    for _ in seeds(1500):
        raw = copy.deepcopy(CONFIGS[chance.choice(sorted(CONFIGS))])
        for _ in range(chance.randint(1, 4)):
            path = chance.choice(list(paths(raw)))
            value = chance.choice(VALUES) if chance.random() < 0.7 else at(raw, chance.choice(list(paths(raw))))
            at(raw, path[:-1])[path[-1]] = copy.deepcopy(value)
        if chance.random() < 0.3:
            raw.pop(chance.choice(sorted(raw)))
        try:
            parse_model(raw, Path("config.json"))
        except UserError as error:
            assert len(str(error)) < 2000


# Files of a checkpoint


GARBAGE = [
    b"",
    b"\xff" * 1000,
    b"\0" * 1000,
    b"[]",
    b"null",
    b"{}",
    b"[" * 10**5,
    b'{"a": ' * 10**4,
    b"1e999",
    b'"x"',
    b"PK\x03\x04",
]


def broken(content: bytes, chance: random.Random, header: int) -> bytes:
    """Return other content: garbage, a part, or some bits of the first `header` bytes flipped."""
    kind = chance.randrange(3)
    if kind == 0:
        return chance.choice(GARBAGE)
    if kind == 1:
        return content[: chance.randrange(len(content))]
    flipped = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        flipped[chance.randrange(min(header, len(content)))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def header_size(file: Path) -> int:
    """Values have no checksum: of a safetensors file, only the header can show that it was changed."""
    content = file.read_bytes()
    return 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a model in their own memory: files that it has mapped are written again."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def read_copies(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def check_load(load: Callable[[], Any], expected: dict[str, torch.Tensor] | None, what: str) -> Any:
    """What loads is what was there before, unless None is expected: then only no other exception."""
    try:
        model = load()
    except UserError as error:
        assert len(str(error)) < 5000, what
        return None
    found = values(model)
    if expected is None:
        return model
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found), what
    return model


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_every_file_of_a_checkpoint(tiny_dir, tmp_path, name):
    directory, chance = Path(shutil.copytree(tiny_dir, tmp_path / "x")), random.Random(name)
    if "index" in name:
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        names = load_file(directory / "a.safetensors")
        (directory / name).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    file, expected = directory / name, values(load_model(directory, torch.float32))
    content, header = file.read_bytes(), header_size(file)
    for i in seeds(150):
        file.write_bytes(broken(content, chance, header))
        other = name == "config.json" and is_object(file.read_bytes())
        check_load(
            lambda: load_model(directory, torch.float32),
            None if other else expected,
            f"case {i}: {file.read_bytes()[:200]!r}",
        )


def is_object(content: bytes) -> bool:
    """Whether a JSON file is one still: another number in it is another model, and no error."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def change_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """Return tensors of which one is missing, or has another name, shape or dtype; or one more."""
    tensors = dict(tensors)
    name, kind = chance.choice(sorted(tensors)), chance.randrange(7)
    tensor = tensors.pop(name)
    if kind == 1:
        tensors[name + chance.choice([".x", "x", ".weight", ".base_layer.weight"])] = tensor
    elif kind == 2:
        tensors[name] = tensor[..., :-1].contiguous()
    elif kind == 3:
        tensors[name] = tensor[None].clone()
    elif kind == 4:
        tensors[name] = tensor.to(chance.choice([torch.int32, torch.bool, torch.uint8]))
    elif kind == 5:
        tensors |= {name: tensor, chance.choice(["x", "lm_head.bias", "model.layers.9.norm.weight"]): torch.ones(2)}
    elif kind == 6:
        tensors |= {name: tensor[:0].clone()}
    return tensors


def test_every_tensor_of_a_checkpoint(tiny_dir, tmp_path):
    directory, chance = Path(shutil.copytree(tiny_dir, tmp_path / "x")), random.Random(0)
    expected, tensors = values(load_model(directory, torch.float32)), read_copies(directory / "model.safetensors")
    for i in seeds(40):
        save_file(change_tensors(tensors, chance), directory / "model.safetensors")
        check_load(lambda: load_model(directory, torch.float32), expected, f"case {i}")


# Files of an adapter


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


def merged(base: Path, adapter: Path) -> torch.nn.Module:
    model = load_model(base, torch.float32)
    load_adapter(model, adapter)
    merge_adapters(model)
    return model


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tensors"])
def test_every_file_of_an_adapter(tiny_dir, adapter, tmp_path, name):
    directory, chance = Path(shutil.copytree(adapter, tmp_path / "x")), random.Random(name)
    expected = values(merged(tiny_dir, directory))
    tensors = read_copies(directory / "adapter_model.safetensors")
    file = directory / ("adapter_model.safetensors" if name == "tensors" else name)
    content, header = file.read_bytes(), header_size(file)
    for i in seeds(40 if name == "tensors" else 100):
        file.write_bytes(
            save(change_tensors(tensors, chance)) if name == "tensors" else broken(content, chance, header)
        )
        other = name == "adapter_config.json" and is_object(file.read_bytes())
        check_load(
            lambda: merged(tiny_dir, directory), None if other else expected, f"case {i}: {file.read_bytes()[:200]!r}"
        )


ADAPTER_KEYS = [
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_bias",
    "use_qalora",
    "layer_replication",
]
ADAPTER_KEYS += ["alora_invocation_tokens", "trainable_token_indices"]
NUMBERS = {"lora_alpha", "use_rslora"}  # accepted, they are another scale


def test_every_field_of_an_adapter_config(tiny_dir, adapter, tmp_path):
    directory, chance = Path(shutil.copytree(adapter, tmp_path / "x")), random.Random(0)
    expected, raw = values(merged(tiny_dir, directory)), json.loads((directory / "adapter_config.json").read_text())
    raw |= dict.fromkeys(ADAPTER_KEYS)
    more = [["q_proj"], "all-linear", "*", ".*", {"q_proj": 3}, {"(": 1}, [0], ["lm_head"], [""], "DORA", {"x": 5}]
    for path in paths(raw):
        for value in chance.sample(VALUES + more, min(len(VALUES + more), len(seeds(12)) + 1)):
            (directory / "adapter_config.json").write_text(json.dumps(changed(raw, path, value)))
            try:
                model = load_model(tiny_dir, torch.float32)
                load_adapter(model, directory)
                if path[0] in NUMBERS or (path[0] == "alpha_pattern" and value):
                    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
                    stated = {"lora_alpha": layer.alpha, "use_rslora": layer.rank_stabilized}.get(path[0], value)
                    assert stated == (value or stated) and not isinstance(value, str), f"{path} = {value!r}"
                    continue
            except UserError:
                continue
            merge_adapters(model)
            found = values(model)
            assert all(torch.equal(found[name], expected[name]) for name in expected), f"{path} = {value!r}"


def test_a_whole_checkpoint_loads(tiny_dir, adapter):
    """That the cases above begin with what works."""
    assert litmini.load(tiny_dir, adapter, dtype="fp32")
