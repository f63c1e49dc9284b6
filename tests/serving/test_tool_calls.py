"""Tools of a request reach the template, and calls in what the model says are returned as OpenAI's clients read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from templates_of_today import QWEN3

from litmini.errors import UserError
from litmini.serving.openai_protocol import choice, encode, read_request
from litmini.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL]}
SAID = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm ü"}}\n</tool_call>'


@pytest.fixture
def tokenizer(tokenizer_dir: Path, tmp_path: Path) -> Tokenizer:
    (tmp_path / "t.jinja").write_text(QWEN3)
    return Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"))


def test_tools_reach_the_template(tokenizer: Tokenizer) -> None:
    for body, is_shown in ((BODY, True), ({**BODY, "tool_choice": "none"}, False), ({**BODY, "tools": []}, False)):
        (ids,) = encode(read_request(body, True, 64), tokenizer)
        assert ("weather" in tokenizer.decode(ids)) == is_shown
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    turns = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "dry", "tool_call_id": "a"},
    ]
    (ids,) = encode(read_request({**BODY, "messages": BODY["messages"] + turns}, True, 64), tokenizer)
    assert '{"name": "weather", "arguments": {}}' in tokenizer.decode(ids) and "None" not in tokenizer.decode(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_parsed(tokenizer: Tokenizer, stream: bool) -> None:
    settings = read_request({**BODY, "stream": stream}, True, 64)
    found = choice(settings, 0, SAID + "\n" + SAID.partition("\n")[2], "stop", [], tokenizer)
    message = found["delta" if stream else "message"]
    assert found["finish_reason"] == "tool_calls" and message["content"] == "Let me see."
    first, second = message["tool_calls"]
    assert first["function"]["name"] == "weather" and json.loads(first["function"]["arguments"]) == {"town": "Ulm ü"}
    assert first["type"] == "function" and first["id"] != second["id"] and ("index" in second) == stream


@pytest.mark.parametrize(
    "said",
    [
        "No.",
        SAID.replace("</tool_call>", ""),
        SAID.replace('"name"', '"nam"'),
        SAID.replace('"Ulm ü"', "Ulm"),
        SAID + "<tool_call>",
    ],
)
def test_what_is_no_call_stays_text(tokenizer: Tokenizer, said: str) -> None:
    found = choice(read_request(BODY, True, 64), 0, said, "stop", [], tokenizer)
    assert found["message"] == {"role": "assistant", "content": said} and found["finish_reason"] == "stop"
    without = {key: value for key, value in BODY.items() if key != "tools"}
    assert "tool_calls" not in choice(read_request(without, True, 64), 0, SAID, "stop", [], tokenizer)["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_choice": "required"}, "not implemented: tool_choice"),
        ({"tools": "weather"}, "tools is no list"),
        ({"tools": ["weather"]}, "tools is no list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\]: tool_calls has a call without"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\].content is missing"),
    ],
)
def test_bad_requests(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_request({**BODY, **change}, True, 64)
