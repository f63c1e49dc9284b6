"""The README's commands, run as they stand there, on the real model."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close

import litmini
import litmini.models
from litmini.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every `python scripts/...` line of the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.split("&& ")[-1]) for line in lines if "python scripts/" in line]


def test_there_are_commands():
    assert len(commands()) == 8
    assert all(word[0] == "python" and (ROOT / word[1]).is_file() for word in commands())


def test_other_command_lines_are_understood(monkeypatch):
    """Those of blocks that are not run, as they need what is not here: each setting is one that its script knows."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "scripts/" in line]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        found: list[tuple] = []
        monkeypatch.setattr("litmini.cli.command", lambda *given, found=found, **named: found.append((given, named)))
        runpy.run_path(str(ROOT / words[at]), run_name="__main__")
        (_, config_class, doc), named = found[0]
        rest = [f"config_hub/{word}" if word == "my.yaml" else word for word in words[at + 1 :]]
        if "config_hub/my.yaml" in rest:
            kind = Path(words[at]).stem.removeprefix("finetune_").removeprefix("lora")
            rest[rest.index("config_hub/my.yaml")] = str(
                ROOT / f"config_hub/quickstart{'_' + kind if kind else ''}.yaml"
            )
        parse(config_class, doc, argv=rest, **named)


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:litmini|scripts|config_hub|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, smollm2) -> Path:
    """A directory in which the README's relative paths work; what runs write stays in it."""
    directory = tmp_path_factory.mktemp("workplace")
    for name in ("scripts", "config_hub", "checkpoints"):
        (directory / name).symlink_to(ROOT / name)
    example = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (directory / "my.jsonl").write_text((json.dumps(example) + "\n") * 40)
    return directory


@pytest.fixture(scope="module")
def outputs(workplace) -> list[str]:
    """Run all commands in order; the quickstart stands there twice and is run once."""
    done, seen = [], set()
    for words in commands():
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        result = subprocess.run([sys.executable, *words[1:]], cwd=workplace, capture_output=True, text=True)
        assert result.returncode == 0, f"{words}\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}"
        assert "Traceback" not in result.stderr
        done.append(result.stdout)
    return done


@pytest.mark.real
@pytest.mark.xdist_group("readme")
def test_quickstart_learns(workplace, outputs):
    results = json.loads((workplace / "out/quickstart/manifest.json").read_text())["results"]
    assert results["exact_match_before"] <= 0.1
    assert results["exact_match_after"] >= 0.8
    assert results["val_loss_after"] < results["val_loss_before"] / 10
    for name in (
        "config.yaml",
        "metrics.csv",
        "loss.png",
        "final/adapter_model.safetensors",
        "final/adapter_config.json",
    ):
        assert (workplace / "out/quickstart" / name).stat().st_size > 0


@pytest.mark.real
@pytest.mark.xdist_group("readme")
def test_what_comes_out_loads_elsewhere_with_equal_logits(workplace, outputs, smollm2):
    import peft
    import transformers

    adapter, merged = workplace / "out/quickstart/final", workplace / "out/for-others"
    ours, tokenizer = litmini.load(smollm2, adapter, dtype="fp32")
    tokens = torch.tensor([tokenizer.encode_prompt("Two large mugs to Oslo, please. Vera")])
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits)
        elsewhere = transformers.AutoModelForCausalLM.from_pretrained(merged)
        here, _ = litmini.load(merged, dtype="fp32")
        assert elsewhere.dtype == torch.float32
        assert_close(here(tokens), elsewhere(tokens).logits)
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoTokenizer.from_pretrained(merged)
    message = [{"role": "user", "content": "Hi"}]
    rendered = loaded.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.apply_template(message, add_generation_prompt=True)


@pytest.mark.real
@pytest.mark.xdist_group("readme")
def test_the_merged_model_answers(outputs):
    assert '{"item": "mug", "quantity": 2, "size": "L", "city": "Oslo"}' in outputs[-2]


@pytest.mark.real
@pytest.mark.xdist_group("readme")
def test_python_block(workplace, outputs):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, env=environment
    )
    assert '"city": "Oslo"' in result.stdout, result.stderr[-2000:]


def test_the_table_of_families_is_that_of_the_registry():
    """All but the measured column, which the parity tests bound."""
    import family_table

    rows = family_table.in_readme().removeprefix(family_table.HEAD).splitlines(keepends=True)
    measured = [line.split("|")[-2].strip() for line in rows]
    names = sorted({litmini.models.family(model_type).__name__ for model_type in litmini.models.FAMILIES})
    assert rows == [family_table.row(name, shown) for name, shown in zip(names, measured, strict=True)]
    assert all(float(shown) <= 1e-5 for shown in measured)
