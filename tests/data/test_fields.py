"""Fields that change what a record means are used, or refused with file and line; none is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
from templates_of_today import QWEN3
from tokenized import tokenize

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples
from litmini.data.formats import read_examples
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
PAIR = {"instruction": "Add", "output": "3"}


def read(tmp_path: Path, *records: dict[str, Any], has_template: bool = True) -> Any:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return read_examples(str(tmp_path / "a.jsonl"), has_template)


def trained(tokenizer: Tokenizer, data: Examples) -> list[str]:
    texts = []
    for i in range(len(data)):
        labels = data[i][1]
        texts.append(tokenizer.decode(labels[labels != IGNORE].tolist()))
    return texts


def turns(tmp_path: Path, record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in read(tmp_path, record)[0].messages]


@pytest.mark.parametrize("template", [None, QWEN3], ids=["ChatML", "Qwen3"])
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}, {"weight": 0.0}])
def test_a_turn_that_is_not_to_be_trained_is_context(
    tokenizer_dir: Path, tmp_path: Path, template: str | None, key: dict[str, Any]
) -> None:
    (tmp_path / "t.jinja").write_text(template or "")
    tokenizer = Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja") if template else "auto")
    five, four = {"role": "assistant", "content": "five"}, {"role": "assistant", "content": "four"}
    other = {name: 1 for name in key}
    examples = read(tmp_path, {"messages": [HI, {**five, **key}, HI, {**four, **other}, HI, {**YES, "weight": None}]})
    assert "weight" not in json.dumps(examples[0].messages)
    data = tokenize(examples, tokenizer, DataConfig("", max_dropped=0.0), "training")
    said = "".join(trained(tokenizer, data))
    assert "five" not in said and "four" in said and "Yes" in said
    assert "five" in tokenizer.decode(data[len(data) - 1][0].tolist())
    with pytest.raises(UserError, match=r"a.jsonl:1: turn 2 is not to be trained, but --data.train_on all"):
        tokenize(examples, tokenizer, DataConfig("", train_on="all"), "training")


def test_system_and_history(tmp_path: Path) -> None:
    system, pair = ("system", "In French."), [("user", "Add"), ("assistant", "3")]
    before = [("user", "a"), ("assistant", "b")]
    assert turns(tmp_path, {**PAIR, "system": "In French.", "history": [["a", "b"]]}) == [system, *before, *pair]
    assert turns(tmp_path, {**PAIR, "system": "", "history": []}) == pair
    assert turns(tmp_path, {**PAIR, "system": None, "history": '[["a", "b"]]'}) == [*before, *pair]
    assert turns(tmp_path, {"prompt": "Add", "completion": "3", "system_prompt": "In French."}) == [system, *pair]
    share = [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3", "weight": 0}]
    assert turns(tmp_path, {"conversations": share, "system": "In French."}) == [system, *pair]
    assert read(tmp_path, {"conversations": share, "system": "In French."})[0].untrained == {2}


def test_reasoning_beside_a_pair(tmp_path: Path) -> None:
    for key in ("reasoning", "reasoning_content", "thinking"):
        (example,) = read(tmp_path, {**PAIR, key: "1 + 2"})
        assert (example.messages or [])[1] == {"role": "assistant", "content": "3", "reasoning_content": "1 + 2"}
    with pytest.raises(UserError, match=r"a.jsonl:1: has tools, .* reasoning, for which plain text has no place"):
        read(tmp_path, {**PAIR, "reasoning": "1 + 2"}, has_template=False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [HI, {**YES, "weight": 0.5}]}, "expected 0 or 1"),
        ({"messages": [HI, {**YES, "weight": "0"}]}, "expected 0 or 1"),
        ({"messages": [HI, {**YES, "weight": 0, "train": True}]}, "the same in all of them"),
        ({"messages": [{**HI, "train": True}, YES]}, "only assistant turns are trained"),
        ({"messages": [{"role": "system", "content": "a"}, HI, YES], "system": "b"}, "a system key and a system turn"),
        ({"messages": [HI, YES], "history": [["a", "b"]]}, "history"),
        ({"messages": [HI, YES], "system": 3}, "system is int"),
        ({"messages": [HI, YES], "weight": 0.5}, "weight, which is read in turns only"),
        ({**PAIR, "train": False}, "train, which is read in turns only"),
        ({"messages": [HI, YES], "developer": "Be kind"}, "developer, which is not read: give it as a turn"),
        ({"messages": [{**HI, "images": ["x.png"]}, YES]}, "a user turn has images, which is not read: only text"),
        ({"messages": [HI, YES], "functions": [{"name": "f"}]}, "functions, which is not read: give them as tools"),
        ({"messages": [HI, YES], "documents": ["a"]}, "documents"),
        ({"messages": [HI, YES], "images": ["a.png"]}, "images"),
        ({"messages": [HI, YES], "chat_template_kwargs": {"enable_thinking": False}}, "--data.template_kwargs"),
        ({"messages": [HI, {**YES, "function_call": {"name": "f"}}]}, "function_call"),
        ({"messages": [{"role": "banana", "content": "a"}, HI, YES]}, "role 'banana'"),
        ({**PAIR, "history": "no list"}, "history is no list of pairs"),
        ({**PAIR, "history": [["a"]]}, "history is no list of pairs"),
        ({**PAIR, "history": [["a", 3]]}, "a text in history is int"),
        ({**PAIR, "system": "a", "system_prompt": "b"}, "expected one of them"),
    ],
)
def test_what_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"a.jsonl:1: .*{message}"):
        read(tmp_path, record)


def test_plain_text_has_no_place_for_them(tmp_path: Path) -> None:
    for more in ({"system": "a"}, {"history": [["a", "b"]]}, {"tools": [{"name": "f"}]}):
        with pytest.raises(UserError, match=r"a.jsonl:1: .*expected a chat template"):
            read(tmp_path, {**PAIR, **more}, has_template=False)


def test_a_turn_that_the_template_leaves_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    """In data with its line, and in a prompt."""
    known = "{% for m in messages %}{% if m.role in KNOWN %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    known += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "t.jinja").write_text(known.replace("KNOWN", "('system', 'user', 'assistant')"))
    tokenizer = Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"))
    for role in ("developer", "tool"):
        with pytest.raises(UserError, match=rf"leaves out messages\[1\], of the role {role}"):
            tokenizer.encode_prompt([HI, {"role": role, "content": "The word is kiwi."}, HI])
    assert tokenizer.encode_prompt([{"role": "system", "content": "S"}, HI, {"role": "tool", "content": ""}])
    (tmp_path / "t.jinja").write_text(known.replace("m.role in KNOWN", "not loop.first"))
    tokenizer = Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match=r"a.jsonl:1: the chat template leaves out turn 1, of the role user"):
        tokenize(read(tmp_path, {"messages": [{**HI, "content": "What?"}, YES]}), tokenizer, DataConfig(""), "training")
