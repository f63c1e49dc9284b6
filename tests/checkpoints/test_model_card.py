"""Results out: runs resolved, adapters merged or kept, model cards, the hub on request, and the way to GGUF."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from gguf_files import TEXTS, write_gguf
from hub_server import COMMIT, serve
from numerics import assert_close
from safetensors.torch import load_file
from test_download import use_hub
from test_export import make_adapter
from tokenizers import Tokenizer

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.model_card import export_adapter, model_card, push, resolve
from litmini.errors import UserError
from litmini.files import read_json
from litmini.importers.gguf.convert import import_gguf
from litmini.tokenizer import Tokenizer as OurTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import convert_to_hf  # the script

TOKENS = torch.tensor([[5, 300, 17, 17, 260, 511, 4, 99]])
MANIFEST = {
    "litmini": "0.1.0",
    "command": ["finetune_lora.py", "--config", "mine.yaml"],
    "versions": {"python": "3.11", "torch": "2.13"},
    "hardware": {"device": "cpu"},
    "data": {"data/mine.jsonl": {"sha256": "ab" * 32}},
    "seed": 1337,
    "results": {"val_loss_after": 0.0031234, "samples": ["x"], "exact_match_after": 1.0},
}


@pytest.fixture
def run(tiny_dir: Path, tmp_path: Path) -> Path:
    """The directory of a run, with an adapter."""
    directory = tmp_path / "run"
    make_adapter(tiny_dir, directory / "final", ["all-linear"])
    (directory / "config.yaml").write_text("seed: 1")
    manifest = MANIFEST | {"base": {"checkpoint_dir": str(tiny_dir), "source": None}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def convert(*words: str) -> None:
    convert_to_hf.main(convert_to_hf.ConvertConfig(*words))


@torch.no_grad()
def test_a_run_becomes_a_merged_checkpoint_with_a_card(run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    convert(str(run), str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(base, run / "final").eval()
    assert_close(theirs(TOKENS).logits, unmerged(TOKENS).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    head = huggingface_hub.ModelCard(card).data.to_dict()
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["litmini"]}
    for expected in (
        "with its adapter merged in",
        "finetune_lora.py --config mine.yaml",
        "| val_loss_after | 0.003123 |",
    ):
        assert expected in card
    assert "`mine.jsonl` | `abab" in card and "torch 2.13" in card and "samples" not in card


def test_an_adapter_is_kept_for_peft(run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Under the name that its base has on the hub, if it came from there."""
    result = resolve(run)
    assert (result.checkpoint, result.adapter, result.run) == (tiny_dir, run / "final", run)
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    (base / "source.json").write_text(json.dumps({"source": "acme/tiny"}))
    out = export_adapter(base, run / "final", tmp_path / "kept")
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "acme/tiny"
    before, after = (load_file(d / "adapter_model.safetensors") for d in (run / "final", out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    card = model_card(result._replace(checkpoint=base, run=None), "kept", adapter_kept=True)
    assert huggingface_hub.ModelCard(card).data.base_model == "acme/tiny" and "library_name: peft" in card
    convert_to_hf.main(convert_to_hf.ConvertConfig(str(run), str(tmp_path / "too"), merge=False))
    assert (tmp_path / "too" / "tokenizer.json").is_file() and not (tmp_path / "too" / "config.json").exists()
    with pytest.raises(UserError, match="exists already"):
        export_adapter(base, run / "final", out)


def test_a_step_of_full_finetuning_goes_without_its_state(tiny_dir: Path, tmp_path: Path) -> None:
    step = export(tiny_dir, tmp_path / "run" / "step-000020")
    export(tiny_dir, tmp_path / "run" / "step-000003")
    (tmp_path / "run" / "config.yaml").touch()
    for name in ("training_state.json", "training_state.safetensors"):
        (step / name).touch()
    assert resolve(tmp_path / "run").checkpoint == step
    convert(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").iterdir() if "state" in path.name]
    before, after = (load_file(d / "model.safetensors") for d in (tiny_dir, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_resolved(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"neither final/ nor step-\*: nothing was saved"):
        resolve(tmp_path / "empty")
    settings = read_json(run / "final" / "adapter_config.json")
    (run / "final" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone"}))
    with pytest.raises(UserError, match=r"its base gone does not exist: give the base .* --adapter"):
        resolve(run)
    with pytest.raises(UserError, match="push_to_hub is 'x'; expected ORG/NAME"):
        convert_to_hf.ConvertConfig("a", "b", push_to_hub="x")
    with pytest.raises(UserError, match="--merge false writes an adapter unchanged"):
        convert_to_hf.main(convert_to_hf.ConvertConfig(str(tmp_path), "b", merge=False))


def test_push_over_http(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Every byte arrives; without the flag nothing is sent; a refusal names what is already written."""
    secret = "hf_thisIsMySecretToken"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with serve({}) as hub:
        use_hub(monkeypatch, hub.url)
        convert(str(run), str(tmp_path / "quiet"))
        assert not hub.requests
        config = convert_to_hf.ConvertConfig(str(run), str(tmp_path / "out"), push_to_hub="me/mine")
        convert_to_hf.main(config)
        said = capfd.readouterr()
        assert f"on the hub: {hub.url}/me/mine/commit/{COMMIT}" in said.out and secret not in said.out + said.err
        assert hub.uploads == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        assert hub.authorizations - {""} == {f"Bearer {secret}"}
        hub.answers = {"/api/repos/create": (403, {"X-Error-Message": "no rights"})}
        with pytest.raises(UserError, match=r"quiet is written, but not on the hub: .*the token may not"):
            push(tmp_path / "quiet", "me/mine", private=True)


def test_the_way_to_gguf_and_back(run: Path, tmp_path: Path) -> None:
    """An export read as llama.cpp's converter reads it (transformers' tensors, its permutation, its names) is itself again."""
    out = export(resolve(run).checkpoint, tmp_path / "out", run / "final")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer, pre="gpt-2")
    (tmp_path / "back").mkdir()
    import_gguf(file, tmp_path / "back", torch.float32)
    before, after = (load_file(d / "model.safetensors") for d in (out, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        ours = [load_model(d, torch.float32)(TOKENS) for d in (out, tmp_path / "back")]
    assert torch.equal(*ours)


@pytest.mark.real
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set LLAMA_CPP to a directory with convert_hf_to_gguf.py")
def test_llama_cpps_own_converter(smollm2: Path, tmp_path: Path) -> None:
    """The real model, exported, through the program itself, and back: weights to the bit, tokens, template, stop tokens."""
    out = export(smollm2, tmp_path / "out")
    file = tmp_path / "a.gguf"
    script = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    words = [sys.executable, str(script), str(out), "--outfile", str(file), "--outtype", "bf16"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "back").mkdir()
    import_gguf(file, tmp_path / "back")
    before, after = (load_file(d / "model.safetensors") for d in (out, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = OurTokenizer(out), OurTokenizer(tmp_path / "back")
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.chat_template == theirs.chat_template and ours.stop_ids == theirs.stop_ids


def test_the_card_stays_through_merge_and_conversion(run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Data, base, method and results, after a merge and an export of it; what people wrote stays behind."""
    import merge_adapter

    manifest = read_json(run / "manifest.json")
    manifest |= {"method": "LoRA, rank 4", "date": "2026-11-30T02:03:04+00:00"}
    manifest["results"] |= {"samples_after": [{"prompt": "secret words"}]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    merged = tmp_path / "elsewhere/merged"
    merged.parent.mkdir()
    merge_adapter.main(merge_adapter.MergeConfig(str(tiny_dir), str(run / "final"), str(merged), check=False))
    shutil.rmtree(run)
    convert(str(merged), str(tmp_path / "exported"))
    cards = [(directory / "README.md").read_text() for directory in (merged, tmp_path / "exported")]
    for card in cards:
        for expected in (
            "mine.jsonl",
            "ab" * 32,
            "LoRA, rank 4",
            "2026-11-30",
            "exact_match_after",
            "finetune_lora.py",
        ):
            assert expected in card
        assert f"`{tiny_dir}`, with its adapter merged in" in card and "secret words" not in card
        assert "Measured in training, before the adapter was merged" in card
    assert cards[0].replace("# merged", "") == cards[1].replace("# exported", "")
    assert all("secret words" not in file.read_text() for file in (tmp_path / "exported").glob("*.json"))


@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.0), ("bf16", 1.0), ("fp32", 1.02), ("bf16", 1.3)])
def test_a_merge_says_whether_its_difference_is_that_of_rounding(
    run: Path,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    dtype,
    factor,
) -> None:
    import merge_adapter

    from litmini.methods.lora import LoRALinear

    real = LoRALinear.merged_weight
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda self: real(self) * factor)
    words = [str(tiny_dir), str(run / "final"), str(tmp_path / "merged")]
    merge_adapter.main(merge_adapter.MergeConfig(*words, dtype=dtype))
    out = capsys.readouterr().out
    assert ("That is as expected: rounding the weights to" in out) == (factor == 1.0)
    assert ("warning: that is more than expected" in out) == (factor != 1.0)
