"""Export and merging: another dtype, other shards, an adapter added to the weights; the same logits."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from numerics import assert_close, ulps
from safetensors.torch import load_file, save_file

import litmini
from litmini.checkpoints.export import export, merge_error, parse_size
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.peft import save_adapter
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.files import read_json
from litmini.methods.adapters import add_adapters
from litmini.methods.lora import LoRALinear
from litmini.models import llama
from litmini.tokenizer import Tokenizer

TOKENS = torch.tensor([[5, 300, 17, 17, 260, 511, 4, 99]])


def make_adapter(
    base: Path, directory: Path, targets: list[str], rank: int = 4, alpha: float = 12.0, std: float = 0.05
) -> Path:
    """An adapter with random A and B over `base`, as a run would save it."""
    config = LoraConfig(rank, alpha, 0.0, targets)
    model = load_model(base, torch.float32)
    add_adapters(model, config)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=std)
    directory.mkdir(parents=True)
    save_adapter(model, directory, base=str(base))
    return directory


@pytest.fixture
def adapter(tiny_dir, tmp_path) -> Path:
    return make_adapter(tiny_dir, tmp_path / "adapter", ["all-linear", "lm_head"])


@pytest.fixture
def tied_dir(tokenizer_dir, tmp_path) -> Path:
    """The tiny checkpoint with its head tied to the embedding."""
    config = dataclasses.replace(llama.PRESETS["tiny"], tied=True)
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(1))
    directory = tmp_path / "tied"
    directory.mkdir()
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    save_model(directory, llama.config_to_hf(config), tensors, side_files=tokenizer_dir)
    return directory


@torch.no_grad()
def logits(directory: Path, adapter_dir: Path | None = None, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return litmini.load(directory, adapter_dir, dtype="fp32")[0](tokens)


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        export(*args, **options)
    return str(error.value)


def test_export_without_adapter_changes_nothing(tiny_dir, tmp_path):
    out = export(tiny_dir, tmp_path / "sub" / "out")
    before, after = load_file(tiny_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(out / "config.json") == read_json(tiny_dir / "config.json")
    assert {p.name for p in tiny_dir.iterdir()} == {p.name for p in out.iterdir()}
    assert (out / "chat_template.jinja").read_bytes() == (tiny_dir / "chat_template.jinja").read_bytes()


def test_dtype_and_shards(tiny_dir, tmp_path):
    out = export(tiny_dir, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=50_000)
    assert len(shards(out)) > 2 and all(p.stat().st_size < 80_000 for p in shards(out))
    before = load_file(tiny_dir / "model.safetensors")
    for name, tensor in read_tensors(shards(out)):
        assert torch.equal(tensor, before.pop(name).bfloat16())
    assert not before and read_json(out / "config.json")["dtype"] == "bfloat16"
    again = export(out, tmp_path / "again", dtype=torch.float32)  # and from shards
    assert read_json(again / "config.json")["dtype"] == "float32" and len(shards(again)) == 1


@pytest.mark.parametrize("shard", [5 * 10**9, 50_000])
def test_merged_equals_unmerged(tiny_dir, adapter, tmp_path, shard):
    merged = export(tiny_dir, tmp_path / "merged", adapter, max_shard_bytes=shard)
    assert_close(logits(merged), logits(tiny_dir, adapter))
    assert (logits(tiny_dir) - logits(merged)).abs().max() > 1e-2  # it did something
    found = merge_error(tiny_dir, adapter, merged, "fp32")
    difference, same = found.difference, found.same
    assert found.expected
    assert difference <= ulps(scale=logits(merged).log_softmax(-1)) and same == 1
    assert not any("lora" in name for name, _ in read_tensors(shards(merged)))


def test_the_sum_is_rounded_once_to_the_dtype_that_is_wanted(tiny_dir, adapter, tmp_path):
    """By chance, the same way each time: weights in 16 bits keep small changes in the mean."""
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = load_file(export(tiny_dir, tmp_path / "exact", adapter) / "model.safetensors")[name]
    half = export(tiny_dir, tmp_path / "half", dtype=torch.bfloat16)
    change = exact - load_file(tiny_dir / "model.safetensors")[name]
    for base, dtype in ((tiny_dir, torch.bfloat16), (half, torch.bfloat16), (half, torch.float32)):
        merged = export(base, tmp_path / "merged", adapter, dtype=dtype)
        found = load_file(merged / "model.safetensors")[name]
        before = load_file(base / "model.safetensors")[name].float()
        spacing = 2.0 ** (torch.frexp(before + change).exponent - 8) if dtype == torch.bfloat16 else 2e-7
        assert found.dtype == dtype and ((found.float() - (before + change)).abs() < spacing).all()
        again = export(base, tmp_path / "again", adapter, dtype=dtype)
        assert torch.equal(load_file(again / "model.safetensors")[name], found)
        shutil.rmtree(merged)
        shutil.rmtree(again)


def test_small_changes_survive_a_merge_into_16_bits(tiny_dir, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: t * (1e-4 if "lora_B" in k else 1) for k, t in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    half = export(tiny_dir, tmp_path / "half", dtype=torch.bfloat16)
    parts = []
    for dtype in (torch.float32, torch.bfloat16):
        merged = load_file(export(half, tmp_path / str(dtype), adapter, dtype=dtype) / "model.safetensors")
        base = load_file(half / "model.safetensors")
        parts.append(torch.cat([(merged[k].float() - base[k].float()).flatten() for k in base if "proj" in k]))
    exact, found = parts
    assert ((found * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=0.1)
    weights = torch.cat([base[k].float().flatten() for k in base if "proj" in k])
    assert (exact.abs() < weights.abs() * 2**-9).float().mean() > 0.8, "to the nearest, most would be lost"


def test_an_adapted_tied_head_unties(tied_dir, tmp_path):
    adapter = make_adapter(tied_dir, tmp_path / "a", ["lm_head", "q_proj"])
    merged = export(tied_dir, tmp_path / "merged", adapter)
    tensors, base = load_file(merged / "model.safetensors"), load_file(tied_dir / "model.safetensors")
    assert "lm_head.weight" not in base
    assert read_json(merged / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(tensors["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert_close(logits(merged), logits(tied_dir, adapter))


def test_a_tie_that_no_adapter_touches_stays(tied_dir, tmp_path):
    adapter = make_adapter(tied_dir, tmp_path / "a", ["all-linear"])
    merged = export(tied_dir, tmp_path / "merged", adapter)
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert read_json(merged / "config.json")["tie_word_embeddings"] is True
    assert_close(logits(merged), logits(tied_dir, adapter))


def test_the_template_of_the_training_travels(tiny_dir, adapter, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    Tokenizer(tiny_dir, str(template)).save(adapter)
    merged = export(tiny_dir, tmp_path / "merged", adapter)
    assert (merged / "chat_template.jinja").read_text() == template.read_text()


def change_adapter(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_of_another_base_names_all_that_does_not_fit(tiny_dir, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    layer = "base_model.model.model.layers.0"
    tensors[f"{layer}.mlp.up_proj.lora_A.weight"] = torch.ones(4, 7)
    tensors[f"{layer}.mlp.down_proj.lora_B.weight"] = torch.ones(9, 4)
    for kind, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"{layer}.extra_proj.lora_{kind}.weight"] = torch.ones(shape)
    save_file(tensors, file)
    message = refused(tiny_dir, tmp_path / "out", adapter)
    assert "made for another base" in message
    assert "layers.0.mlp.up_proj.lora_A: adapter has (4, 7), the model wants (4, 64)" in message
    assert "layers.0.mlp.down_proj.lora_B: adapter has (9, 4), the model wants (64, 4)" in message
    assert "layers.0.extra_proj: the model has no such linear" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_rank_that_lies_is_refused(tiny_dir, adapter, tmp_path):
    change_adapter(adapter, r=8)  # the scale alpha / r would be wrong
    assert "adapter has (4, 64), the model wants (8, 64)" in refused(tiny_dir, tmp_path / "out", adapter)


def test_an_out_dir_that_exists_is_never_touched(tiny_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "exists already" in refused(tiny_dir, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "file").write_text("")
    assert "exists already" in refused(tiny_dir, tmp_path / "file")


def test_an_incomplete_or_damaged_base_writes_nothing(tiny_dir, tmp_path):
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    message = refused(base, tmp_path / "out")
    assert "missing model.layers.0.mlp.up_proj.weight" in message and "model.norm.weight has shape (3,)" in message
    (base / "model.safetensors").write_bytes(b"junk")
    assert "damaged" in refused(base, tmp_path / "out")
    assert "checkpoint directory not found" in refused(tmp_path / "none", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_a_checkpoint_is_no_adapter_and_the_other_way_round(tiny_dir, adapter, tmp_path):
    assert "is no adapter directory" in refused(tiny_dir, tmp_path / "out", tiny_dir)
    assert "is an adapter, not a checkpoint" in refused(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("7", 7), (" 2 g ", 2 * 10**9)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-5GB", "0", "0.1", "GB", "5 GB GB", "1e9", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="such as 5GB"):
        parse_size(text)


@pytest.mark.real
def test_peft_and_transformers_agree_on_the_real_model(smollm2, tmp_path):
    import peft
    import transformers

    adapter = make_adapter(smollm2, tmp_path / "adapter", ["q_proj", "v_proj", "down_proj"], rank=8, std=0.02)
    tokens = torch.tensor([Tokenizer(smollm2).encode("The capital of France is Paris, and def f(n): return n * 2")])
    ours = logits(smollm2, adapter, tokens)
    assert (ours - logits(smollm2, tokens=tokens)).abs().max() > 0.1  # it did something
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        assert_close(ours, theirs(tokens).logits)
    del base, theirs
    merged = export(smollm2, tmp_path / "merged", adapter, dtype=torch.float32)
    ours = logits(merged, tokens=tokens)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.float32 and not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    with torch.no_grad():
        assert_close(ours, model(tokens).logits)
    assert_close(ours, logits(smollm2, adapter, tokens))
