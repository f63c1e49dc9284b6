"""Tools and calls of them: through the template as transformers renders them, supervised as what the assistant says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from templates_of_today import DEEPSEEK, HERMES, QWEN3, QWEN3_5
from tokenized import tokenize
from transformers import AutoTokenizer

from litmini.config.finetune import DataConfig
from litmini.data.formats import read_examples
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {}}}},
}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


def conversation(arguments: Any, **content: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", **content, "tool_calls": [call(arguments), call(arguments)]},
        {"role": "tool", "content": "dry", "tool_call_id": "call00001", "name": "weather"},
        {"role": "tool", "content": "still dry", "tool_call_id": "call00001", "name": "weather"},
        {"role": "assistant", "content": "No."},
    ]


@pytest.fixture
def directory(tokenizer_dir: Path, tmp_path: Path) -> Any:
    def make(template: str) -> Path:
        (tmp_path / "t").mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (tmp_path / "t" / name).write_bytes((tokenizer_dir / name).read_bytes())
        (tmp_path / "t/chat_template.jinja").write_text(template)
        return tmp_path / "t"

    return make


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "Let me see."}])
@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("template", [QWEN3, QWEN3_5, HERMES], ids=["Qwen3", "Qwen3.5", "Hermes"])
def test_calls_are_rendered_as_by_transformers_and_trained(
    directory: Any, tmp_path: Path, template: str, is_text: bool, content: dict[str, Any]
) -> None:
    arguments = {"town": "Ulm", "days": 1}
    messages = conversation(arguments, **content)
    given = conversation(json.dumps(arguments) if is_text else arguments, **content)
    tools: Any = [json.dumps(TOOL)] if is_text else [TOOL]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": given, "tools": tools}))
    tokenizer, theirs = Tokenizer(directory(template)), AutoTokenizer.from_pretrained(directory(template))
    examples = read_examples(str(tmp_path / "a.jsonl"), True)
    data = tokenize(examples, tokenizer, DataConfig("", max_dropped=0.0), "training")
    said = []
    for i in range(len(data)):
        inputs, labels = data[i]
        last = 1 if len(data) == 2 and i == 0 else 4
        first = int(np.flatnonzero(labels != IGNORE)[0])
        asked = theirs.apply_chat_template(
            messages[: last if len(data) == 2 else 1], tools=[TOOL], add_generation_prompt=True, return_dict=False
        )
        assert inputs[: first + 1].tolist() == asked
        whole = theirs.apply_chat_template(messages[: last + 1], tools=[TOOL], return_dict=False)
        assert [*inputs.tolist(), int(whole[-1])] == whole or len(data) == 2
        said.append(tokenizer.decode(labels[labels != IGNORE].tolist(), skip_special=False))
    whole_text = "".join(said)
    shown = '"arguments": {"town": "Ulm", "days": 1}' if template != QWEN3_5 else "<parameter=town>\nUlm\n</parameter>"
    assert whole_text.count(shown) == 2 and "No.<|im_end|>" in whole_text
    assert "dry" not in whole_text and "None" not in tokenizer.decode(data[0][0].tolist())


def test_null_keys_of_parquet_are_absent(tmp_path: Path) -> None:
    """A struct has the keys of all rows: those that are null were not there."""
    turns = conversation({"town": "Ulm"}, content=None)
    other = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "tool_calls": [call({"days": 1})]},
    ]
    second = {
        "type": "function",
        "function": {"name": "stop", "description": "Stop it", "parameters": {"type": "object"}},
    }
    rows = [{"messages": turns, "tools": [TOOL]}, {"messages": other, "tools": [second]}, {"messages": other[:1]}]
    for row in rows[:2]:
        row["tools"][0] = json.loads(json.dumps(row["tools"][0]).replace('"town": {}', '"town": {"type": "string"}'))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns, lines = (read_examples(str(tmp_path / name), True) for name in ("a.parquet", "a.jsonl"))
    for column, line in zip(columns, lines, strict=True):
        assert column.tools == line.tools and column.messages == line.messages
    assert "content" not in (columns[0].messages or [])[1] and columns[2].tools == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tools": [3]}, "tools is no list of objects"),
        ({"tools": "{"}, "tools is no list of objects"),
        ({"tools": {"name": "f"}}, "tools is no list of objects"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "without the name of its function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call("{")]}]},
            "arguments of the call of weather are no object",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [call({})]}]}, "a user turn has tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "content of a assistant turn"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    fine = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(fine) + "\n" + json.dumps({**fine, **record}))
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{message}"):
        read_examples(str(tmp_path / "a.jsonl"), True)


@pytest.mark.parametrize("what", ["tools", "tool_calls"])
def test_a_template_that_knows_no_tools_is_no_silent_loss(directory: Any, tmp_path: Path, what: str) -> None:
    messages = conversation({}, content="Let me see.")[:2]
    record: dict[str, Any] = {"messages": messages}
    if what == "tools":
        record = {"messages": [messages[0], {"role": "assistant", "content": "No."}], "tools": [TOOL]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    examples = read_examples(str(tmp_path / "a.jsonl"), True)
    with pytest.raises(UserError, match=rf"a.jsonl:1: the chat template leaves out the {what}"):
        tokenize(examples, Tokenizer(directory(DEEPSEEK)), DataConfig(""), "training")
    with pytest.raises(UserError, match="leaves out the tools"):
        Tokenizer(directory(DEEPSEEK)).encode_prompt("Hi", [TOOL])


def test_arguments_as_the_template_wants_them(directory: Any) -> None:
    """One that joins texts wants text."""
    joins = HERMES.replace("tool_call.arguments | tojson", "tool_call.arguments")
    assert joins != HERMES
    shown = '"arguments": {"town": "Ulm"}}'
    for arguments in ({"town": "Ulm"}, '{"town": "Ulm"}'):
        for template in (joins, HERMES, QWEN3):
            assert Tokenizer(directory(template)).apply_template(conversation(arguments)).count(shown) == 2
