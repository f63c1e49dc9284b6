"""The tables of families: the README's, from the registry and the files, and the benchmark page's, measured.

python tests/family_table.py --write      # put file and models covered into README.md
python tests/family_table.py --measure    # measure parity with transformers, into docs/benchmarks.md; some minutes
python tests/family_table.py --measure qwen3    # the row of this family alone; the others stay as they are

Without an option it prints the README's table.
"""

import importlib
import inspect
import re
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/models")]

from parity import FamilyTests, batch, reference  # noqa: E402

from litmini.checkpoints.hf import load_model  # noqa: E402
from litmini.models import FAMILIES, family  # noqa: E402
from litmini.ops import cpu_attention  # noqa: E402

COVERED, MEASURED = ROOT / "README.md", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- families: python tests/family_table.py --{} -->\n", "<!-- families end -->"
OPTIONS = {COVERED: "write", MEASURED: "measure"}
HEADS = {
    COVERED: "| file | covers |\n|---|---|\n",
    MEASURED: "| file | `model_type` | largest difference of logits |\n|---|---|---|\n",
}


def suites() -> dict[str, type[FamilyTests]]:
    """Return module name -> the class that tests it."""
    found = {}
    for file in sorted((ROOT / "tests/models").glob("test_*.py")):
        if "FamilyTests" in file.read_text():
            for value in vars(importlib.import_module(file.stem)).values():
                if inspect.isclass(value) and issubclass(value, FamilyTests) and "module" in vars(value):
                    found[value.module.__name__] = value
    return found


def difference(suite: type[FamilyTests]) -> float:
    """Return the largest difference of fp32 logits over all its cases; the logits themselves are of order 1 to 10."""
    worst = 0.0
    cpu_attention.EXPLICIT_LENGTH_FP32 = cpu_attention.EXPLICIT_LENGTH  # the matmuls that the reference takes, too
    for config in (config for name, config in suite.cases.items() if name not in suite.fixed):
        torch.manual_seed(0)
        theirs = reference(config)
        with tempfile.TemporaryDirectory() as name:
            theirs.save_pretrained(name)
            (Path(name) / "tokenizer.json").write_text("{}")
            model = load_model(name, torch.float32)
        tokens, _ = batch()
        with torch.no_grad():
            worst = max(worst, float((model(tokens) - theirs(tokens, use_cache=False).logits).abs().max()))
    return worst


def names() -> list[str]:
    """Return the module of each family, sorted."""
    return sorted({family(model_type).__name__ for model_type in FAMILIES})


def file_of(module_name: str) -> str:
    return f"`litmini/models/{module_name.rpartition('.')[2]}.py`"


def covered_table() -> str:
    """Return the README's table: the first line of each file's docstring says what it covers."""
    lines = [(importlib.import_module(name).__doc__ or "").splitlines()[0].rstrip(".") for name in names()]
    rows = [f"| {file_of(name)} | {line} |\n" for name, line in zip(names(), lines, strict=True)]
    return HEADS[COVERED] + "".join(rows)


def measured_table(differences: list[str]) -> str:
    """Return the benchmark page's table of these figures, one for each of `names()`."""
    rows = []
    for name, shown in zip(names(), differences, strict=True):
        types = ", ".join(f"`{model_type}`" for model_type, module in FAMILIES.items() if module == name)
        rows.append(f"| {file_of(name)} | {types} | {shown} |\n")
    return HEADS[MEASURED] + "".join(rows)


def in_page(page: Path) -> str:
    """Return the table that stands in a page."""
    begin = re.escape(BEGIN.format(OPTIONS[page]))
    return re.search(f"{begin}(.*){re.escape(END)}", page.read_text(), re.DOTALL)[1]  # type: ignore[index]


def put(page: Path, table: str) -> None:
    begin = BEGIN.format(OPTIONS[page])
    page.write_text(page.read_text().replace(begin + in_page(page) + END, begin + table + END))


if __name__ == "__main__":
    made = covered_table()
    if "--measure" in sys.argv:
        classes, wanted = suites(), sys.argv[sys.argv.index("--measure") + 1 :]
        old = dict(re.findall(r"^\| `litmini/models/(\w+)\.py` \|.*\| (\S+) \|$", in_page(MEASURED), re.MULTILINE))
        short = {name: name.rpartition(".")[2] for name in names()}
        if unknown := set(wanted) - set(short.values()):
            sys.exit(f"no such family: {', '.join(sorted(unknown))}; there are: {', '.join(short.values())}")
        kept = {} if not wanted else {name: old[short[name]] for name in names() if short[name] not in wanted}
        made = measured_table([kept.get(name) or f"{difference(classes[name]):.1e}" for name in names()])
        put(MEASURED, made)
    elif "--write" in sys.argv:
        put(COVERED, made)
    print(made)
