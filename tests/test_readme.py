"""The README's commands, run as they stand there, on the real model; and what all pages name: commands, files, links."""

import json
import os
import pkgutil
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
from litmini.tasks.measure import describe_results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "checkpoints/README.md", *sorted(ROOT.glob("docs/*.md"))]
ENDLESS = ("serve.py", "chat.py")
"""Commands that end when somebody ends them: they are parsed, not run."""


def command_lines(text: str, language: str) -> list[list[str]]:
    """Return every line with a script in the code blocks of a page."""
    blocks = re.findall(rf"```(?:{language})\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"[^#]*\bscripts/\w", line)]


def commands() -> list[list[str]]:
    """Return the README's commands that are run: those of its `bash` blocks, in their order."""
    return [words for words in command_lines(README, "bash") if not words[1].endswith(ENDLESS)]


def test_there_are_commands():
    assert len(commands()) == 8
    assert all(word[0] == "python" and (ROOT / word[1]).is_file() for word in commands())


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_understood(page, monkeypatch):
    """Each setting is one that its script knows, also in commands that are not run, as they need what is not here."""
    monkeypatch.chdir(ROOT)
    for words in command_lines(page.read_text(), "sh|bash"):
        at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        if "from litmini.cli import command" not in (ROOT / words[at]).read_text():
            continue  # it takes no settings
        found: list[tuple] = []
        monkeypatch.setattr("litmini.cli.command", lambda *given, found=found, **named: found.append((given, named)))
        runpy.run_path(str(ROOT / words[at]), run_name="__main__")
        (_, config_class, doc), named = found[0]
        kind = Path(words[at]).stem.removeprefix("finetune_").removeprefix("lora")
        own = f"config_hub/quickstart{'_' + kind if kind else ''}.yaml"
        parse(config_class, doc, argv=[own if word == "my.yaml" else word for word in words[at + 1 :]], **named)


def test_the_pages_have_commands():
    lines = [words for page in PAGES for words in command_lines(page.read_text(), "sh|bash")]
    assert len(lines) > 40 and {Path(words[1]).name for words in lines if words[0] == "python"} >= set(ENDLESS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    """Files of the repository, and modules, functions and classes of litmini."""
    text = page.read_text()
    for name in re.findall(r"`((?:litmini|scripts|config_hub|tests|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists() or "NAME" in name, name
    for name in re.findall(r"`(litmini(?:\.[A-Za-z_]\w*)+)`", text):
        pkgutil.resolve_name(name)
    for module, names in re.findall(r"^from (litmini[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        assert [pkgutil.resolve_name(f"{module}:{name}") for name in names.split(", ")]


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^()\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_reached_from_the_readme():
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= set(re.findall(r"\]\((docs/\w+\.md)", README))


def test_the_output_is_shown_as_the_quickstart_prints_it():
    (shown,) = re.findall(r"```\n(prompt .*?)\n```", README, re.DOTALL)
    prompt, reference, *predictions = re.fullmatch(
        r"prompt +(.*)\nreference +(.*)\nbefore +(.*)\nafter +(.*)\n\n.*", shown, re.DOTALL
    ).groups()
    results = {"training_seconds": 1.0, "tokens_per_second": 1.0, "peak_memory_mib": 1.0}
    results |= {"val_loss_before": 0.909, "val_loss_after": 0.003, "exact_match_before": 0.0, "exact_match_after": 1.0}
    for when, text in zip(("before", "after"), predictions, strict=True):
        results[f"samples_{when}"] = [{"prompt": prompt, "reference": reference, "prediction": text}]
    assert "\n".join(describe_results(results)[:-1]).strip() == shown


def test_the_table_of_rooms_is_that_of_the_architecture():
    from test_architecture import BASE, ROOMS

    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    everywhere = set(BASE.split())
    assert {name: set(re.findall(r"\w+", others)) for name, others in rows} == {
        name: set(others.split()) - everywhere for name, others in ROOMS.items() if (ROOT / "litmini" / name).is_dir()
    }


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
def outputs(workplace) -> dict[str, str]:
    """Run all commands in order, the quickstart, which stands there twice, once; return what each script printed last."""
    printed, seen = {}, set()
    for words in commands():
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        result = subprocess.run([sys.executable, *words[1:]], cwd=workplace, capture_output=True, text=True)
        assert result.returncode == 0, f"{words}\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}"
        assert "Traceback" not in result.stderr
        printed[Path(words[1]).name] = result.stdout
    return printed


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
    assert '{"item": "mug", "quantity": 2, "size": "L", "city": "Oslo"}' in outputs["generate.py"]


@pytest.mark.real
@pytest.mark.xdist_group("readme")
def test_python_block(workplace, outputs):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, env=environment
    )
    assert '"city": "Oslo"' in result.stdout, result.stderr[-2000:]


def test_the_tables_of_families_are_those_of_the_registry():
    """But for the measured column, which the parity tests bound."""
    import family_table

    assert family_table.in_page(family_table.COVERED) == family_table.covered_table()
    measured = family_table.in_page(family_table.MEASURED)
    figures = [line.split("|")[-2].strip() for line in measured.splitlines()[2:]]
    sources = [(ROOT / line.split("`")[1]).read_text() for line in measured.splitlines()[2:]]
    assert measured == family_table.measured_table(figures)
    assert all(
        float(figure) <= (1e-4 if "linear_attention" in source else 1e-5)
        for figure, source in zip(figures, sources, strict=True)
    )
