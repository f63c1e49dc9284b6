"""Reasoning: every assistant turn is trained exactly as the model will be asked for it, token by token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from templates_of_today import DEEPSEEK, HERMES, QWEN3, QWEN3_5
from tiny import make_tokenizer
from tokenized import tokenize
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from litmini.config.finetune import DataConfig, FinetuneLoraConfig
from litmini.data.dataset import Examples, load_data
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.settings import Settings
from litmini.tokenizer import Tokenizer

THOUGHT = "<think>\nAdd them.\n</think>\n\n4"
ONE = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
TWO = [*ONE, {"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "5"}]


def reasoned(key: str | None = None) -> list[dict[str, Any]]:
    """Two turns with reasoning: within the content, or in a key."""
    second = {"role": "assistant", "content": "<think>\nIncrement.\n</think>\n\n5"}
    first: dict[str, Any] = {"role": "assistant", "content": THOUGHT}
    if key:
        first, second = {**ONE[1], key: "Add them."}, {**TWO[3], key: "Increment."}
    return [TWO[0], first, TWO[2], second]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A function that makes a directory with a tokenizer that knows reasoning and joins newlines, as Qwen's does."""

    def make(template: str) -> Path:
        directory = make_tokenizer(tmp_path / "tokenizer")
        content = json.loads((directory / "tokenizer.json").read_text())
        content["model"]["vocab"]["ĊĊ"] = len(content["model"]["vocab"])
        content["model"]["merges"].insert(0, ["Ċ", "Ċ"])
        fast = FastTokenizer.from_str(json.dumps(content))
        words = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        fast.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
        fast.save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text(template)
        return directory

    return make


def make(directory: Path, *conversations: list[dict[str, Any]], **changes: Any) -> tuple[Tokenizer, Examples]:
    tokenizer = Tokenizer(directory, template_kwargs=changes.pop("template_kwargs", None))
    examples = [Example(f"a:{n}", messages=messages) for n, messages in enumerate(conversations, 1)]
    return tokenizer, tokenize(examples, tokenizer, DataConfig("", **{"max_dropped": 0.0, **changes}), "training")


def parts(data: Examples, i: int) -> tuple[list[int], list[int]]:
    """Ids before the first supervised token, and supervised ids."""
    inputs, labels = data[i]
    first = int(np.flatnonzero(labels != IGNORE)[0])
    return inputs[: first + 1].tolist(), labels[labels != IGNORE].tolist()


@pytest.mark.parametrize("template", [QWEN3, QWEN3_5], ids=["Qwen3", "Qwen3.5"])
@pytest.mark.parametrize("key", [None, "reasoning_content", "reasoning", "thinking"])
def test_each_turn_is_trained_as_transformers_asks_for_it(place: Any, template: str, key: str | None) -> None:
    directory = place(template)
    messages = reasoned(key)
    tokenizer, data = make(directory, messages)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(data) == 2
    for example, turn in ((0, 1), (1, 3)):
        before, said = parts(data, example)
        asked = theirs.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        assert before == asked == tokenizer.encode_prompt(messages[:turn])
        whole = theirs.apply_chat_template(messages[: turn + 1], return_dict=False)
        assert [*before, *said] == whole[: len(before) + len(said)] and theirs.convert_ids_to_tokens(whole)[-1] == "Ċ"
    assert "Add them." in tokenizer.decode(parts(data, 0)[1]) and "Add them." not in tokenizer.decode(
        data[1][0].tolist()
    )
    s = data.statistics
    assert s["split_conversations"] == 1 and s["repeated_tokens"] == len(data[0][0])
    assert "rewritten_turns" not in data.notes
    assert "conversations that render differently when more follows: 1;" in data.describe("training")


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": False}])
@pytest.mark.parametrize("template", [QWEN3, QWEN3_5], ids=["Qwen3", "Qwen3.5"])
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one turn", "two"])
def test_completions_without_reasoning(place: Any, template: str, messages: Any, kwargs: Any) -> None:
    """An empty reasoning is read where the prompt has it, else said. Its newlines join no token of the prompt."""
    directory = place(template)
    tokenizer, data = make(directory, messages, template_kwargs=kwargs)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(data) == len(messages) // 2
    for i in range(len(data)):
        before, said = parts(data, i)
        turn = 2 * i + 1
        asked = theirs.apply_chat_template(
            messages[:turn], add_generation_prompt=True, return_dict=False, **(kwargs or {})
        )
        assert before == asked
        whole = theirs.apply_chat_template(messages[: turn + 1], return_dict=False, tokenize=False, **(kwargs or {}))
        assert tokenizer.decode([*before, *said], skip_special=False) == whole.removesuffix("\n")


def test_reasoning_in_data_where_it_is_switched_off(place: Any) -> None:
    """The model is asked with an empty reasoning, so what it says is the answer alone."""
    tokenizer, data = make(place(QWEN3), reasoned(), template_kwargs={"enable_thinking": False})
    texts = [tokenizer.decode(parts(data, i)[1], skip_special=False) for i in range(2)]
    assert texts == ["4<|im_end|>", "5<|im_end|>"] and data.statistics["rewritten_turns"] == 2
    assert parts(data, 1)[0] == tokenizer.encode_prompt(reasoned()[:3])


@pytest.mark.parametrize("asks", ["<think>\\n", ""])
@pytest.mark.parametrize("key", [None, "reasoning_content"])
def test_a_template_that_shows_no_reasoning_at_all(place: Any, asks: str, key: str | None) -> None:
    tokenizer, data = make(place(DEEPSEEK.replace("<think>\\n", asks).replace("<think>\n", asks)), reasoned(key))
    opening = "" if asks else "<think>\n"
    assert tokenizer.decode(parts(data, 0)[1], skip_special=False) == opening + "Add them.\n</think>\n\n4<|im_end|>"
    assert tokenizer.decode(parts(data, 1)[1], skip_special=False) == opening + "Increment.\n</think>\n\n5<|im_end|>"
    for i in range(2):
        assert parts(data, i)[0] == tokenizer.encode_prompt(reasoned(key)[: 2 * i + 1])
    assert data.statistics["rewritten_turns"] == 2


def test_a_template_that_asks_with_reasoning_and_data_that_have_none(place: Any) -> None:
    tokenizer, data = make(place(DEEPSEEK), TWO)
    assert tokenizer.decode(parts(data, 1)[1], skip_special=False) == "\n</think>\n\n5<|im_end|>"
    assert parts(data, 1)[0] == tokenizer.encode_prompt(TWO[:3])


def test_reasoning_that_the_template_does_not_know_is_no_silent_loss(place: Any) -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    directory = place(plain)
    with pytest.raises(UserError, match=r"a:2: the chat template leaves out the reasoning of turn 2"):
        make(directory, TWO, reasoned("reasoning_content"))
    _, data = make(directory, TWO, reasoned())
    assert len(data) == 2, "as content, it is shown in every turn"


def test_one_example_where_nothing_changes(place: Any) -> None:
    _, data = make(place(HERMES), TWO)
    assert len(data) == 1 and not data.notes and "differently" not in data.describe("training")


def test_settings_of_training_are_those_of_the_result(place: Any, tmp_path: Path) -> None:
    directory = place(QWEN3)
    trained = Tokenizer(directory, template_kwargs={"enable_thinking": False})
    (tmp_path / "saved").mkdir()
    trained.save(tmp_path / "saved")
    saved = Tokenizer(tmp_path / "saved")
    assert saved.encode_prompt("Hi") == trained.encode_prompt("Hi") != Tokenizer(directory).encode_prompt("Hi")
    assert Tokenizer(tmp_path / "saved", template_kwargs={}).encode_prompt("Hi") == Tokenizer(directory).encode_prompt(
        "Hi"
    )
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"template_kwargs has tools"):
        Tokenizer(directory, template_kwargs={"tools": []})


@pytest.mark.parametrize(
    "words",
    [["--data.template_kwargs", "{enable_thinking: false}"], ["--data.template_kwargs.enable_thinking", "false"]],
)
def test_variables_are_settings(words: list[str]) -> None:
    settings = Settings(FinetuneLoraConfig)
    for name, word in (("checkpoint_dir", "a"), ("out_dir", "b"), ("data.path", "c"), (words[0][2:], words[1])):
        settings.add_word(name, word)
    assert settings.build().data.template_kwargs == {"enable_thinking": False}
    with pytest.raises(UserError, match=r"expected names and values such as '\{enable_thinking: false\}' or null"):
        settings.add_word("data.template_kwargs", "3")


def test_tokens_of_other_variables_are_not_taken_from_the_cache(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (ONE, reasoned(), TWO)))
    directory, config = place(QWEN3), DataConfig(str(tmp_path / "a.jsonl"))
    for kwargs in ({}, {"enable_thinking": False}, {}):
        tokenizer = Tokenizer(directory, template_kwargs=kwargs)
        train, _, _ = load_data(config, tokenizer, 0)
        assert len(train) == 5 and (tokenizer.encode("<think>")[0] in parts(train, 1)[1]) == (not kwargs)
    assert train.locations([0, 2, 4]) == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3)]


def test_turns_of_a_conversation_are_not_split_between_training_and_validation(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITMINI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": reasoned()}) for _ in range(10)))
    config = DataConfig(str(tmp_path / "a.jsonl"), val_fraction=0.3)
    train, val, val_examples = load_data(config, Tokenizer(place(QWEN3)), 0)
    assert val is not None and (len(train), len(val), len(val_examples)) == (14, 6, 3)
    assert not set(train.table["number"]) & set(val.table["number"])
