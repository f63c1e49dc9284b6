"""Columns with other names, the last turn only, parts of text, calls as ShareGPT has them, prompts that are turns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from templates_of_today import HERMES
from test_encode import make, trained

from litmini.config.classify import LabelledDataConfig
from litmini.config.finetune import DataConfig
from litmini.config.preference import PreferenceDataConfig, RewardDataConfig
from litmini.data.dataset import load_data
from litmini.data.formats import pick_examples, read_examples
from litmini.data.labels import read_texts
from litmini.errors import UserError
from litmini.templates.builtin import BUILTIN
from litmini.tokenizer import Tokenizer

HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def write(tmp_path: Path, *records: Any) -> str:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(tmp_path / "a.jsonl")


def test_columns_with_other_names(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A key that litmini reads anyway keeps no meaning where it is another one's column; the named ones decide the form."""
    columns = {"prompt": "question", "completion": "text", "system": "role"}
    file = write(
        tmp_path, {"question": "1 + 1", "text": "2", "role": "Be brief", "prompt": "not this", "messages": [HI]}
    )
    (example,) = read_examples(file, True, columns)
    expected = [("system", "Be brief"), ("user", "1 + 1"), ("assistant", "2")]
    assert [(turn["role"], turn["content"]) for turn in example.messages or []] == expected
    assert pick_examples(file, True, {0}, columns) == [example]
    config = DataConfig(file, columns=columns, val_fraction=0.5)
    with pytest.raises(UserError, match="leaves none of 1"):
        load_data(config, Tokenizer(tokenizer_dir), 0)
    data, _, _ = load_data(DataConfig(file, columns=columns), Tokenizer(tokenizer_dir), 0)
    assert len(data) == 1
    with pytest.raises(
        UserError, match=r"a.jsonl:1: has no answer, found question.*prompt: question, completion: answer}"
    ):
        read_examples(file, True, {"prompt": "question", "completion": "answer"})
    for config_type, key, said in (
        (DataConfig, "promt", "did you mean 'prompt'?"),
        (PreferenceDataConfig, "choosen", "did you mean 'chosen'?"),
        (RewardDataConfig, "label", "it reads prompt, chosen, rejected, margin"),
        (LabelledDataConfig, "lable", "did you mean 'label'?"),
    ):
        with pytest.raises(UserError, match=f"reads no key '{key}'; {re.escape(said)}"):
            config_type(file, columns={key: "question"})
    (labelled,) = read_texts(write(tmp_path, {"review": "good", "stars": 5}), {"text": "review", "label": "stars"})
    assert (labelled.text, labelled.names) == ("good", ("5",))


def test_the_last_turn_only(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    no = {"role": "assistant", "content": "No"}
    examples = (
        read_examples(write(tmp_path, {"messages": [HI, no, HI, YES]}, {"text": "Once"}), True) if False else None
    )
    file = write(tmp_path, {"messages": [HI, no, HI, YES]}, {"messages": [HI, no, HI, {**YES, "weight": 0}]})
    examples = read_examples(file, True)
    data = make(tokenizer, *examples, train_on="last", max_dropped=0.5)
    assert len(data) == 1 and data.dropped == 1 and trained(tokenizer, data) == ["Yes<|im_end|>"]
    assert trained(tokenizer, make(tokenizer, *examples)) == ["No<|im_end|>", "Yes<|im_end|>"]


def test_a_prompt_and_a_completion_of_turns(tmp_path: Path, tokenizer_dir: Path) -> None:
    """TRL's form: assistant turns of the prompt are context."""
    no = {"role": "assistant", "content": "No"}
    (example,) = read_examples(write(tmp_path, {"prompt": [HI, no, HI], "completion": [YES], "system": "Be"}), True)
    assert [turn["role"] for turn in example.messages or []] == ["system", "user", "assistant", "user", "assistant"]
    tokenizer = Tokenizer(tokenizer_dir)
    assert trained(tokenizer, make(tokenizer, example)) == ["Yes<|im_end|>"]
    (example,) = read_examples(
        write(tmp_path, {"prompt": [HI, no, HI], "completion": [{**no, "weight": 0}, HI, YES]}), True
    )
    assert example.untrained == {1, 3} and trained(tokenizer, make(tokenizer, example)) == ["Yes<|im_end|>"]
    for record in ({"prompt": "Hi", "completion": [YES]}, {"prompt": [HI], "completion": "Yes"}):
        assert read_examples(write(tmp_path, record), True)[0].messages == [HI, YES]


def test_content_of_parts(tmp_path: Path) -> None:
    text = {"type": "text", "text": "Hi "}
    turns = [{"role": "user", "content": [text, {"type": "text", "text": "you"}]}, {**YES, "content": ["Y", "es"]}]
    (example,) = read_examples(write(tmp_path, {"messages": turns}), True)
    assert [turn["content"] for turn in example.messages or []] == ["Hi you", "Yes"]
    for part in ({"type": "image_url", "image_url": "x"}, {"type": "image"}, {"type": "input_audio"}):
        file = write(tmp_path, {"messages": [HI, YES]}, {"messages": [{"role": "user", "content": [text, part]}, YES]})
        with pytest.raises(UserError, match=rf"a.jsonl:2: content of a user turn .* type {part['type']}; only text"):
            read_examples(file, True)


def test_calls_and_observations_of_sharegpt(tmp_path: Path, tokenizer_dir: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    turns = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "function_call", "value": json.dumps([call, {**call, "arguments": "{}"}])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    tools = json.dumps([{"name": "add", "parameters": {"type": "object"}}])
    (example,) = read_examples(write(tmp_path, {"conversations": turns, "tools": tools}), True)
    messages = example.messages or []
    assert example.tools == [{"type": "function", "function": json.loads(tools)[0]}]
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert (
        messages[1]["tool_calls"] == [{"type": "function", "function": call}]
        and len(messages[3]["tool_calls"]) == 2
        and "content" not in messages[1]
    )
    (tmp_path / "t.jinja").write_text(HERMES)
    tokenizer = Tokenizer(tokenizer_dir, str(tmp_path / "t.jinja"))
    assert "".join(trained(tokenizer, make(tokenizer, example))).count('{"name": "add", "arguments": {') == 3
    for value, message in (("add(1)", "tool_calls is no list"), ("[]", "no call"), ('{"a": 1}', "without the name")):
        with pytest.raises(UserError, match=rf"a.jsonl:1: .*{message}"):
            read_examples(
                write(tmp_path, {"conversations": [turns[0], {"from": "function_call", "value": value}]}), True
            )


@pytest.mark.parametrize("name", BUILTIN)
def test_a_template_by_name_is_trained_with_and_saved(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    """A base model's tokenizer, with the markers as new tokens; the end of a turn stops a completion."""
    (tmp_path / "base").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).write_text((tokenizer_dir / file).read_text())
    markers = [token for token in BUILTIN[name].tokens if not token.startswith("<|im_")]
    if markers:
        with pytest.raises(UserError, match=rf"{name} needs the special tokens .*--data.new_tokens '\["):
            Tokenizer(tmp_path / "base", name)
    tokenizer = Tokenizer(tmp_path / "base", name, new_tokens=markers)
    system = {"role": "system", "content": "Be brief."}
    (example,) = read_examples(write(tmp_path, {"messages": [system, HI, YES, HI, YES]}), True)
    end = tokenizer.fast.id_to_token(tokenizer.stop_ids[-1])
    data = make(tokenizer, example)
    assert len(data) == 1 and trained(tokenizer, data) == [f"Yes{end}", f"Yes{end}"]
    text = tokenizer.decode(data[0][0].tolist(), skip_special=False)
    assert "Be brief." in text and text.index("Be brief.") < text.index("Hi")
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    again = Tokenizer(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template and again.stop_ids == tokenizer.stop_ids
    assert again.encode_prompt([system, HI]) == data[0][0].tolist()[: len(again.encode_prompt([system, HI]))]
    (developer,) = read_examples(write(tmp_path, {"messages": [{"role": "developer", "content": "x"}, HI, YES]}), True)
    with pytest.raises(UserError, match="a.jsonl:1: .*no place for the role developer"):
        make(tokenizer, developer)


def test_chats_for_a_base_model_name_the_templates(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Requirement 35: no default of anyone's, but the choices; one line for any number of records."""
    file = write(tmp_path, *[{"messages": [HI, YES]}] * 30)
    with pytest.raises(UserError) as error:
        load_data(DataConfig(file), Tokenizer(tokenizer_dir, "none"), 0)
    assert "chatml, llama3, gemma, alpaca, zephyr or FILE.jinja" in str(error.value) and "\n" not in str(error.value)
    assert "a.jsonl:1" in str(error.value)
    with pytest.raises(UserError, match="chat_template is chatlm; expected auto, none, chatml, llama3"):
        Tokenizer(tokenizer_dir, "chatlm")
