"""The README's table of families, from the registry, the files and a measurement against transformers.

python tests/family_table.py            # print it
python tests/family_table.py --write    # and put it into README.md
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
from litmini.ops import attention  # noqa: E402

BEGIN, END = "<!-- families: python tests/family_table.py --write -->\n", "<!-- families end -->"
HEAD = "| file | `model_type` | covers | largest difference of logits |\n|---|---|---|---|\n"


def suites() -> dict[str, type[FamilyTests]]:
    """Module name -> the class that tests it."""
    found = {}
    for file in sorted((ROOT / "tests/models").glob("test_*.py")):
        if "FamilyTests" in file.read_text():
            for value in vars(importlib.import_module(file.stem)).values():
                if inspect.isclass(value) and issubclass(value, FamilyTests) and value is not FamilyTests:
                    found[value.module.__name__] = value
    return found


def difference(suite: type[FamilyTests]) -> float:
    """The largest difference of fp32 logits over all its cases, absolute; the logits themselves are of order 1 to 10."""
    worst = 0.0
    attention.EXPLICIT_LENGTH_CAUSAL_FP32 = attention.EXPLICIT_LENGTH  # the matmuls that the reference takes, too
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


def row(module_name: str, shown: str) -> str:
    module = importlib.import_module(module_name)
    types = [f"`{model_type}`" for model_type, name in FAMILIES.items() if name == module_name]
    covers = (module.__doc__ or "").splitlines()[0].rstrip(".")
    file = Path(inspect.getsourcefile(module) or "").relative_to(ROOT)
    return f"| `{file}` | {', '.join(types)} | {covers} | {shown} |\n"


def table() -> str:
    classes = suites()
    names = sorted({family(model_type).__name__ for model_type in FAMILIES})
    return HEAD + "".join(row(name, f"{difference(classes[name]):.1e}") for name in names)


def in_readme() -> str:
    """Return the table of the README."""
    return re.search(f"{re.escape(BEGIN)}(.*){re.escape(END)}", (ROOT / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


if __name__ == "__main__":
    made = table()
    print(made)
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(readme.read_text().replace(BEGIN + in_readme() + END, BEGIN + made + END))
