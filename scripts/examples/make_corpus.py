"""Make a small English corpus from the Python installation: its language reference and the docstrings of its library.

    python scripts/examples/make_corpus.py

Writes data/stdlib/text.jsonl, about 2 MB, one document per topic or module; the same for the same version of Python. The
text is Python's (PSF licence), and is not in this repository. Characters beyond ASCII are dropped.
"""

import ast
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

OUT = Path("data/stdlib/text.jsonl")
SKIP = {
    "__pycache__",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
}


def docstrings(file: Path) -> str:
    """Return all docstrings of a file, in order."""
    tree = ast.parse(file.read_bytes())
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def main() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not SKIP & set(f.relative_to(library).parts)]
    texts = [topics[name] for name in sorted(topics)] + [docstrings(file) for file in files]
    plain = [text.encode("ascii", "ignore").decode().strip() for text in texts]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("".join(json.dumps({"text": text + "\n"}) + "\n" for text in plain if text))
    print(f"{OUT}: {sum(map(len, plain)):,} characters in {sum(map(bool, plain)):,} documents")


if __name__ == "__main__":
    main()
