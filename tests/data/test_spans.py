"""Conversations that a template cannot render as they are: each is an error with its location, none is trained otherwise."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenized import tokenize

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, load_data
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer

KNOWS = (
    "{% for m in messages %}{% if m.role in ROLES %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THREE = KNOWS.replace("ROLES", "('system', 'user', 'assistant')")
ANSWER = {"role": "assistant", "content": "fine"}


def turns(*roles: str, content: str = "hello") -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{content} {i}"} for i, role in enumerate(roles)]


@pytest.fixture
def make(tokenizer_dir: Path, tmp_path: Path) -> Any:
    def make(template: str, *conversations: list[dict[str, Any]], **changes: Any) -> Examples:
        (tmp_path / "t.jinja").write_text(template)
        tokenizer = Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"), changes.pop("began", None))
        examples = [Example(f"a:{number}", messages=messages) for number, messages in enumerate(conversations, 1)]
        return tokenize(examples, tokenizer, DataConfig("", max_dropped=0.0, **changes), "training")

    return make


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize(
    ("roles", "turn", "role"),
    [
        (("developer", "user", "assistant"), 1, "developer"),
        (("user", "assistant", "tool", "user", "assistant"), 3, "tool"),
        (("system", "developer", "user", "assistant"), 2, "developer"),
    ],
)
def test_a_turn_that_the_template_leaves_out(
    make: Any, roles: tuple[str, ...], turn: int, role: str, train_on: str
) -> None:
    good = turns("system", "user", "assistant")
    with pytest.raises(UserError, match=rf"a:2: the chat template leaves out turn {turn}, of the role {role}") as error:
        make(THREE, good, turns(*roles), good, train_on=train_on)
    assert "a:1" not in str(error.value) and "a:3" not in str(error.value)


def test_the_same_content_in_another_turn_does_not_hide_it(make: Any) -> None:
    same = [{"role": role, "content": "hello"} for role in ("developer", "user", "assistant")]
    with pytest.raises(UserError, match=r"leaves out turn 1, of the role developer"):
        make(THREE, same)


def test_a_turn_that_is_written_in_another_way_is_not_left_out(make: Any) -> None:
    as_json = THREE.replace("m.content }}", "m.content | tojson if m.role == 'system' else m.content }}")
    system = [{"role": "system", "content": 'say "yes"\nor no'}, *turns("user", "assistant")]
    assert len(make(as_json, system, [{"role": "system", "content": ""}, *turns("user", "assistant")])) == 2


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + THREE,
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}You help.{% endif %}{% endfor %}" + THREE,
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + THREE,
    ],
)
def test_a_conversation_that_begins_with_the_assistant(make: Any, template: str) -> None:
    with pytest.raises(UserError, match=r"a:2: .*(begins with the assistant|user first)") as error:
        make(template, turns("user", "assistant"), turns("assistant", "user", "assistant"))
    assert "differently" not in str(error.value) and "no element" not in str(error.value)


def test_a_conversation_may_begin_with_the_assistant_where_the_template_can(make: Any) -> None:
    assert make(THREE, turns("assistant", "user", "assistant")).table["trained"][0] > 6


def test_half_a_character_in_any_key(make: Any) -> None:
    template = THREE.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    bad = [{"role": "user", "name": "\ud83d", "content": "hi"}, ANSWER]
    with pytest.raises(UserError, match=r"a:2: .*half a character"):
        make(template, turns("user", "assistant"), bad)


def test_a_template_beyond_its_limits_ends_the_reading_with_the_location(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litmini.templates.render.SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages|length > 3 %}" + endless + "{% endif %}" + THREE
    long = turns("system", "user", "assistant", "user", "assistant")
    with pytest.raises(UserError, match=r"a:3: the chat template .* takes more than 1 s") as error:
        make(template, turns("user", "assistant"), turns("user", "assistant"), long, long)
    assert "a:4" not in str(error.value)


def test_the_date_of_a_template_is_that_of_the_tokens(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of another day are not taken from the cache, and a run that is resumed keeps its day."""
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    data, template = tmp_path / "d.jsonl", tmp_path / "t.jinja"
    data.write_text('{"prompt": "hello", "completion": "hello yourself"}\n')
    template.write_text("<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + THREE)

    def trained(began: datetime | None) -> str:
        tokenizer = Tokenizer(tokenizer_dir, str(template), began)
        examples, _, _ = load_data(DataConfig(str(data), chat_template=str(template)), tokenizer, 0)
        inputs, _ = examples[0]
        prompt = tokenizer.decode(tokenizer.encode_prompt("hello"))
        text = tokenizer.decode(inputs.tolist())
        assert text.startswith(prompt)
        return text

    first, second = datetime(2025, 11, 28, 9), datetime(2025, 11, 29, 9)
    assert "28 November 2025" in trained(first)
    assert "29 November 2025" in trained(second)
    assert "28 November 2025" in trained(first)
    assert f"{datetime.now():%d %B %Y}" in trained(None)
    assert len(list((tmp_path / "cache").iterdir())) == 3
