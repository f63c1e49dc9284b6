"""What the design promises about the code itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "litmini").rglob("*.py"))
FAMILY_FILES = sorted(
    p for p in (ROOT / "litmini/models").glob("*.py") if p.name not in ("__init__.py", "hf_config.py")
)


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            found.add(str(node.module))
    return found


ROOMS = {
    # room: the rooms that it may import; those at the bottom, `BASE`, all may
    "errors": "",
    "files": "errors staging",
    "staging": "errors system",
    "hub_errors": "",
    "system": "errors",
    "compiler": "errors distributed ops",
    "literal_tokens": "",
    "new_tokens": "errors",
    "templates": "errors files literal_tokens",
    "side_files": "files templates",
    "tokenizer": "errors files templates literal_tokens new_tokens side_files",
    "config": "errors",
    "yaml_values": "errors",
    "settings": "errors files yaml_values",
    "interrupts": "",
    "openai_client": "errors",
    "cli": "errors files system distributed settings interrupts",
    "ops": "errors",
    "models": "errors files ops",
    "distributed": "config",
    "methods": "ops distributed config",
    "training": "ops distributed config compiler",
    "data": "ops config tokenizer templates literal_tokens",
    "checkpoints": "models methods ops distributed config tokenizer side_files",
    "importers": "checkpoints models tokenizer templates side_files",
    "generation": "checkpoints models methods ops distributed config tokenizer compiler templates",
    "runs": "training checkpoints distributed config tokenizer",
    "evaluation": "openai_client generation data training runs methods checkpoints models ops config tokenizer",
    "serving": "generation config tokenizer templates",
    "tasks": "evaluation generation runs data training importers checkpoints models methods ops distributed config "
    "tokenizer compiler openai_client",
}
BASE = "errors files hub_errors staging system"


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_the_table_allows(name):
    allowed = {name, *ROOMS[name].split(), *(BASE.split() if name not in BASE.split() else [])}
    place = ROOT / "litmini" / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    found = {f"{f.relative_to(ROOT)}: {m}" for f in files for m in ours(f) if room(m) not in allowed}
    assert not found


def test_the_table_has_every_room():
    there = {p.stem for p in (ROOT / "litmini").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert there - {"__init__"} == ROOMS.keys()


def ours(file: Path) -> set[str]:
    return {name for name in imports(file) if name.startswith("litmini.")}


def test_nothing_imports_in_a_circle():
    """Function-level imports count: what they hide is a circle all the same."""
    names = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in SOURCES]
    modules = dict(zip(names, SOURCES, strict=True))
    edges = {name: {m for m in ours(path) if m in modules} - {name} for name, path in modules.items()}
    while leaves := [name for name, to in edges.items() if not to & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


def test_packages_hold_no_code():
    """A room's `__init__` says what is in it; only the registry of families is one."""
    for file in SOURCES:
        if file.name == "__init__.py" and file.parent.name not in ("litmini", "models"):
            body = ast.parse(file.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


@pytest.mark.parametrize("file", [*FAMILY_FILES, ROOT / "litmini/models/hf_config.py"], ids=lambda p: p.name)
def test_a_family_file_is_read_alone(file):
    allowed = r"torch\b.*|litmini\.ops\.\w+|litmini\.errors|litmini\.models\.hf_config"
    others = {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
    assert [name for name in others if not re.fullmatch(allowed, name)] == []


def test_the_loop_knows_nothing_of_what_is_learned():
    assert {room(name) for name in ours(ROOT / "litmini/training/loop.py")} <= {
        "config", "distributed", "errors", "ops", "training"
    }  # fmt: skip


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_reference_library_and_no_script_is_imported(file):
    assert not {name.split(".")[0] for name in imports(file)} & {"transformers", "peft", "trl", "scripts"}


def test_lightning_is_imported_for_its_wandb_logger_only():
    """The tests have all of it, users have lightning-fabric."""
    files = [*ROOT.glob("litmini/**/*.py"), *ROOT.glob("scripts/*.py")]
    assert [f.name for f in files if "lightning" in {n.split(".")[0] for n in imports(f)}] == ["loggers.py"]


def test_every_module_imports_with_base_dependencies_only():
    """Optional packages are imported where they are needed, not on top."""
    modules = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in SOURCES]
    blocked = ["transformers", "peft", "pyarrow", "pytest", "accelerate", "tensorboard", "wandb", "lightning"]
    code = f"import sys, importlib\nfor n in {blocked}: sys.modules[n] = None\nfor n in {modules}: importlib.import_module(n)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


COUNT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
for name in [name for name in sys.modules if name.split(".")[0] == "litmini"]:
    print("MODULE", name, len(open(sys.modules[name].__file__).readlines()))
print("OTHERS", *sorted({name.split(".")[0] for name, module in sys.modules.items() if module}))
"""


def test_a_lora_run_imports_what_it_needs(tiny_dir, tmp_path):
    """On a checkpoint that exists: no importer, hub, GGUF, pretraining, serving, generation or other family."""
    words = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / "run", "--eval.samples", 0, "--train.max_steps", 1]
    words += ["--data.path", ROOT / "config_hub/quickstart/train.jsonl", "--data.max_seq_len", 128]
    command = [sys.executable, "-c", COUNT, ROOT / "scripts/finetune_lora.py", *words]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: int(lines) for name, lines in re.findall(r"^MODULE (\S+) (\d+)$", done.stdout, re.MULTILINE)}
    assert {room(name) for name in found if "." in name}.isdisjoint(
        {"importers", "serving", "generation", "evaluation"}
    )
    assert not [name for name in found if "hub" in name or name.startswith("litmini.data.pretrain")]
    others = re.search("^OTHERS (.*)$", done.stdout, re.MULTILINE)
    assert others and {"torchmetrics", "transformers", "scipy", "pandas"}.isdisjoint(others[1].split())  # seconds
    families = {name for name in found if name.startswith("litmini.models.")} - {"litmini.models.hf_config"}
    assert families == {"litmini.models.llama"}
    with_code = {name: lines for name, lines in found.items() if lines > 3}  # packages are a docstring
    assert len(with_code) <= 68 and sum(with_code.values()) <= 11_300, (len(with_code), sum(with_code.values()))


def test_no_pickle_and_no_remote_code():
    """Requirement 26."""
    for file in [*SOURCES, *sorted((ROOT / "scripts").glob("*.py"))]:
        text = file.read_text()
        assert "trust_remote_code" not in text, file
        assert not {name.split(".")[0] for name in imports(file)} & {"pickle", "dill", "joblib"}, file
        loads = re.findall(r"torch\.load\([^()]*(?:\([^()]*\)[^()]*)*\)", text)
        assert len(loads) == text.count("torch.load("), file
        assert all("weights_only=True" in load for load in loads), f"{file}: a pickle may run code"


@pytest.mark.parametrize("file", sorted((ROOT / "config_hub").rglob("*.yaml")), ids=lambda p: p.name)
def test_configurations_are_short(file):
    assert len(file.read_text().splitlines()) <= 25
    assert yaml.safe_load(file.read_text())["out_dir"] == f"out/{file.stem.replace('_', '-')}"


SAME = {
    "rotate": [
        "llama",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma4",
        "gpt_oss",
        "granite_hybrid",
        "lfm2",
        "ministral3",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    ],
    "rotate of a part": ["gpt_neox", "phi", "qwen3_5", "qwen3_5_moe"],
    "rotary": ["mixtral", "falcon", "gemma", "gemma2", "granite_hybrid", "lfm2", "qwen3_moe"],
    "rotary of a part": ["gpt_neox", "phi", "qwen3_5", "qwen3_5_moe"],
    "rotary with yarn": ["ministral3", "qwen2", "qwen3", "smollm3"],
    "RMSNorm": [
        "deepseek_v3",
        "llama",
        "granite_hybrid",
        "lfm2",
        "mamba2",
        "ministral3",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    ],
    "RMSNorm in fp32": ["gemma4", "gpt_oss"],
    "RMSNorm of 1 + weight": ["gemma", "gemma2", "gemma3", "qwen3_5", "qwen3_5_moe"],
    "MLP": ["ministral3", "qwen2", "qwen3", "olmo2", "smollm3", "qwen3_5"],
    "MLP with gelu": ["gemma", "gemma2", "gemma3"],
    "Attention": ["gemma", "mixtral"],
    "Attention with gates": ["qwen3_5", "qwen3_5_moe"],
    "Block": ["llama", "gemma", "phi3", "qwen2", "qwen3"],
    "Block of experts": ["gpt_oss", "qwen3_moe"],
    "Block with four norms": ["gemma2", "gemma3"],
    "GatedDeltaNet": ["qwen3_5", "qwen3_5_moe"],
    "GatedRMSNorm": ["qwen3_5", "qwen3_5_moe"],
    "GatedRMSNorm of groups": ["granite_hybrid", "mamba2"],
    "Mamba2": ["granite_hybrid", "mamba2"],
    "GroupedLinear": ["deepseek_v3", "gemma4", "gpt_oss", "granite_hybrid", "mixtral", "qwen3_5_moe", "qwen3_moe"],
    "Experts": ["deepseek_v3", "granite_hybrid", "mixtral", "qwen3_5_moe", "qwen3_moe"],
    "SparseMoE": ["mixtral", "qwen3_moe"],
}


@pytest.mark.parametrize("part", SAME)
def test_what_is_repeated_is_repeated_to_the_letter(part):
    """A fix in one family file must reach the others that have the same part."""
    sources = {}
    for name in SAME[part]:
        text = (ROOT / f"litmini/models/{name}.py").read_text()
        (node,) = [n for n in ast.parse(text).body if getattr(n, "name", None) == part.split()[0]]
        sources[name] = ast.get_source_segment(text, node)
    assert len(set(sources.values())) == 1, f"{part} differs between {', '.join(sources)}"
