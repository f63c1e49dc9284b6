"""Requirement 44: text parts of multimodal checkpoints, against transformers and PEFT over the whole model."""

import json
import runpy
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from numerics import assert_close
from safetensors.torch import load_file, save_file

from litmini.checkpoints.config import empty_model
from litmini.checkpoints.export import export
from litmini.checkpoints.extend import extend_vocabulary
from litmini.checkpoints.hf import load_model, save_trained
from litmini.checkpoints.load import load
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.config.finetune import Ia3Config, LoraConfig
from litmini.errors import UserError
from litmini.evaluation.verify import check_bits
from litmini.importers.convert import convert
from litmini.methods.adapters import add_adapters, adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.ia3 import add_ia3

SCRIPTS = Path(__file__).parents[2] / "scripts"
IMAGE = 500  # the token that stands for a patch
TOKENS = torch.tensor([[5, 300, 17, 17, 260, 480, 4, 99, 31, 32, 33, 34]])
TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def gemma3() -> transformers.PreTrainedModel:
    text = TEXT | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0}
    ids = {"image_token_index": IMAGE, "boi_token_index": 501, "eoi_token_index": 502}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3() -> transformers.PreTrainedModel:
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "tie_word_embeddings": False},
        vision_config=vision,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def smolvlm() -> transformers.PreTrainedModel:
    config = transformers.SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama", "pad_token_id": 0},
        vision_config=VISION,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


KINDS = {"gemma3": gemma3, "gemma3, names of transformers 5": gemma3, "mistral3": mistral3, "smolvlm": smolvlm}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    """Tiny multimodal checkpoints in fp32, with towers in bf16, and the files of a processor."""
    made = {}
    for kind, build in KINDS.items():
        torch.manual_seed(1)
        model, made[kind] = build(), tmp_path_factory.mktemp("base")
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data += "norm" in name
        model.save_pretrained(made[kind])
        tensors = load_file(made[kind] / "model.safetensors")
        if kind.endswith("5"):
            tensors = {in_transformers_5(name): tensor for name, tensor in tensors.items()}
        tensors = {n: t if is_text(n) else t.bfloat16() for n, t in tensors.items()}
        save_file(tensors, made[kind] / "model.safetensors", metadata={"format": "pt"})
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, made[kind])
        (made[kind] / "preprocessor_config.json").write_text('{"image_processor_type": "any",  "size": 16}')
    return made


@pytest.fixture(params=KINDS)
def base(bases, request) -> Path:
    return bases[request.param]


def in_transformers_5(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.removeprefix("language_model.model.")
    return f"model.{name}" if name.startswith(("vision", "multi")) else f"model.language_model.{name}"


def is_text(name: str) -> bool:
    return any(part in name for part in ("language_model", "text_model", "lm_head"))


def whole(directory: Path) -> transformers.PreTrainedModel:
    """The model under its original class; every tensor is there, and none is left over."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS, **inputs) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=tokens, **inputs) if isinstance(model, transformers.PreTrainedModel) else model(tokens)
    return getattr(out, "logits", out)


def peft_logits(model: peft.PeftModel, tokens: torch.Tensor = TOKENS, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


def adapted(base: Path, method: str) -> torch.nn.Module:
    """The text part with a random adapter."""
    model = load_model(base, torch.float32)
    if method == "ia3":
        add_ia3(model, Ia3Config(["k_proj", "v_proj"], ["down_proj"]))
    else:
        # modules in full need their whole names in PEFT's settings; ranks differ by layer
        more = {"modules_to_save": ["lm_head"]} if method == "lora" and not model.config.tied else {}
        add_adapters(model, LoraConfig(4, 8.0, 0.0, **more), DoRALinear if method == "dora" else None)
    for layer in adapters(model).values():
        for parameter in (p for n, p in layer.named_parameters() if p.requires_grad and "magnitude" not in n):
            parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


def saved(model: torch.nn.Module, base: Path, directory: Path) -> Path:
    directory.mkdir()
    save_adapter(model, directory, str(base))
    return directory


def check_all_but_text_is_carried(base: Path, result: Path) -> None:
    before, after = (dict(read_tensors(shards(d))) for d in (base, result))
    others = {name for name in before if not is_text(name)}
    assert others and others == {name for name in after if not is_text(name)}
    for name in others:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    processor = "preprocessor_config.json"
    assert (base / processor).read_bytes() == (result / processor).read_bytes()
    old, new = (json.loads((d / "config.json").read_text()) for d in (base, result))
    assert (old["vision_config"], old["architectures"]) == (new["vision_config"], new["architectures"])


def test_it_is_loaded_alone_and_computes_what_the_whole_model_does(base):
    model = load_model(base, torch.float32)
    own = {name for name, _ in read_tensors(shards(base)) if is_text(name)}
    assert len(dict(model.named_parameters())) == len(own)
    assert_close(logits(model), logits(whole(base)))
    assert check_bits(base).passed and check_bits(base).measured["tensors"] == len(own)


def test_no_tensor_of_a_tower_is_read_in_training(bases, monkeypatch):
    from litmini.checkpoints import hf

    read = []

    def recorded(*args, **settings):
        for name, tensor in read_tensors(*args, **settings):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(hf, "read_tensors", recorded)
    load_model(bases["gemma3"], torch.float32)
    assert read and all(map(is_text, read))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_are_the_same_in_peft_and_merged(base, tmp_path, method):
    ours = adapted(base, method)
    directory = saved(ours, base, tmp_path / "adapter")
    expected = logits(ours)
    assert (expected - logits(load_model(base, torch.float32))).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(whole(base), directory).eval()
    names = [name for name, _ in theirs.named_modules() if name.endswith(("lora_A", "ia3_l"))]
    assert names and all(map(is_text, names)), "PEFT put layers over a tower"
    assert_close(peft_logits(theirs), expected)

    theirs.save_pretrained(tmp_path / "again")
    back = load_model(base, torch.float32)
    load_adapter(back, tmp_path / "again")
    assert torch.equal(logits(back), expected)

    merged = export(base, tmp_path / "merged", directory)
    check_all_but_text_is_carried(base, merged)
    assert_close(logits(whole(merged)), expected)
    assert_close(logits(load_model(merged, torch.float32)), expected)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_an_image_prompt_gives_what_the_change_of_the_text_part_implies(bases, tmp_path, kind):
    base = bases[kind]
    directory = saved(adapted(base, "lora"), base, tmp_path / "adapter")
    merged = whole(export(base, tmp_path / "merged", directory))
    size = torch.tensor([[16, 16]])
    image = {"pixel_values": torch.randn(1, 3, 16, 16)} | ({"image_sizes": size} if kind == "mistral3" else {})
    tokens = torch.tensor([[7, 501, *[IMAGE] * 4, 502, 9, 10]])
    theirs = peft.PeftModel.from_pretrained(whole(base), directory).eval()
    found, expected = logits(merged, tokens, **image), peft_logits(theirs, tokens, **image)
    assert_close(found, expected)
    other = {**image, "pixel_values": -image["pixel_values"]}
    assert (logits(merged, tokens, **other) - found).abs().max() > 1e-3
    assert (logits(whole(base), tokens, **image) - found).abs().max() > 1e-2
