"""Values of settings by type: text as it was typed, numbers that are numbers, nothing that stands twice or has no end."""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from litmini.cli import parse
from litmini.config.finetune import FinetuneLoraConfig
from litmini.errors import UserError
from litmini.methods.lora import matches
from litmini.settings import Text

NEEDED = ["--checkpoint_dir", "ck", "--out_dir", "out", "--data.path", "d.jsonl"]
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "fields:\n  a0: &a0 {x: 1}\n" + "".join(
    f"  a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@dataclass
class Group:
    """A group."""

    number: int = 1
    text: str = ""


@dataclass(kw_only=True)
class Settings:
    """One setting of each type."""

    said: Text | None = None
    path: str | None = None
    name: str = "x"
    names: list[str] = field(default_factory=list)
    one_or_many: list[str] | str = "x"
    whole: int = 1
    maybe: int | None = None
    real: float = 1.0
    switch: bool = False
    which: Literal["a", "b", 4] = "a"
    switch_or_text: bool | str = False
    pair: tuple[float, float] = (1.0, 2.0)
    ranks: dict[str, int] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    group: Group = field(default_factory=Group)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(content: str, *words: str) -> Settings:
        (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
        return parse(Settings, "doc", argv=["--config", str(tmp_path / "c.yaml"), *words])

    return read


def refused(capsys: pytest.CaptureFixture[str], call: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        call(*words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def words(*argv: str) -> Settings:
    return parse(Settings, "doc", argv=argv)


TYPED = ["# Write a poem", "null", "~", "", "1:30", "12:30:45", "yes", "010", "1e3", "2026-11-29", "[a", "[a, b]"]
TYPED += [
    "{a: 1}",
    "a: b # c",
    "'q'",
    '"q"',
    "!!int 3",
    "!!int",
    "&a b",
    "*a",
    "- a",
    "NULL",
    "  x ",
    "é\n\n\t",
    "0x10",
]
TYPED += [".inf", "%TAG", "@x", "`"]


@pytest.mark.parametrize("text", TYPED)
def test_text_is_text_as_typed(text: str) -> None:
    assert words("--said", text).said == words(f"--said={text}").said == text
    assert words("--name", text).name == text
    assert words("--group.text", text).group.text == text
    assert words("--path", text).path == (None if text == "null" else text)
    assert words("--one_or_many", text).one_or_many == (["a", "b"] if text == "[a, b]" else text)


@pytest.mark.parametrize(
    "text", ["1:30", "12:30:45", "yes", "010", "1e3", "2026-11-29", "0x10", "0o7", "1_000", ".inf", "="]
)
def test_text_in_a_file_is_what_stands_there(read: Any, text: str) -> None:
    config = read(f"name: {text}\nsaid: {text}\nnames: [{text}, '{text}']\none_or_many: {text}\nswitch_or_text: x\n")
    assert (config.name, config.said, config.names, config.one_or_many) == (text, text, [text, text], text)


def test_values_of_files(read: Any) -> None:
    content = """
whole: 1_000
real: 1e-3
switch: yes
maybe: ~
said:
path: "null"
pair: [1, .5]
which: 4
switch_or_text: off
ranks: {q_proj: 8, "a.b": 4}
fields: {n: 3, x: 1.5, t: true, none: null, text: 1:30, quoted: "3", list: [1, [a]], deep: {a: {b: 1}}}
group.number: 3
group: {text: "# x"}
"""
    config = read(content, "--fields.n=4", "--ranks.v_proj", "2")
    assert config == Settings(
        whole=1000, real=1e-3, switch=True, maybe=None, said=None, path="null", pair=(1.0, 0.5), which=4,
        switch_or_text=False, ranks={"q_proj": 8, "a.b": 4, "v_proj": 2}, group=Group(3, "# x"),
        fields={"n": 4, "x": 1.5, "t": True, "none": None, "text": "1:30", "quoted": "3", "list": [1, ["a"]],
                "deep": {"a": {"b": 1}}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "name", "lines"),
    [
        ("whole: 1\nreal: 2\nwhole: 3\n", "whole", "lines 1 and 3"),
        ("group:\n  number: 1\nwhole: 1\ngroup:\n  text: a\n", "group", "lines 1 and 4"),
        ("group:\n  number: 1\n  text: a\n  number: 2\n", "group.number", "lines 2 and 4"),
        ("group: {number: 1}\ngroup.number: 2\n", "group.number", "lines 1 and 2"),
        ("ranks: {q: 1, v: 2, q: 3}\n", "ranks.q", "line 1"),
        ("fields:\n  a:\n    b: 1\n    b: 2\n", "fields.b", "lines 3 and 4"),
        ('"whole": 1\nwhole: 1\n', "whole", "lines 1 and 2"),
        ("ranks: {q: 1}\nranks.v: 2\n", "ranks", "lines 1 and 2"),
        ("ranks.v: 2\nranks: {q: 1}\n", "ranks", "lines 1 and 2"),
        ("fields:\n  <<: {a: 1}\n  <<: {b: 2}\n", "fields.<<", "lines 2 and 3"),
    ],
)
def test_what_stands_twice_is_an_error_with_both_lines(
    read: Any, capsys: pytest.CaptureFixture[str], content: str, name: str, lines: str
) -> None:
    error = refused(capsys, read, content)
    assert f"{name} stands twice in " in error and f"c.yaml, {lines};" in error
    if content.startswith("ranks"):
        assert "ranks.q stands twice; expected once" in refused(capsys, words, "--ranks", "{q: 1, q: 2}")


def test_a_class_in_a_file_is_only_text(read: Any) -> None:
    spec = {"class_path": "this.Zen", "init_args": {"a": 1}}
    config = read("fields: {class_path: this.Zen, init_args: {a: 1}, x: {class_path: this.Zen, init_args: {a: 1}}}\n")
    assert config.fields == {**spec, "x": spec} and "this" not in sys.modules


def test_what_is_merged_is_a_group(read: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("fields: {<<: 5}\n", "fields: {<<: [{a: 1}, 5]}\n"):
        assert "fields.<< is 5; expected a group of settings" in refused(capsys, read, content)


def test_merged_keys_are_no_second_ones(read: Any) -> None:
    config = read("fields:\n  a: &a {x: 1, y: 2}\n  b: {<<: *a, y: 3}\n  c: {<<: [*a, {z: 4}]}\n")
    assert config.fields == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": 4}}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("whole", "9" * 400, "out of range"),
        ("whole", "9" * 9000, "out of range"),
        ("maybe", "-" + "9" * 25, "out of range"),
        ("whole", "1:30", "a whole number"),
        ("whole", "1.0", "a whole number"),
        ("whole", "true", "a whole number"),
        ("whole", "0x10", "a whole number"),
        ("whole", "null", "a whole number"),
        ("real", "1e400", "a finite number"),
        ("real", "9" * 400, "a finite number"),
        ("real", ".inf", "a number"),
        ("real", "nan", "a number"),
        ("real", "1:30.5", "a number"),
        ("pair", "[1e400, 1]", "a finite number"),
        ("pair", "[1, 2, 3]", "two numbers"),
        ("which", "5", "a or b or 4"),
        ("switch", "2", "true or false"),
        ("names", "{a: 1}", "a list"),
        ("names", "[[a]]", "a list"),
        ("ranks", "{q: 1.5}", "names and numbers"),
        ("ranks", "[1]", "names and numbers"),
        ("name", "{a: 1}", "text"),
        ("name", "null", "text"),
        ("group", "high", "is a group of settings, expected group.number, group.text"),
        ("name", "!!python/object/apply:os.system [ls]", "tag"),
        ("fields", "{a: !x 1}", "tag"),
        ("group.number", "9" * 41, "out of range"),
        ("said.a", "1", "unknown setting 'said.a'"),
        ("name.a", "1", "unknown setting 'name.a'"),
    ],
)
def test_a_wrong_value_is_one_line(
    read: Any, capsys: pytest.CaptureFixture[str], name: str, value: str, expected: str
) -> None:
    error = refused(capsys, read, f"{name}: {value}\n")
    assert name in error and expected in error and len(error) < 250
    if name != "name":
        error = refused(capsys, words, f"--{name}={value}")
        assert name in error and expected in error and len(error) < 250


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        LAUGHS + "fields: {x: *a11}\n",
        LAUGHS + "name: *a11\n",
        MERGES,
        "fields: &a {x: *a}\n",
        "fields: &a [*a]\n",
        "fields: &a {<<: *a}\n",
        "fields: {x: " + "[" * 3000 + "]" * 3000 + "}\n",
        "fields: {x: " + "{a: " * 3000 + "1" + "}" * 3000 + "}\n",
        "? [a, b]\n: 1\n",
        "a: 1\n---\nb: 2\n",
        "name: *nothing\n",
        "\x00",
        "name: \x07\n",
        "name: '\n",
        'name: "a\\0b"\n',
        "<<: 5\n<<: [3]\n",
        "<<: *a\n",
    ],
)  # fmt: skip
def test_a_hostile_file_is_an_error(read: Any, capsys: pytest.CaptureFixture[str], content: str) -> None:
    assert len(refused(capsys, read, content)) < 1000


def test_a_fit_alias_is_what_it_stands_for(read: Any) -> None:
    assert read("names: &n [a, b]\none_or_many: *n\n").one_or_many == ["a", "b"]


def test_a_pattern_that_is_no_regular_expression_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for group, pattern in (("rank_pattern", "(q_proj"), ("alpha_pattern", "*q"), ("rank_pattern", "a{2,1}")):
        call = functools.partial(parse, FinetuneLoraConfig, "doc", [*NEEDED, f'--lora.{group}={{"{pattern}": 8}}'])
        assert f"lora.{group}" in refused(capsys, call)


@pytest.mark.parametrize("pattern", ["(q_proj", "(.*)*x", r"(\w+\.?)+!", "a{99999999999999999999}"])
def test_a_pattern_of_an_adapter_is_an_error_and_ends(pattern: str) -> None:
    with pytest.raises(UserError, match="no regular expression|takes more than a second"):
        matches(pattern, "model.layers.11.self_attn.a_long_name_of_a_projection.q_proj")
    assert matches("q_proj", "model.layers.11.self_attn.q_proj")
