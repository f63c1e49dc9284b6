"""Requirement 44: text parts of multimodal checkpoints, against transformers and PEFT over the whole model."""

import json
import re
import runpy
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from numerics import assert_close
from safetensors.torch import load_file, save_file

from litmini.checkpoints.classifier import check_scored
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
from litmini.generation.multi_adapter import MultiLoRA
from litmini.importers.convert import convert
from litmini.methods.adapters import adapters, add_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.heads import use_scores
from litmini.methods.ia3 import add_ia3
from litmini.methods.trainable_tokens import add_tokens
from litmini.tokenizer import Tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
IMAGE = 500  # the token that stands for a patch
TOKENS = torch.tensor([[5, 300, 17, 17, 260, 480, 4, 99, 31, 32, 33, 34]])
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
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


def mistral3(**text) -> transformers.PreTrainedModel:
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "tie_word_embeddings": False} | text,
        vision_config=vision,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def ministral3() -> transformers.PreTrainedModel:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
    return mistral3(model_type="ministral3", pad_token_id=None, rope_parameters={**rope, "llama_4_scaling_beta": 0.7})


def smolvlm() -> transformers.PreTrainedModel:
    config = transformers.SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama", "pad_token_id": 0},
        vision_config=VISION,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma4() -> transformers.PreTrainedModel:
    text = TEXT | {"model_type": "gemma4_text", "num_hidden_layers": 4, "sliding_window": 8, "pad_token_id": 0}
    text |= {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    }
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "use_double_wide_mlp": True}
    text |= {"use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0}
    vision = {
        key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
    ids = {"image_token_id": IMAGE, "boi_token_id": 501, "eoi_token_id": 502}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    return transformers.Gemma4ForConditionalGeneration(config)


KINDS = {"gemma3": gemma3, "gemma3, names of transformers 5": gemma3, "mistral3": mistral3, "smolvlm": smolvlm}
KINDS |= {"mistral3 around ministral3": ministral3, "gemma4": gemma4}


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


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "mistral3 around ministral3"])
def test_an_image_prompt_gives_what_the_change_of_the_text_part_implies(bases, tmp_path, kind):
    base = bases[kind]
    directory = saved(adapted(base, "lora"), base, tmp_path / "adapter")
    merged = whole(export(base, tmp_path / "merged", directory))
    size = torch.tensor([[16, 16]])
    image = {"pixel_values": torch.randn(1, 3, 16, 16)} | ({"image_sizes": size} if kind.startswith("mistral3") else {})
    tokens = torch.tensor([[7, 501, *[IMAGE] * 4, 502, 9, 10]])
    theirs = peft.PeftModel.from_pretrained(whole(base), directory).eval()
    found, expected = logits(merged, tokens, **image), peft_logits(theirs, tokens, **image)
    assert_close(found, expected)
    other = {**image, "pixel_values": -image["pixel_values"]}
    assert (logits(merged, tokens, **other) - found).abs().max() > 1e-3
    assert (logits(whole(base), tokens, **image) - found).abs().max() > 1e-2


def run(script: str, monkeypatch, **settings) -> None:
    """Run a script's command line in this process."""
    words = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
    monkeypatch.setattr("sys.argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert not end.value.code, end.value.code


def finetune(script: str, base: Path, place: Path, monkeypatch, **more) -> Path:
    messages = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One, and then two."}]
    (place / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    settings = {"data__path": place / "train.jsonl", "data__max_seq_len": 64, "train__global_batch_size": 2}
    settings |= {"train__max_steps": 2, "optim__lr": 0.01, "eval__samples": 0, "precision": "32-true"}
    run(script, monkeypatch, checkpoint_dir=base, out_dir=place / script, **{**settings, **more})
    return place / script / "final"


def test_full_finetuning_changes_the_text_part_alone_and_resumes(bases, tmp_path, monkeypatch):
    base = bases["gemma3"]
    final = finetune("finetune_full", base, tmp_path, monkeypatch, train__save_every=1)
    check_all_but_text_is_carried(base, final)
    assert_close(logits(whole(final)), logits(load_model(final, torch.float32)))
    assert (logits(whole(final)) - logits(whole(base))).abs().max() > 0.01
    config = json.loads((final / "config.json").read_text())
    assert config["dtype"] == "float32" and config["model_type"] == "gemma3"

    after = dict(read_tensors(shards(final)))
    shutil.rmtree(final)
    shutil.rmtree(final.parent / "step-000002", ignore_errors=True)
    finetune("finetune_full", base, tmp_path, monkeypatch, train__save_every=1, resume="auto")
    resumed = dict(read_tensors(shards(final)))
    assert after.keys() == resumed.keys() and all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "ia3"])
def test_every_method_trains_it_and_every_reader_takes_the_result(bases, tmp_path, monkeypatch, capsys, method):
    base = bases["mistral3"]
    adapter = finetune(f"finetune_{method}", base, tmp_path, monkeypatch)
    merged = tmp_path / "merged"
    run("merge_adapter", monkeypatch, checkpoint_dir=base, adapter_dir=adapter, out_dir=merged)
    check_all_but_text_is_carried(base, merged)
    assert_close(logits(whole(merged)), logits(load_model(merged, torch.float32)))
    run("generate", monkeypatch, checkpoint_dir=merged, prompt="Say one.", max_new_tokens=2)
    if method == "lora":
        written = tmp_path / "written"
        monkeypatch.setattr("sys.argv", ["convert_to_hf", str(adapter.parent), "--out_dir", str(written)])
        with pytest.raises(SystemExit):
            runpy.run_path(str(SCRIPTS / "convert_to_hf.py"), run_name="__main__")
        assert "pipeline_tag: image-text-to-text" in (written / "README.md").read_text()
        assert torch.equal(logits(whole(written)), logits(whole(merged)))
        monkeypatch.setattr("sys.argv", ["verify", str(base), "--adapter_dir", str(adapter)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / "verify.py"), run_name="__main__")
        assert not end.value.code
        assert re.search("logits = peft, fp32 +ok", capsys.readouterr().out)


def test_shards_dtypes_and_other_files_are_converted_around_the_towers(base, tmp_path):
    small = export(base, tmp_path / "small", dtype=torch.bfloat16, max_shard_bytes=40_000)
    assert len(shards(small)) > 2
    check_all_but_text_is_carried(base, small)
    assert json.loads((small / "config.json").read_text())["dtype"] == "bfloat16"
    assert_close(logits(whole(small)), logits(load_model(small, torch.float32)))

    tensors = dict(read_tensors(shards(base)))
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors, pickled / "pytorch_model.bin")
    found = dict(read_tensors(shards(convert(pickled, tmp_path / "converted"))))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    check_all_but_text_is_carried(base, tmp_path / "converted")


def test_a_tied_head_that_an_adapter_changes_gets_weights_of_its_own(bases, tmp_path):
    base = bases["gemma3"]
    ours = load_model(base, torch.float32)
    add_adapters(ours, LoraConfig(4, 8.0, 0.0, ["q_proj", "lm_head"]))
    for layer in adapters(ours).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    directory = saved(ours, base, tmp_path / "adapter")
    assert_close(peft_logits(peft.PeftModel.from_pretrained(whole(base), directory).eval()), logits(ours))
    merged = export(base, tmp_path / "merged", directory)
    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert_close(logits(whole(merged)), logits(ours))
    assert_close(logits(load_model(merged, torch.float32)), logits(ours))


@pytest.mark.parametrize("own_head", [True, False])
def test_a_config_that_says_nothing_of_a_tie_means_what_the_weights_are(bases, tmp_path, own_head):
    """As Mistral Small 3.1 is published: transformers ties it by default, and unties it for its weights."""
    silent = tmp_path / "silent"
    shutil.copytree(bases["mistral3"], silent)
    config = json.loads((silent / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (silent / "config.json").write_text(json.dumps(config))
    if not own_head:
        tensors = {n: t for n, t in load_file(silent / "model.safetensors").items() if "lm_head" not in n}
        save_file(tensors, silent / "model.safetensors", metadata={"format": "pt"})
    model, theirs = load_model(silent, torch.float32), whole(silent)
    assert (model.lm_head.weight is model.model["embed_tokens"].weight) is not own_head
    assert_close(logits(model), logits(theirs))
    written = export(silent, tmp_path / "written")
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is not own_head
    assert_close(logits(whole(written)), logits(theirs))


def test_the_template_of_a_processor_is_read_and_never_left_beside_that_of_training(bases, tmp_path):
    """transformers prefers chat_template.json to chat_template.jinja: the old template would win."""
    processor = tmp_path / "processor"
    shutil.copytree(bases["mistral3"], processor)
    template = (processor / "chat_template.jinja").read_text()
    (processor / "chat_template.jinja").rename(tmp_path / "other.jinja")
    (processor / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Tokenizer(processor).chat_template == template
    for result in (export(processor, tmp_path / "written"), convert(processor, tmp_path / "converted")):
        assert (result / "chat_template.jinja").read_text() == template
        assert not (result / "chat_template.json").exists()


def test_a_head_that_is_missing_is_named(bases, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bases["mistral3"], broken)
    tensors = {n: t for n, t in load_file(broken / "model.safetensors").items() if "lm_head" not in n}
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match="missing lm_head.weight"):
        load_model(broken)


def test_a_vocabulary_grows(bases, tmp_path):
    out = tmp_path / "more"
    extend_vocabulary(bases["mistral3"], out, ["<|city|>"])
    check_all_but_text_is_carried(bases["mistral3"], out)
    model, theirs = load_model(out, torch.float32), whole(out)
    tokens = torch.tensor([[5, 512, 7, 9]])
    assert theirs.config.text_config.vocab_size == 513 and model.config.vocab_size == 513
    assert_close(logits(model, tokens), logits(theirs, tokens))


def test_an_adapter_of_transformers_4_is_read(bases, tmp_path):
    base = bases["mistral3"]
    ours = adapted(base, "dora")
    directory = saved(ours, base, tmp_path / "adapter")
    file, settings = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(file)
    save_file({n.replace("model.language_model.", "language_model.model."): t for n, t in tensors.items()}, file)
    names = sorted({name.split(".")[-3] for name in tensors if "lora_A" in name})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_modules": names}))
    assert torch.equal(logits(load(base, directory, dtype="fp32")[0]), logits(ours))


def test_new_tokens_and_several_adapters(bases, tmp_path):
    base = bases["gemma3"]
    model, tokenizer = load_model(base, torch.float32), Tokenizer(base, new_tokens=["<|city|>"])
    add_adapters(model, LoraConfig(4, 8.0, 0.0, ["q_proj"]))
    add_tokens(model, tokenizer.new_tokens.ids, tokenizer.new_tokens.known)
    for layer in adapters(model).values():
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            parameter.data += torch.randn_like(parameter) * 0.1
    directory = saved(model, base, tmp_path / "tokens")
    tokenizer.save(directory)
    tokens = torch.tensor([[5, 512, 7, 9]])
    theirs = whole(base)
    theirs.resize_token_embeddings(513, mean_resizing=False)
    expected = logits(model, tokens)
    assert_close(peft_logits(peft.PeftModel.from_pretrained(theirs, directory).eval(), tokens), expected)
    merged = export(base, tmp_path / "merged", directory)
    check_all_but_text_is_carried(base, merged)
    assert_close(logits(whole(merged), tokens), expected)

    plain = adapted(base, "lora")
    several = MultiLoRA(load_model(base, torch.float32))
    several.add("one", saved(plain, base, tmp_path / "one"))
    with several.use(["one"]):
        assert_close(logits(several.model), logits(plain))


def test_a_classifier_loads_where_transformers_has_one(bases, tmp_path, monkeypatch):
    lines = [{"text": f"number {i}", "label": ["odd", "even"][i % 2]} for i in range(6)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapted = {"data__path": tmp_path / "labelled.jsonl"}
    data = adapted | {"lora": "null"}
    (tmp_path / "other").mkdir()
    final = finetune("finetune_classifier", bases["gemma3"], tmp_path, monkeypatch, **data)
    model = whole(final)
    assert type(model).__name__ == "Gemma3ForSequenceClassification" and model.config.num_labels == 2
    check_scored(bases["gemma3"])
    with pytest.raises(UserError, match="of model_type 'mistral3', of which transformers has no sequence classifier"):
        check_scored(bases["mistral3"])

    adapter = finetune("finetune_classifier", bases["gemma3"], tmp_path / "other", monkeypatch, **adapted)
    settings = transformers.AutoConfig.from_pretrained(adapter)
    kind = transformers.AutoModelForSequenceClassification
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(bases["gemma3"], config=settings), adapter).eval()
    assert theirs.base_model.model.score.modules_to_save["default"].weight.any()
    ours = load_model(bases["gemma3"], torch.float32)
    use_scores(ours, 2)
    load_adapter(ours, adapter)
    labels = torch.full_like(TOKENS, -100)
    labels[0, -1] = 0
    with torch.no_grad():
        assert_close(ours(TOKENS, labels=labels)[0], peft_logits(theirs))


def test_what_peft_trained_over_a_tower_too_is_refused(bases, tmp_path):
    base = bases["gemma3"]
    model = peft.get_peft_model(whole(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="vision_tower.*the model has no such linear"):
        load(base, tmp_path / "theirs", dtype="fp32")


def change(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("config", "drop", "rename", "expected"),
    [
        ({"text_config": None}, "", "", "whose text part is not there: expected text_config"),
        (
            {"text_config": {"model_type": "llama4_text"}},
            "",
            "",
            "its text part, model_type 'llama4_text', is not impl",
        ),
        ({"text_config": TEXT | {"model_type": "glm4v_text"}}, "", "", "All else would be carried through"),
        ({"model_type": "paligemma"}, "", "", "attends to its prompt in both directions"),
        ({"quantization_config": {"quant_method": "fp8"}}, "", "", "quantization_config"),
        (
            {},
            "language_model",
            "",
            "the text part is not in the weights beside it: expected tensors language_model.mod",
        ),
        ({}, "vision", "", "no tensor of vision_config.* loaded as Gemma3ForConditionalGeneration"),
        ({}, "layers.1.mlp.up_proj", "", "missing model.layers.1.mlp.up_proj.weight"),
        ({}, "", "model.language_model.layers.0.norm", "two text parts"),
        ({}, "", "language_model.model.layers.9.norm", "unexpected model.layers.9.norm"),
    ],
)
def test_what_is_not_a_whole_text_part_is_refused(bases, tmp_path, config, drop, rename, expected):
    broken = tmp_path / "broken"
    shutil.copytree(bases["gemma3"], broken)
    change(broken, **config)
    tensors = load_file(broken / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not drop or drop not in name}
    tensors |= {rename: torch.zeros(3)} if rename else {}
    save_file(tensors, broken / "model.safetensors")
    for read in (lambda: load_model(broken), lambda: export(broken, tmp_path / "out")):
        with pytest.raises(UserError, match=expected):
            read()


def test_a_tensor_of_a_tower_that_a_shard_lacks_is_named(bases, tmp_path):
    sharded = export(bases["gemma3"], tmp_path / "sharded", max_shard_bytes=40_000)
    for file in shards(sharded):
        tensors = load_file(file)
        lost = sorted(name for name in tensors if "vision" in name)
        if lost:
            save_file({name: tensor for name, tensor in tensors.items() if name != lost[0]}, file)
            break
    with pytest.raises(UserError, match=f"names tensors that its files lack: {lost[0]}"):
        export(sharded, tmp_path / "out")
    with pytest.raises(UserError, match="names tensors that its files lack"):
        load_model(sharded)


def test_a_config_without_weights_is_enough_to_estimate(bases, tmp_path):
    shutil.copy(bases["gemma3"] / "config.json", tmp_path)
    _, model = empty_model(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for n, p in gemma3().named_parameters() if "language_model" in n
    )


def test_save_trained_keeps_the_names_of_the_base(base, tmp_path):
    save_trained(load_model(base, torch.float32), tmp_path, base)
    before, after = (dict(read_tensors(shards(d))) for d in (base, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
