"""Quantised checkpoints are read as what they mean: the values of transformers and bitsandbytes, or refused by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers as tf
from numerics import assert_close
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.errors import UserError
from litmini.files import read_json
from litmini.importers.convert import convert
from litmini.importers.quantized import Dequantized

SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
TOKENS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(1))
NAME = "model.layers.0.mlp.gate_proj.weight"
VISION = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def written(model: tf.PreTrainedModel, place: Path, tokenizer_dir: Path, **config) -> dict[str, torch.Tensor]:
    """Write a checkpoint without weights; return these."""
    model.bfloat16().save_pretrained(place)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, place)
    edit(place, **config)
    return load_file(place / "model.safetensors")


def edit(place: Path, **config) -> None:
    (place / "config.json").write_text(json.dumps(read_json(place / "config.json") | config))


def in_fp8(weight: torch.Tensor, block: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in FP8, and the scales that give a weight back."""
    rows, columns = weight.shape
    size = block or [rows, columns]
    grid = torch.empty(-(-rows // size[0]), -(-columns // size[1]))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            grid[i, j] = weight[part].abs().max().float() / 448
            out[part] = (weight[part].float() / grid[i, j]).to(out.dtype)
    return out, grid if block else grid.view(()).bfloat16()  # as the published files have them


def fp8(
    place: Path, tokenizer_dir: Path, block: list[int] | None = None, model: tf.PreTrainedModel | None = None
) -> Path:
    torch.manual_seed(0)
    model = model or tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE))
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": block}
    tensors = written(model, place, tokenizer_dir, quantization_config=quantization)
    for name in [name for name in tensors if "language_model" in name or "vision" not in name]:
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = in_fp8(tensors[name], block)
            tensors[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(0.5)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return getattr(out := model(TOKENS), "logits", out).float()


@pytest.mark.parametrize("block", [None, [16, 32]])
def test_fp8_is_what_transformers_dequantises(tmp_path, tokenizer_dir, capsys, block):
    source = fp8(tmp_path / "fp8", tokenizer_dir, block)
    out = convert(source, tmp_path / "out")
    in_words = "FP8 in blocks of 16 x 32" if block else "FP8 with one scale a tensor"
    assert f"note: {source}: 7 tensors in {in_words}, dequantised to bf16." in capsys.readouterr().err
    assert read_json(out / "source.json")["format"] == f"safetensors, {in_words}, dequantised to bf16"
    config = read_json(out / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    settings = tf.FineGrainedFP8Config(weight_block_size=block, dequantize=True, activation_scheme="static")
    theirs = tf.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.bfloat16)
    found = load_file(out / "model.safetensors")
    expected = {name: t for name, t in theirs.state_dict().items() if name in found}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert_close(logits(load_model(out, torch.float32)), logits(theirs.float()))
    exact = load_file(convert(source, tmp_path / "fp32", torch.float32) / "model.safetensors")[NAME]
    assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), found[NAME])
    assert not torch.equal(exact, found[NAME].float())


@pytest.mark.parametrize(
    "shape, grid", [((48, 72), (3, 3)), ((5, 40, 70), (5, 3, 3)), ((3, 8, 8), (3, 1, 1)), ((9, 9), ())]
)
def test_fp8_of_any_shape(tmp_path, shape, grid):
    """Experts, and blocks that end beyond the matrix, which transformers refuses."""
    (tmp_path / "config.json").write_text("{}")
    weight, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(grid) + 0.5
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    raw = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    plain = Dequantized(tmp_path / "config.json", raw, [tmp_path / "model.safetensors"], torch.bfloat16)
    ((_, found),) = plain.read(False)
    wide = scale.view(*grid[:-2], 1, 1) if scale.numel() == 1 else scale
    wide = wide.repeat_interleave(16, -2)[..., : shape[-2], :].repeat_interleave(32, -1)[..., : shape[-1]]
    assert torch.equal(found, (weight.float() * (scale if scale.numel() == 1 else wide)).bfloat16())
    if shape == (3, 8, 8):
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
        assert torch.equal(found, theirs)


def test_mxfp4_is_what_transformers_dequantises(tmp_path):
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 10, 4), dtype=torch.uint8)
    scales[0, :5] = torch.randint(115, 125, (5, 4))  # as in weights; the others reach the ends of bf16
    tensors = {"a.gate_up_proj_blocks": blocks, "a.gate_up_proj_scales": scales, "a.bias": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    plain = Dequantized(tmp_path / "config.json", raw, [tmp_path / "model.safetensors"], torch.bfloat16)
    found = dict(plain.read(False))
    assert found.keys() == {"a.gate_up_proj", "a.bias"}
    assert torch.equal(found["a.gate_up_proj"], convert_moe_packed_tensors(blocks, scales))
    assert {n: t.shape for n, t in plain.read(True)} == {n: t.shape for n, t in found.items()}
    tensors["a.gate_up_proj_scales"][0, 0, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="NaN among the scales of a.gate_up_proj_scales"):
        list(Dequantized(tmp_path / "config.json", raw, [tmp_path / "model.safetensors"], torch.bfloat16).read(False))


def test_gpt_oss_as_it_is_published(tmp_path, tokenizer_dir, capsys):
    shape = {**SHAPE, "hidden_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7}
    torch.manual_seed(0)
    model, source = tf.GptOssForCausalLM(tf.GptOssConfig(**shape)), tmp_path / "mxfp4"
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    tensors = written(model, source, tokenizer_dir, quantization_config=settings)
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = convert(source, tmp_path / "out")
    assert "2 tensors in MXFP4, dequantised to bf16" in capsys.readouterr().err
    settings = tf.Mxfp4Config(dequantize=True)
    theirs = tf.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.bfloat16)
    found, expected = load_file(out / "model.safetensors"), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in found)
    with torch.no_grad():
        assert_close(logits(load_model(out, torch.float32)), theirs.float()(TOKENS, use_cache=False).logits)


def in_4_bits(place: Path, tokenizer_dir: Path, kind: str = "nf4", double: bool = True, dtype=torch.bfloat16) -> Path:
    """A checkpoint as transformers saves one that it has quantised by bitsandbytes."""
    torch.manual_seed(0)
    written(tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)), place.with_name("plain"), tokenizer_dir)
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    model = tf.AutoModelForCausalLM.from_pretrained(
        place.with_name("plain"), quantization_config=settings, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(place)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, place)
    return place


@pytest.mark.parametrize(
    "kind, double, dtype", [("nf4", True, torch.bfloat16), ("fp4", True, torch.float16), ("nf4", False, torch.float16)]
)
def test_4_bits_are_what_bitsandbytes_dequantises(tmp_path, tokenizer_dir, capsys, kind, double, dtype):
    source = in_4_bits(tmp_path / "bnb", tokenizer_dir, kind, double, dtype)
    out = convert(source, tmp_path / "out")
    in_words = f"bitsandbytes {kind.upper()}{' with double quantisation' * double}"
    assert f"7 tensors in {in_words}, dequantised to bf16" in capsys.readouterr().err
    assert "quantization_config" not in read_json(out / "config.json")
    stored, found = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    n = 0
    for name, tensor in found.items():
        state = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}
        n += bool(state)
        theirs = stored[name]
        if state:
            theirs = bnb.dequantize_4bit(theirs, bnb.QuantState.from_dict(state, torch.device("cpu")))
        assert torch.equal(tensor, theirs.bfloat16() if state else theirs), name
    assert n == 7
    assert_close(
        logits(load_model(out, torch.float32)),
        logits(tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)),
    )


def test_a_multimodal_checkpoint_in_fp8_as_ministral_3_is_published(tmp_path, tokenizer_dir):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    text = SHAPE | {"model_type": "ministral3", "tie_word_embeddings": False, "pad_token_id": None}
    config = tf.Mistral3Config(
        text_config=text | {"rope_parameters": {**rope, "llama_4_scaling_beta": 0.1}},
        vision_config=VISION,
        image_token_index=300,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    source = fp8(tmp_path / "fp8", tokenizer_dir, model=tf.Mistral3ForConditionalGeneration(config))
    with pytest.raises(
        UserError, match=r"quant_method 'fp8'.*python scripts/convert_to_litmini.py .*fp8 --out_dir .*fp8-bf16"
    ):
        load_model(source)
    out = convert(source, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    towers = [name for name in after if "language_model" not in name]
    assert towers and all(torch.equal(before[name], after[name]) for name in towers)
    assert not any("scale" in name for name in after)
    theirs, info = tf.Mistral3ForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits(load_model(out, torch.float32)), logits(theirs.eval()))


def test_experts_in_fp8_one_by_one_as_qwen_3_5_is_published(tmp_path, tokenizer_dir):
    """The bf16 checkpoints have them stacked, and so has the result; what is carried through is dequantised as well."""
    shape = {key: SHAPE[key] for key in SHAPE if key != "intermediate_size"} | {"num_hidden_layers": 2, "head_dim": 32}
    shape |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    shape |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    shape |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    torch.manual_seed(0)
    model = tf.Qwen3_5MoeForCausalLM(tf.Qwen3_5MoeTextConfig(**shape, num_experts_per_tok=2))
    source = fp8(tmp_path / "fp8", tokenizer_dir, [16, 32], model)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn and tensors[f"{name}_scale_inv"].shape == (4, 1)
    carried = {f"mtp.{key}": tensors[key].clone() for key in (name, f"{name}_scale_inv")}
    save_file(tensors | carried, source / "model.safetensors", metadata={"format": "pt"})
    out = convert(source, tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert not any("scale" in key or ".experts.3." in key for key in after if not key.startswith("mtp."))
    stacked = after["model.layers.0.mlp.experts.down_proj"]
    assert stacked.shape == (4, 64, 32) and torch.equal(stacked[3], after[f"mtp.{name}"])
    settings = tf.FineGrainedFP8Config(weight_block_size=[16, 32], dequantize=True, activation_scheme="static")
    theirs = tf.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.bfloat16)
    assert torch.equal(theirs.model.layers[0].mlp.experts.down_proj, stacked)
    assert_close(logits(load_model(out, torch.float32)), logits(theirs.float()))


def test_raw_fp8_is_refused_everywhere(tmp_path, tokenizer_dir):
    source = fp8(tmp_path / "fp8", tokenizer_dir)
    tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if "scale" not in n}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{NAME}_scale_inv is missing, expected bfloat16 or float16 or float32"):
        convert(source, tmp_path / "out")
    edit(source, quantization_config=None)
    for way in (load_model, lambda path: export(path, tmp_path / "out"), lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(
            UserError, match=f"{NAME} is float8_e4m3fn, expected floating point of 16 bits or more, or the scales"
        ):
            way(source)
    assert not (tmp_path / "out").exists()


def state_of(tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    key = next(name for name in tensors if name.startswith(f"{NAME}.quant_state"))
    return SimpleNamespace(key=key, value=json.loads(bytes(tensors[key].tolist())))


def put_state(tensors: dict[str, torch.Tensor], **changes) -> None:
    state = state_of(tensors)
    tensors[state.key] = torch.tensor(list(json.dumps(state.value | changes).encode()), dtype=torch.uint8)


BROKEN = {
    "unknown quant_method": (
        "fp8",
        {"quant_method": "awq"},
        None,
        r"quant_method 'awq'.*expected one of: fp8, mxfp4, bits",
    ),
    "no quant_method": ("fp8", {"bits": 4}, None, "quant_method 'None'"),
    "no settings": ("fp8", [1], None, r"quant_method '\[1\]'"),
    "a list": ("fp8", {"quant_method": ["fp8"]}, None, "which is not read"),
    "block of nothing": (
        "fp8",
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        None,
        r"weight_block_size = \[0, 128\]",
    ),
    "other scales": ("fp8", {"quant_method": "fp8", "scale_fmt": "ue8m0"}, None, "scale_fmt = 'ue8m0' is not read"),
    "8 bits": ("nf4", {"quant_method": "bitsandbytes", "load_in_8bit": True}, None, "load_in_8bit = True is not read"),
    "scale of another shape": (
        "fp8",
        None,
        lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 2)}),
        rf"{NAME}_scale_inv is float32 \(2, 2\), expected .* \(1, 1\)",
    ),
    "scale in integers": (
        "fp8",
        None,
        lambda t: t.update({f"{NAME}_scale_inv": torch.ones((), dtype=torch.int32)}),
        "is int32",
    ),
    "scale of a vector": (
        "fp8",
        None,
        lambda t: t.update({"x": torch.ones(3).to(torch.float8_e4m3fn)}),
        "expected a matrix",
    ),
    "scale that is NaN": (
        "fp8",
        None,
        lambda t: t.update({f"{NAME}_scale_inv": torch.tensor(torch.nan)}),
        f"NaN or infinite values in {NAME}_scale_inv",
    ),
    "scale without a weight": (
        "fp8",
        None,
        lambda t: t.update({"a_scale_inv": torch.ones(1)}),
        "unexpected a_scale_inv",
    ),
    "integers": (
        "fp8",
        None,
        lambda t: t.update({"a.qweight": torch.ones(2, dtype=torch.int32)}),
        "a.qweight is int32, which",
    ),
    "no absmax": ("nf4", None, lambda t: t.pop(f"{NAME}.absmax"), f"{NAME}.absmax is missing"),
    "short absmax": (
        "nf4",
        None,
        lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}),
        r"expected uint8 \(128,\)",
    ),
    "no weight": ("nf4", None, lambda t: t.pop(NAME), f"{NAME} is missing, expected 4096 bytes"),
    "short weight": ("nf4", None, lambda t: t.update({NAME: t[NAME][:-1]}), f"{NAME} is 4095 bytes, expected 4096"),
    "no state": (
        "nf4",
        None,
        lambda t: t.pop(state_of(t).key),
        f"{NAME} is uint8, which nothing beside it gives values",
    ),
    "state that is no JSON": (
        "nf4",
        None,
        lambda t: t.update({state_of(t).key: torch.tensor([123, 255], dtype=torch.uint8)}),
        "is no JSON",
    ),
    "state of another type": ("nf4", None, lambda t: put_state(t, quant_type="fp4"), "quant_type is not 'nf4'"),
    "state without a shape": ("nf4", None, lambda t: put_state(t, shape=[-1, 64]), r"shape = \[-1, 64\]"),
    "state of another shape": ("nf4", None, lambda t: put_state(t, shape=[64, 64]), "expected 2048 bytes"),
    "state with odd blocks": ("nf4", None, lambda t: put_state(t, blocksize=0), "blocksize = 0, expected one of"),
    "state with blocks in a list": ("nf4", None, lambda t: put_state(t, nested_blocksize=[64]), "nested_blocksize = "),
    "state in another dtype": ("nf4", None, lambda t: put_state(t, dtype="int8"), "dtype = 'int8'"),
    "state with an infinite offset": (
        "nf4",
        None,
        lambda t: put_state(t, nested_offset=float("inf")),
        "nested_offset = inf",
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantised")
    return {"fp8": fp8(place / "fp8", tokenizer_dir), "nf4": in_4_bits(place / "nf4", tokenizer_dir)}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(sources, tmp_path, case):
    kind, settings, change, message = BROKEN[case]
    source = tmp_path / "source"
    shutil.copytree(sources[kind], source)
    if settings is not None:
        edit(source, quantization_config=settings)
    if change is not None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_weights_are_read_from_safetensors_only(sources, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sources["fp8"], source, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"a": torch.ones(1)}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="quantised weights are read from safetensors files only"):
        convert(source, tmp_path / "out")
