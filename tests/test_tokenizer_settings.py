"""Files beside a tokenizer with values of any type: a tokenizer that works, or an error that names file and key."""

import json
import random
import shutil
from pathlib import Path

import pytest
from fuzz_amount import seeds

from litmini.errors import UserError
from litmini.system import has_colors
from litmini.tokenizer import Tokenizer

CASES = len(seeds(400))
KEYS = {
    "tokenizer_config.json": [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "chat_template",
        "added_tokens_decoder",
    ],
    "generation_config.json": ["eos_token_id", "temperature"],
    "config.json": ["eos_token_id"],
    "special_tokens_map.json": ["bos_token", "eos_token", "pad_token"],
}
VALUES = [
    *(
        None,
        True,
        False,
        0,
        2,
        -1,
        10**30,
        1.5,
        "",
        "<|im_end|>",
        "x",
        [],
        {},
        [2, None],
        [2, True],
        ["2"],
        [[2]],
        {"a": 1},
    ),
    *(
        {"content": "<|im_end|>"},
        {"content": 5},
        {"content": None},
        [{"template": "x"}],
        ["x"],
        [None],
        {"default": "x"},
    ),
    *([{"name": "default", "template": "{{ messages[0].content }}"}], [{"name": "tool_use", "template": "y"}]),
    *(
        [{"name": "default", "template": 5}],
        [{"name": [], "template": "x"}],
        "{{ eos_token }}{{ messages|length }}",
        "{{",
    ),
]


@pytest.fixture
def directory(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def change(directory: Path, name: str, **values: object) -> None:
    file = directory / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("generation_config.json", "eos_token_id", {"a": 1}, "eos_token_id is .*expected a token id or a list"),
        ("generation_config.json", "eos_token_id", [2, "3"], "eos_token_id"),
        ("config.json", "eos_token_id", "2", "eos_token_id"),
        ("config.json", "eos_token_id", True, "eos_token_id"),
        ("tokenizer_config.json", "eos_token", 5, "eos_token is 5; expected a token's text"),
        ("tokenizer_config.json", "eos_token", {}, "eos_token"),
        ("tokenizer_config.json", "eos_token", {"content": 5}, "eos_token"),
        ("tokenizer_config.json", "chat_template", [{"template": "x"}], "chat_template is .*name and template"),
        ("tokenizer_config.json", "chat_template", ["x"], "chat_template"),
        ("tokenizer_config.json", "chat_template", 5, "chat_template"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(directory, name, key, value, message):
    (directory / "chat_template.jinja").unlink()
    change(directory, name, **{key: value})
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        Tokenizer(directory)


def test_random_values(directory):
    draw = random.Random(21)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    worked = 0
    for _ in range(CASES):
        shutil.rmtree(directory)
        directory.mkdir()
        for name, content in before.items():
            if name != "chat_template.jinja" or draw.random() < 0.3:
                (directory / name).write_bytes(content)
        changed = []
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(list(KEYS))
            changed.append((name, draw.choice(KEYS[name]), draw.choice(VALUES)))
            change(directory, name, **dict([changed[-1][1:]]))
        try:
            tokenizer = Tokenizer(directory)
            tokenizer.encode_prompt("hi")
            worked += 1
        except UserError:
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {changed}") from error
    assert CASES / 5 < worked < CASES


def test_colors_are_for_terminals_that_have_them(monkeypatch):
    class Terminal:
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert has_colors(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colors(Terminal())
    monkeypatch.setenv("NO_COLOR", "")  # empty: as if it were not set
    assert has_colors(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colors(Terminal())


def test_a_template_that_is_a_pointer_of_git_is_no_template(directory):
    (directory / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n")
    with pytest.raises(UserError, match=r"chat_template.jinja is not here: that file is only git's pointer"):
        Tokenizer(directory)


@pytest.mark.parametrize("before", [[], [0]])
def test_text_may_become_no_token(directory, before):
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text())
    single = [{"SpecialToken": {"id": "x", "type_id": 0}} for _ in before]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    file.write_text(json.dumps(raw))
    assert Tokenizer(directory).encode("") == before
