"""Random settings of every script, on command lines and in files: each is right or an error in a line, nothing else.

Right means: written as YAML and read again, it is the same.
"""

import dataclasses
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_amount import seeds

from litmini.cli import parse
from litmini.runs.directory import plain
from litmini.settings import types_of

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^    command\(main, (\w+), __doc__.*?(?:positional=[(\[](.*?)[)\]])?\)$", re.MULTILINE)
SCRIPTS = sorted(p for p in (ROOT / "scripts").glob("*.py") if COMMAND.search(p.read_text()))
TEXT = r"""true false yes no on off null ~ auto none 0 1 -1 2 7 16 4 010 0x10 1_000 1e3 1e-3 .5 5. -0 +3 1e400 -1e400 nan
.nan inf .inf -inf 1:30 12:30:45 2026-11-29 2001-12-14t21:59:43Z = << * & ! % @ ` | > - ? : , # [] {} [a] [a,b] [1] [1.5,2]
[0.9,0.95] [1e400,1] [null] [[]] [[a]] {a:1} {(:8} {*:1} [a {a *a &a !!int !!python/name:os.system "a" 'a' "a 'a bf16 fp32
bf16-true adamw cosine all-linear q_proj a.jsonl hub:a/b 1.0 3.0 ( [ ] } \\ \n llama/tiny 99999999999999999999 tensorboard"""
WORDS = [word for line in TEXT.splitlines() for word in line.split(" ")]
WORDS += [
    "",
    " ",
    "\n",
    "\t",
    "a b",
    "- a\n- b",
    "a: b",
    "a: b # c",
    "# a",
    "{q_proj: 8}",
    "{q_proj: 1.5}",
    "{a: {b: c}}",
]
WORDS += [
    "9" * 400,
    "9" * 5000,
    "a" * 5000,
    "[" * 2000,
    "{a: " * 500,
    "[" + "a," * 3000 + "a]",
    '"\\ud83d"',
    "{a: 1, a: 2}",
]
WORDS += [
    "&a [*a]",
    "{<<: {a: 1}}",
    "{<<: 1}",
    "{? [a] : 1}",
    "[!x 1]",
    "{1: 2}",
    "{null: 1}",
    "--- a",
    "a\x00b",
    "\u2028",
]
WORDS += ["é", "🙂", "\ufeff", "\x07", "\udcff", "\x85", "{a: 1, b: [{c: 2}]}", "{1e400: 1}", "[1, [2, {a: 1e999}]]"]


def settings_class(script: Path) -> tuple[type, tuple[str, ...]]:
    found = COMMAND.search(script.read_text())
    assert found
    spec = importlib.util.spec_from_file_location(f"fuzz_{script.stem}", script)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, found[1]), tuple(re.findall(r"[\"']([^\"']+)[\"']", found[2] or ""))


def check(capsys: pytest.CaptureFixture[str], tmp_path: Path, config_class: type, argv: list[str], free: Any) -> bool:
    """Whether these words are settings; else they end in a short error with status 2."""
    try:
        config = parse(config_class, "doc", argv=list(argv), positional=free)
    except SystemExit as end:
        out, err = capsys.readouterr()
        assert end.code == 2 and out == "" and err.startswith("error: ") and len(err) < 3000, (argv, err[:500])
        return False
    assert type(config) is config_class
    try:
        written = yaml.safe_dump(plain(config))
        (tmp_path / "again.yaml").write_text(written, encoding="utf-8")
    except UnicodeEncodeError:  # a byte of the command line that is not UTF-8
        return True
    if all(letter.isprintable() or letter in "\n\t" for value in argv for letter in value):
        again = parse(config_class, "doc", argv=[f"--config={tmp_path / 'again.yaml'}"], positional=free)
        assert again == config, (argv, written)
    return True


def some(r: random.Random, types: dict[str, Any]) -> str:
    """A name of a setting, a group or an entry, or nearly one."""
    name = r.choice(list(types))
    if r.random() < 0.1:
        name = r.choice(
            [name + "x", name[1:], name.split(".")[0], f"{name}.a", name.upper(), "model.x", "model", ".", ""]
        )
    return name


def valid(r: random.Random, kind: Any) -> str:
    """A value that may well fit."""
    text = str(kind)
    choices = ["auto", "a", str(r.randint(-1, 9)), str(r.random()), r.choice(["true", "false"])]
    if "list[float]" in text or "tuple" in text:
        choices.append(f"[{r.random()}, {r.random()}]")
    elif "list" in text:
        choices.append("[a, b]")
    elif "dict" in text:
        choices.append("{q_proj: 8}")
    elif "Literal" in text:
        choices = re.findall(r"[\w-]+", text.partition("[")[2])
    return r.choice(choices)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_settings_of_command_lines_and_files(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_class, free = settings_class(script)
    types = types_of(config_class)
    needed = [f.name for f in dataclasses.fields(config_class) if f.default is f.default_factory]
    accepted = 0
    for seed in seeds(80):
        r = random.Random(f"{script.stem} {seed}")
        pairs = [(some(r, types), r.choice(WORDS)) for _ in range(r.choice([0, 1, 1, 2]))]
        pairs += [(name, valid(r, types[name])) for name in r.sample(list(types), min(len(types), r.randint(0, 4)))]
        wanted = [
            n
            for n in types
            if n in needed or (n in ("data.path", "distill.teacher_dir", "prompt", "perplexity") and r.random() < 0.9)
        ]
        lists = {list[str]: "[x]", list[int]: "[1]"}
        pairs += [(n, lists.get(types[n], "x")) for n in wanted if n not in dict(pairs)]
        pairs += [("lrs", "{lora: [1e-3]}")] * (script.stem == "compare_methods")
        pairs += [("grid", "{optim.lr: [1e-3]}")] * (script.stem == "sweep" and r.random() < 0.7)
        pairs += [("reward_model", "x")] * (script.stem == "judge" and r.random() < 0.7)
        pairs += [("rewards.functions", "[length]")] * (
            script.stem == "finetune_grpo" and "rewards.functions" not in dict(pairs)
        )
        argv = [word for name, value in pairs for word in r.choice([[f"--{name}={value}"], [f"--{name}", value]])]
        argv += [r.choice(WORDS)] * (r.random() < 0.05)
        accepted += check(capsys, tmp_path, config_class, argv, free)
        file = tmp_path / "c.yaml"
        file.write_text(as_yaml(r, pairs), encoding="utf-8", errors="surrogatepass")
        accepted += check(capsys, tmp_path, config_class, [f"--config={file}"], free)
    assert accepted, "nothing was accepted: this test no longer makes settings"


def as_yaml(r: random.Random, pairs: list[tuple[str, str]]) -> str:
    """The same settings as a file: nested or dotted, then perhaps damaged."""
    lines, groups = [], dict[str, list[str]]()
    for name, value in pairs:
        value = r.choice([value, value, json.dumps(value)])
        group, dot, last = name.partition(".")
        if dot and r.random() < 0.7:
            groups.setdefault(group, []).append(f"  {last}: {value}")
        else:
            lines.append(f"{name}: {value}")
    text = "\n".join(lines + [line for group, inside in groups.items() for line in [f"{group}:", *inside]]) + "\n"
    for _ in range(r.choice([0, 0, 1, 3])):
        at = r.randrange(len(text) + 1)
        text = (
            text[:at]
            + r.choice([*"{}[]:,#&*!|>'\"%@`\n\t -?", r.choice(WORDS), ""])
            + text[at + r.choice([0, 0, 1, 9]) :]
        )
    return text


def test_bytes_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart, damaged byte by byte."""
    config_class, free = settings_class(ROOT / "scripts/finetune_lora.py")
    whole = (ROOT / "config_hub/quickstart.yaml").read_bytes()
    for seed in seeds(150):
        r = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(r.choice([1, 1, 2, 8])):
            at = r.randrange(len(damaged))
            damaged[at : at + r.choice([0, 1, 1, 20])] = r.choice(
                [b"", bytes([r.randrange(256)]), damaged[at : at + 30], b"\n", b"*a", b"&a ", b": ", b"[", b"{"]
            )
        (tmp_path / "c.yaml").write_bytes(bytes(damaged))
        check(capsys, tmp_path, config_class, [f"--config={tmp_path / 'c.yaml'}"], free)
