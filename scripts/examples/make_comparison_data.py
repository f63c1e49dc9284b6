"""Make data to compare methods: functions of Python's standard library, and the first paragraph of their docstrings.

    python scripts/examples/make_comparison_data.py out/docstrings

Writes train.jsonl and heldout.jsonl, from different modules. The text comes from the files of this Python (PSF licence), so
another version of Python gives other examples; this repository contains none of it.
"""

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

QUESTION = "Write the docstring of this Python function.\n\n"
LONGEST_SOURCE = 900  # characters


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield (code without its docstring, first paragraph of the docstring) of every function that has one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        answer = " ".join((doc or "").split("\n\n")[0].split())
        if not 20 <= len(answer) <= 200 or not answer.isascii():
            continue
        code = ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:]}))
        if 60 <= len(code) <= LONGEST_SOURCE and code.isascii():
            yield code, answer


def main(directory: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
    for file in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/[a-z_]*.py")):
        if "site-packages" in file.parts or "test" in file.parts or "idlelib" in file.parts:
            continue
        validation = hashlib.sha256(str(file.relative_to(library)).encode()).digest()[0] < 26  # one in ten modules
        try:
            found = list(functions(file.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for code, answer in found:
            parts["heldout" if validation else "train"].setdefault(code, answer)  # no code twice
    directory.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        order = sorted(pairs, key=lambda code: hashlib.sha256(code.encode()).digest())
        if name == "heldout":
            order = [code for code in order if code not in parts["train"]][:60]
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for code in order:
                question = f"{QUESTION}```python\n{code}\n```"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": pairs[code]}]
                out.write(json.dumps({"messages": messages}) + "\n")
        print(f"{directory / name}.jsonl: {len(order)} functions of Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/docstrings"))
