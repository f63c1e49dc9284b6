"""Damaged data files, templates and conversations: each is read right or is a UserError that names the place."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fuzz_amount import seeds

from litmini.config.finetune import DataConfig
from litmini.data.dataset import load_data
from litmini.data.formats import read_examples
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello 🙂 é"}]
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": "a", "completion": "b"},
    {"text": "some text"},
]
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e400,
    10**30,
    "",
    " ",
    "\ud83d",
    "<|im_end|>",
    "a" * 3000,
    [],
    [[]],
    {},
    {"role": "user"},
    [None],
    "[]",
    "null",
    "system",
    "developer",
    "tool",
    "assistant",
    "\x00",
    "\ufeff",
    "\u2028",
    {"content": []},
    [{"role": 1, "content": 2}],
]
TEMPLATES = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]{% elif m.role == 'assistant' %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.name + m['content'] }}{{ m | tojson }}<|im_end|>{% endfor %}",
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}<|im_end|>",
]
PIECES = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    " * 10**9",
    "|join",
    "|tojson(indent=2)",
    "[0]",
    "['x']",
    "messages",
    "m.content",
    "{% endfor %}",
    "{% endif %}",
    "range(99999)",
    "('a' * 99999)",
    ".__class__",
    "'\\ud83d'",
    "raise_exception('x')",
    "|length",
    "~",
    "+",
    "//0",
    "%d",
    "(",
    ")",
    "strftime_now('%d %b')",
    "|map(attribute='x')",
    "|sort",
    "\ufeff",
]


EXPRESSIONS = [
    "m.content",
    "m",
    "messages",
    "m.content * 2",
    "m.content * 10**9",
    "m|tojson",
    "range(99999)|list|length",
    "1",
]
EXPRESSIONS += [
    "m.content|center(10**8)",
    "m.name",
    "m['x'].y",
    "'%s' % m",
    "10 ** (10 ** 7)",
    "'\\ud83d'",
    "loop.index",
    "[m] * 9",
]
EXPRESSIONS += [
    "raise_exception('x')",
    "strftime_now('%d %b')",
    "m.content|trim|upper",
    "namespace(a=1).a",
    "m.role in 'user'",
]
EXPRESSIONS += [
    "range(99999)|sum",
    "messages|map(attribute='role')|join",
    "messages[-1].content[-1]",
    "(m.content ~ 1) | wordcount",
]


@pytest.fixture
def tokenizer(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("litmini.templates.render.SECONDS", 1)

    def make(template: str) -> Tokenizer:
        (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
        return Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"))

    return make


def change(r: random.Random, value: Any) -> Any:
    """The same with one part of it removed, doubled or odd."""
    if isinstance(value, dict) and value and r.random() < 0.8:
        key = r.choice(list(value))
        how = r.randrange(5)
        changed = {k: v for k, v in value.items() if how or k != key}
        if how == 1:
            changed[r.choice(["name", "tools", "tool_calls", "text", "prompt", "role", "\ud83d"])] = r.choice(ODD)
        elif how:
            changed[key] = change(r, value[key])
        return changed
    if isinstance(value, list) and value and r.random() < 0.8:
        i = r.randrange(len(value))
        how = r.randrange(4)
        return value[:i] + [[], [value[i]] * 2, [r.choice(ODD)], [change(r, value[i])]][how] + value[i + 1 :]
    return r.choice(ODD)


def write(r: random.Random, place: Path) -> Path:
    """A data file with a changed record among good ones, perhaps with damaged bytes."""
    base = r.choice(RECORDS)
    records = [base, change(r, base) if r.random() < 0.8 else r.choice(RECORDS), base]
    suffix = r.choice([".jsonl", ".jsonl", ".json", ".csv"])
    if suffix == ".jsonl":
        text = "\n".join(map(json.dumps, records)) + "\n"
    elif suffix == ".json":
        text = json.dumps(records, indent=r.choice([None, 1]))
    else:
        text = "prompt,completion\n" + "".join(f"{json.dumps(json.dumps(one))},b\n" for one in records)
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if r.random() < 0.4:
        at = r.randrange(len(raw))
        raw[at : at + r.choice([0, 1, 9])] = r.choice(
            [b"", b"\xff", b"\x00", b"\n", b'"', b"[", b"{", b"\\", b"\xef\xbb\xbf", b"1" * 5000]
        )
    file = place / f"data{suffix}"
    file.write_bytes(bytes(raw))
    return file


def test_damaged_data(tokenizer: Any, tmp_path: Path) -> None:
    good = 0
    tokenizers = [tokenizer(template) for template in TEMPLATES[:2]]
    for seed in seeds(200):
        r = random.Random(seed)
        file = write(r, tmp_path)
        config = DataConfig(str(file), max_dropped=1.0, max_seq_len=64, train_on=r.choice(["assistant", "all"]))
        try:
            train, _, _ = load_data(config, r.choice(tokenizers), 0)
            assert len(train) and all(len(train[i][0]) == len(train[i][1]) for i in range(len(train)))
            good += 1
        except UserError as error:
            assert "data." in str(error) and len(str(error)) < 20_000, (seed, str(error)[:500])
    assert good > 20


def test_damaged_templates(tokenizer: Any, tmp_path: Path, tokenizer_dir: Path) -> None:
    good = 0
    examples = tmp_path / "good.jsonl"
    examples.write_text("".join(json.dumps(RECORDS[1]) + "\n" for _ in range(3)))
    for seed in seeds(60):
        r = random.Random(seed)
        text = r.choice(TEMPLATES)
        for _ in range(r.choice([1, 1, 2, 4])):
            at = r.randrange(len(text))
            if r.random() < 0.3:
                text = text[:at] + r.choice([*PIECES, ""]) + text[at + r.choice([0, 0, 1, 5, 20]) :]
            else:
                one, other = r.choice(EXPRESSIONS), r.choice(EXPRESSIONS)
                piece = r.choice(
                    [f"{{{{ {one} }}}}", f"{{% set x = {one} %}}", f"{{% if {one} == {other} %}}x{{% endif %}}"]
                )
                tag = r.choice(["{% endfor %}", "{% for m", "m.content"])
                text = text.replace(tag, one if tag == "m.content" else piece + tag, 1)
        try:
            made = tokenizer(text)
            made.encode_prompt("hi")
            load_data(DataConfig(str(examples), max_dropped=1.0), made, 0)
            good += 1
        except UserError as error:
            assert len(str(error)) < 5_000, (seed, str(error)[:500])
    assert good


def test_good_records_are_read_in_every_form(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What the tests above change is right before."""
    for number, record in enumerate(RECORDS):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        assert len(read_examples(str(file), True)) == 1
