"""litmini from Python: what `import litmini` offers, and the tour in docs/."""

import inspect
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from numerics import assert_close
from safetensors.torch import load_file

import litmini
from litmini.config.finetune import DataConfig, FinetuneFullConfig, FinetuneLoraConfig, LoraConfig
from litmini.config.training import EvalConfig, TrainConfig
from litmini.errors import UserError
from litmini.files import read_json
from litmini.tasks.from_python import SCRIPTS

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "config_hub/quickstart/train.jsonl"


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    return litmini.load(tiny_dir, dtype="fp32")


@pytest.mark.parametrize("name", litmini.__all__)
def test_each_name_has_a_signature_and_a_docstring(name):
    function = getattr(litmini, name)
    assert name in dir(litmini) and len(inspect.getdoc(function)) > 60
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.annotation is not parameter.empty


def test_the_import_is_light():
    code = "import sys, litmini; print([n for n in ('torch', 'numpy', 'yaml', 'tokenizers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = litmini.lode


def test_a_list_of_prompts_is_completed_in_batches_as_each_alone(loaded):
    prompts = ["Say 7.", [{"role": "user", "content": "And 8?"}], "Two large mugs"]
    together = litmini.generate(*loaded, prompts, max_new_tokens=6, batch_size=2)
    assert together == [litmini.generate(*loaded, prompt, max_new_tokens=6) for prompt in prompts]
    messages = prompts[1]
    assert litmini.generate(*loaded, messages, max_new_tokens=6) == together[1]
    assert litmini.generate(*loaded, [], max_new_tokens=6) == []
    ids = litmini.generate(*loaded, prompts, max_new_tokens=6, return_tokens=True)
    assert [len(row) <= 6 and isinstance(row[0], int) for row in ids] == [True] * 3


def test_a_stream_is_the_completion_in_pieces(loaded):
    options = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.3, "seed": 5}
    pieces = list(litmini.stream(*loaded, "Say 7.", **options))
    assert len(pieces) > 1 and "".join(pieces) == litmini.generate(*loaded, "Say 7.", **options)


def test_stop_min_p_and_penalties_reach_the_sampler(loaded):
    options = {"max_new_tokens": 12, "ignore_eos": True}
    plain = litmini.generate(*loaded, "Say 7.", **options)
    stop = plain[4:6]
    assert litmini.generate(*loaded, "Say 7.", stop=[stop], **options) == plain[: plain.index(stop)]
    assert litmini.generate(*loaded, "Say 7.", stop=stop, **options) == plain[: plain.index(stop)]
    hot = {"temperature": 2.0, "seed": 1, **options}
    assert litmini.generate(*loaded, "Say 7.", min_p=1.0, **hot) == plain  # the most probable tokens only
    assert litmini.generate(*loaded, "Say 7.", repetition_penalty=3.0, **options) != plain
    with pytest.raises(UserError, match="min_p is 2"):
        litmini.generate(*loaded, "Say 7.", min_p=2.0)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_are_added_trained_saved_and_load_in_peft(tiny_dir, tmp_path, method):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    tokens = torch.tensor([[5, 300, 17, 17, 260, 511, 4, 99]])
    before = model(tokens)
    names = litmini.add_adapters(model, method) if method == "ia3" else litmini.add_adapters(model, method, rank=4)
    assert len(names) == (6 if method == "ia3" else 14)
    assert torch.equal(model(tokens), before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        loss, _ = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
    directory = litmini.save_adapter(model, tmp_path / "adapter", tiny_dir, tokenizer)
    with torch.no_grad():
        after = model(tokens)
        assert (after - before).abs().max() > 1e-3
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        assert_close(after, peft.PeftModel.from_pretrained(base, directory).eval()(tokens).logits)
        assert torch.equal(litmini.load(tiny_dir, directory, dtype="fp32")[0](tokens), after)
    with pytest.raises(UserError, match="exists"):
        litmini.save_adapter(model, directory, tiny_dir)


def test_wrong_uses_say_what_to_do(tiny_dir, tmp_path):
    model, _ = litmini.load(tiny_dir, dtype="fp32")
    with pytest.raises(UserError, match=r"litmini\.add_adapters"):
        litmini.save_adapter(model, tmp_path / "x", tiny_dir)
    with pytest.raises(UserError, match="expected lora, dora or ia3"):
        litmini.add_adapters(model, "prefix")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found TrainConfig"):
        litmini.finetune(TrainConfig())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"python scripts/finetune_full\.py --devices 2"):
        litmini.finetune(FinetuneFullConfig(checkpoint_dir="x", out_dir="y", data=DataConfig("z"), devices=2))


def test_each_script_that_trains_is_reached():
    assert {f"{name}.py" for name in SCRIPTS.values()} == {
        file.name for file in (ROOT / "scripts").glob("*.py") if "fit(setup" in file.read_text()
    }


def test_finetune_is_the_script(tiny_dir, tmp_path):
    """Bit by bit; and its lock ends with it, so that the next run can have the directory."""

    def config(name: str, **settings) -> FinetuneLoraConfig:
        train = TrainConfig(max_steps=3, global_batch_size=2, micro_batch_size=1, save_every=2)
        data = DataConfig(str(TRAIN), val_fraction=0.02, max_seq_len=128)
        places = {"checkpoint_dir": str(tiny_dir), "out_dir": str(tmp_path / name)}
        return FinetuneLoraConfig(
            **places, data=data, train=train, lora=LoraConfig(rank=4), eval=EvalConfig(samples=0), **settings
        )

    assert litmini.finetune(config("dry", dry_run=True)) == {} and not (tmp_path / "dry").exists()
    results = litmini.finetune(config("python"))
    assert results["steps"] == 3 and results["val_loss_after"] < results["val_loss_before"]
    assert results == read_json(tmp_path / "python/manifest.json")["results"]
    command = [sys.executable, ROOT / "scripts/finetune_lora.py", "--config", tmp_path / "python/config.yaml"]
    subprocess.run([*command, "--out_dir", tmp_path / "script"], cwd=ROOT, check=True, capture_output=True)
    here, there = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("python", "script"))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    with pytest.raises(UserError, match="already holds a run"):
        litmini.finetune(config("python"))


@pytest.mark.real
def test_the_tour_runs(smollm2, tmp_path):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    done = subprocess.run([sys.executable, ROOT / "docs/tour.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n--- ") >= 4 and "validation loss" in done.stdout
