"""Published chat templates (TRL ships them): texts as transformers renders them, every assistant turn a target that begins as
the model is asked, and calls that the server reads back."""

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import make_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from litmini.config.finetune import DataConfig
from litmini.data.encode import encode_examples
from litmini.data.formats import Example, read_examples
from litmini.data.turns import render_examples
from litmini.ops.cross_entropy import IGNORE
from litmini.templates.call_forms import parse_calls
from litmini.tokenizer import Tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "a city"}, "days": {"type": "integer"}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, *calls: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **keys}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call0000{number}", "name": "weather"}


def thought(text: str, before: str) -> dict[str, Any]:
    return said(f"<think>\n{before}\n</think>\n\n{text}")


CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Hi there"), said("Hello you"), user("And now?"), said("Nothing")]},
    "system": {"messages": [{"role": "system", "content": "Be kind"}, user("Hi there"), said("Hello you")]},
    "reasoning": {
        "messages": [
            *[user("1 + 1?"), said("Two", reasoning_content="One and one")],
            *[user("2 + 2?"), said("Four", reasoning_content="Two and two")],
        ]
    },
    "think": {
        "messages": [user("1 + 1?"), thought("Two", "One and one"), user("2 + 2?"), thought("Four", "Two and two")]
    },
    "call": {
        "tools": TOOLS,
        "messages": [
            *[user("Weather in Rome?"), said(None, call(1, city="Rome", days=2)), result("sunny"), said("It is sunny")],
            *[user("Bye"), said("Goodbye")],
        ],
    },
    "calls": {
        "tools": TOOLS,
        "messages": [
            *[user("Rome, Oslo?"), said("Let me see.", call(1, city="Rome"), call(2, city="Oslo"))],
            *[result("sunny"), result("rain", 2), said("Sun and rain")],
        ],
    },
    "reasoned call": {
        "tools": TOOLS,
        "messages": [
            *[user("Weather in Rome?"), said("", call(1, city="Rome"), reasoning_content="I must ask")],
            *[result("sunny"), said("It is sunny", reasoning_content="Sunny then")],
        ],
    },
}
CALLS = {"call", "calls", "reasoned call"}
REASONING = {"reasoning", "reasoned call"}
# templates, what they have no place for (refused, with the reason), and what renders differently when more follows: such
# chats are an example for each assistant turn
KNOWN: list[tuple[str, set[str], set[str]]] = [
    ("cohere cohere2 gemma3 idefics3 lfm2 llama3 llava_next phi3 phi3_5 qwen2_5_vl smolvlm", CALLS | REASONING, set()),
    ("deepseek_r1_distill deepseekv3", CALLS, {"plain", "system", "reasoning", "think"}),
    ("diffusion_gemma gemma4_v5", {"calls"}, {"reasoning"}),
    ("gemma", CALLS | REASONING | {"system"}, set()),
    ("gemma4 gemma4_v3 gemma4_v4", REASONING, {"calls"}),
    ("gemma4_v2 lfm2_v2 qwen2_5 qwen3_instruct_2507 qwen3_vl", REASONING, set()),
    ("llama3_1 llama3_2", REASONING | {"calls"}, set()),
    ("glm4moe lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl", set(), {"reasoning", "think"}),
    ("gptoss", set(), {*CHATS} - {"system"}),
    ("muse_glimmer", {"calls"}, set()),
    ("nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra", set(), {*CHATS}),
    ("qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8", set(), {*CHATS}),
    ("qwen3", set(), {*CHATS} - {"system", "reasoned call"}),
]
OF = {name: (refused, apart) for names, refused, apart in KNOWN for name in names.split()}
SHORT = [
    "glm4moe",
    "qwen3",
    "qwen3_5_think",
    "deepseek_r1_distill",
    "llama3_1",
    "gemma3",
    "gemma4_v5",
    "gptoss",
    "lfm2_2_5",
    "nemotron_3_nano",
    "phi3",
]
MARKER = re.compile(r"<[|｜][^|｜<>\s'\"]+[|｜]?>|<[a-z_]+\|>|</?[a-z]+_of_turn>|</s>|<eos>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tokenizer(tmp_path_factory.mktemp("published"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|endoftext|>"}))
    return directory


def tokenizer_of(name: str, base: Path) -> Tokenizer:
    """Return a tokenizer to which the markers of a template are special tokens."""
    markers = dict.fromkeys(MARKER.findall((TEMPLATES / f"{name}.jinja").read_text()))
    markers = {marker: None for marker in markers if not marker.startswith(("<|im_", "<|endoftext"))}
    return Tokenizer(base, str(TEMPLATES / f"{name}.jinja"), datetime.now(), new_tokens=list(markers))


def as_transformers(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, is_prompt: bool) -> str:
    named = {key: tokenizer._token(key) for key in ("bos_token", "eos_token", "pad_token")}
    (text,), _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=tokenizer.chat_template, add_generation_prompt=is_prompt, **named
    )  # fmt: skip
    return text


def read(tmp_path: Path, record: dict[str, Any]) -> Example:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (example,) = read_examples(str(tmp_path / "a.jsonl"), True)
    return example


def test_the_table_has_every_template() -> None:
    assert {p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith("_training")} == OF.keys()


@pytest.mark.parametrize("name", OF)
def test_every_turn_is_trained_as_the_model_is_asked(base: Path, tmp_path: Path, name: str) -> None:
    """As transformers renders the prompt before each assistant turn; what follows holds content, calls and reasoning."""
    tokenizer, (refused, apart) = tokenizer_of(name, base), OF[name]
    for kind, record in CHATS.items():
        example, problems = read(tmp_path, record), list[str]()
        rendered = render_examples([example], tokenizer, "assistant", problems, Counter())
        if kind in refused:
            assert re.match(
                r".*a.jsonl:1: the chat template .*(leaves out|fails on|renders turn 5 diff)", problems[0]
            ), kind
            continue
        messages, tools = example.messages or [], example.tools or None
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert not problems and len(rendered) == (len(turns) if kind in apart else 1), (kind, problems)
        targets = [(one.text[:start], one.text[start:end]) for one in rendered for start, end in one.spans]
        assert len(targets) == len(turns)
        for i, (prompt, target) in zip(turns, targets, strict=True):
            assert prompt == as_transformers(tokenizer, tokenizer.template.in_form(messages[:i]), tools, True), kind
            given, closed = record["messages"], prompt.rstrip().endswith("</think>")
            if (
                all(isinstance(message["content"], str) for message in given[:i])
                and not tokenizer.template.form(False).has_parts
            ):
                assert prompt == as_transformers(tokenizer, given[:i], tools, True)  # as the data have it
            for part in (given[i]["content"], "" if closed else given[i].get("reasoning_content")):
                assert (part or "").rpartition("\n")[2] in target, (kind, part)
            assert target.count("Rome") == json.dumps(given[i].get("tool_calls", [])).count("Rome")
            assert "None" not in target and "null" not in target


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "qwen3", "llama3_1", "gptoss"])
def test_calls_without_content_and_without_tools(base: Path, tmp_path: Path, name: str) -> None:
    """DeepSeek's templates write calls only where content is null, and join arguments as text; others want no null."""
    tokenizer, record = tokenizer_of(name, base), {"messages": CHATS["call"]["messages"][:4]}
    example, problems = read(tmp_path, record), list[str]()
    rendered = render_examples([example], tokenizer, "assistant", problems, Counter())
    assert not problems and sum(one.text[a:b].count("Rome") for one in rendered for a, b in one.spans) == 1
    whole = tokenizer.apply_template(example.messages or [])
    assert whole == as_transformers(tokenizer, tokenizer.template.in_form(example.messages or []), None, False)
    assert "Rome" in whole and "None" not in whole and "null" not in whole


@pytest.mark.parametrize("name", SHORT)
def test_tokens_begin_with_those_of_the_prompt_and_end_with_a_stop_token(base: Path, tmp_path: Path, name: str) -> None:
    tokenizer, (refused, _) = tokenizer_of(name, base), OF[name]
    for kind in CHATS.keys() - refused:
        example = read(tmp_path, CHATS[kind])
        part = encode_examples([example], tokenizer, DataConfig(""))
        assert not part.problems
        messages, ends = example.messages or [], 0
        for entry in part.table:
            span = slice(entry["start"], entry["start"] + entry["size"])
            inputs, labels = part.inputs[span].tolist(), part.labels[span].tolist()
            ends += sum(label in tokenizer.stop_ids for label in labels)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            prompts = [tokenizer.encode_prompt(messages[:i], example.tools or None) for i in turns]
            assert any(inputs[: len(prompt)] == prompt and labels[len(prompt) - 1] != IGNORE for prompt in prompts), (
                kind
            )
        assert ends >= sum(m["role"] == "assistant" for m in messages), kind


def test_a_template_whose_turns_have_no_end(base: Path, tmp_path: Path) -> None:
    """GLM-4.5 ends a turn with the role of the next one, which the model says, and which ends a generation."""
    tokenizer = tokenizer_of("glm4moe", base)
    ends = [tokenizer.fast.token_to_id(token) for token in ("<|user|>", "<|observation|>")]
    assert set(ends) <= set(tokenizer.stop_ids)
    for kind, expected in (("plain", [0, 0]), ("call", [1, 0, 0]), ("reasoning", [0, 0])):
        part = encode_examples([read(tmp_path, CHATS[kind])], tokenizer, DataConfig(""))
        assert not part.problems and [ends.index(i) for i in part.labels.tolist() if i in ends] == expected
    plain = (
        '{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ "assistant: " if add_generation_prompt }}'
    )
    (tmp_path / "t.jinja").write_text(plain)
    part = encode_examples([read(tmp_path, CHATS["plain"])], Tokenizer(base, str(tmp_path / "t.jinja")), DataConfig(""))
    assert "puts no stop token after an assistant's turn" in part.problems[0]


@pytest.mark.parametrize("name", [n for n, (refused, _) in OF.items() if "call" not in refused])
def test_the_server_reads_calls(base: Path, tmp_path: Path, name: str) -> None:
    """What a model says as its template writes it, without special tokens."""
    tokenizer = tokenizer_of(name, base)
    for kind in {"call", "calls"} - OF[name][0]:
        record, messages = CHATS[kind], read(tmp_path, CHATS[kind]).messages or []
        prompt = tokenizer.apply_template(messages[:1], True, TOOLS)
        text = tokenizer.apply_template(messages[:2], False, TOOLS)
        start = len(prompt) if text.startswith(prompt) else len(prompt.removesuffix("<think>\n"))
        said = tokenizer.decode(tokenizer.encode(text[start:], special=False)).partition("</think>")
        content, calls = parse_calls((said[2] or said[0]).strip(), TOOLS)
        if name.startswith(("gemma4", "diffusion", "gptoss", "muse")):  # of special tokens, or of an unknown form: text
            assert not calls
            continue
        found = [(call["name"], json.loads(call["arguments"])) for call in calls]
        assert found == [("weather", call["function"]["arguments"]) for call in record["messages"][1]["tool_calls"]], (
            name
        )
        assert content == (record["messages"][1]["content"] or "")


@pytest.mark.parametrize(
    "text", ['[weather(city="a"), os.system("x")]', "[f(1)]", '{"name": "f", "parameters": {}}', "[weather("]
)
def test_what_is_no_call_of_a_tool_is_text(text: str) -> None:
    assert parse_calls(text, TOOLS) == (text, [])
