"""A researcher's own model file in every command: checked, estimated, exported, and named by what is printed."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import litmini.models
from litmini.checkpoints.hf import save_model
from litmini.errors import UserError
from litmini.models import use_model_file
from litmini.ops.initialize import initialize

ROOT = Path(__file__).parents[2]
OWN_FILE = ROOT / "scripts/examples/llama_gelu.py"


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """Each test registers its families again."""
    monkeypatch.setattr(litmini.models, "FAMILIES", dict(litmini.models.FAMILIES))


@pytest.fixture
def run(monkeypatch, capfd):
    def command(script: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
        return (end.value.code, *capfd.readouterr())

    return command


def checkpoint(file: Path, directory: Path, tokenizer_dir: Path) -> Path:
    module = use_model_file(str(file))
    config = module.PRESETS["tiny"]
    model = module.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    directory.mkdir()
    save_model(directory, module.config_to_hf(config), model.state_dict().items(), side_files=tokenizer_dir)
    return directory


def test_verify_takes_a_model_file(run, tmp_path, tokenizer_dir):
    base = checkpoint(OWN_FILE, tmp_path / "base", tokenizer_dir)
    status, out, error = run("verify", base, "--model_file", OWN_FILE, "--device", "cpu")
    assert status == 0, error
    assert out.count(" ok ") == 6 and out.count("skipped") == 2 and "transformers cannot load it" in out


@pytest.mark.parametrize("method", ["dora", "ia3", "lora", "full"])
def test_estimate_takes_a_preset_of_a_file(run, method):
    words = ["--max_seq_len", 32, "--micro_batch_size", 1, "--method", method]
    status, out, error = run("estimate", f"{OWN_FILE}:tiny", *words)
    assert status == 0, error
    assert "fits on:" in out and "1 sequence of 32 tokens" in out and "each of 1 GPU," in out
    assert run("estimate", f"{OWN_FILE}:huge", *words)[2].count("has no preset 'huge'; there are: tiny") == 1


def test_estimate_takes_a_checkpoint_of_a_file(run, tmp_path, tokenizer_dir):
    base = checkpoint(OWN_FILE, tmp_path / "base", tokenizer_dir)
    status, out, error = run("estimate", base, "--model_file", OWN_FILE, "--max_seq_len", 32)
    assert status == 0 and "parameters are trained" in out, error


def test_what_a_run_prints_names_the_model_file(run, tmp_path, tokenizer_dir):
    base = checkpoint(OWN_FILE, tmp_path / "base", tokenizer_dir)
    words = ["--checkpoint_dir", base, "--out_dir", tmp_path / "run", "--model_file", OWN_FILE, "--eval.samples", 0]
    words += ["--data.path", ROOT / "config_hub/quickstart/heldout.jsonl", "--train.max_steps", 1]
    status, out, error = run("finetune_lora", *words)
    assert status == 0, error
    line = next(line for line in out.splitlines() if "scripts/generate.py" in line)
    status, out, error = run("generate", *line.split()[2:-1], "Hi", "--max_new_tokens", 2)
    assert status == 0, error


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (("llama_gelu", "llama_gelu"), "transformers cannot load it: it does not know model_type 'llama_gelu' of "),
        (("llama_gelu", "helium"), "mlp.gate_proj.weight, ..."),
        (("down_proj", "out_proj"), "transformers does not know 2 tensors: model.layers.0.mlp.out_proj.weight, "),
    ],
)
def test_an_export_says_what_transformers_does_not_know(run, tmp_path, tokenizer_dir, edit, expected):
    text = OWN_FILE.read_text().replace(*edit)
    if edit[0] == "down_proj":
        text = text.replace("llama_gelu", "helium")
    (tmp_path / "own.py").write_text(text)
    base = checkpoint(tmp_path / "own.py", tmp_path / "base", tokenizer_dir)
    status, out, error = run("convert_to_hf", base, "--out_dir", tmp_path / "out", "--model_file", tmp_path / "own.py")
    assert status == 0 and expected in out, error


def test_init_weights_names_the_parameters_that_it_does_not_know(tmp_path, tokenizer_dir):
    line = "self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)\n"
    text = OWN_FILE.read_text().replace(line, f"{line}        self.gate = nn.Parameter(torch.ones(1))\n")
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(
        UserError, match=r"does not know model\.layers\.0\.mlp\.gate \(1,\), model\.layers\.1.*\"gate\": 1"
    ):
        checkpoint(tmp_path / "own.py", tmp_path / "base", tokenizer_dir)


def test_a_matrix_that_is_no_weight_is_not_known_either():
    module = torch.nn.Module()
    module.mix = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(UserError, match="mix"):
        initialize(module, {"norm": 1.0}, None)
    initialize(module, {"mix": 0.5}, None)
    assert bool((module.mix == 0.5).all())
