"""From examples to tokens and labels: which tokens are supervised, which examples are dropped, and what is an error."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenized import tokenize
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, load_data
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.files import file_hash
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

START, STOP = 1, 2
CONFIG = DataConfig("", max_dropped=0.0)


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


def chat(*turns: str, first: str = "user") -> Example:
    """Turns of user and assistant by turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Example("a:1", messages=[{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])


def with_template(tokenizer: Tokenizer, tmp_path: Path, text: str) -> Tokenizer:
    file = tmp_path / "other.jinja"
    file.write_text(text)
    return Tokenizer(tokenizer.directory, str(file))


def make(tokenizer: Tokenizer, *examples: Example, **changes: object) -> Examples:
    return tokenize(list(examples), tokenizer, DataConfig("", **{"max_dropped": 0.0, **changes}), "training")


def parts(data: Examples, i: int = 0) -> tuple[list[int], list[int]]:
    inputs, labels = data[i]
    return inputs.tolist(), labels.tolist()


def trained(tokenizer: Tokenizer, data: Examples, i: int = 0) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in parts(data, i)[1]:
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special=False) for run in runs if run]


@pytest.mark.parametrize(
    "answers",
    [["Yes."], ["Yes.", "No."], ["", "b"], ["🙂 é 你", "🙂\n"], [" one", "a  b\n\n\tc   "], ["a <|im_end|> b"]],
)
def test_only_completions_and_their_ends_are_trained(tokenizer: Tokenizer, answers: list[str]) -> None:
    """Each answer whole, white space and split characters too, and its end token; not the newline after that."""
    turns = [turn for answer in answers for turn in ("A question 🙂? <|im_end|>", answer)]
    data = make(tokenizer, chat(*turns))
    assert trained(tokenizer, data) == [answer + "<|im_end|>" for answer in answers]
    labels = np.array(parts(data)[1])
    assert data.statistics["trained_tokens"] == (labels != IGNORE).sum() > 0
    assert labels[-1] == IGNORE, "the newline after the last end token"


def test_roles_around_completions(tokenizer: Tokenizer) -> None:
    """System and tool turns are not trained; nor is a question without an answer."""
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    example = Example("a:1", messages=[{"role": role, "content": f"By {role}."} for role in roles])
    assert trained(tokenizer, make(tokenizer, example)) == ["By assistant.<|im_end|>"] * 2


def test_labels_are_shifted_once(tokenizer: Tokenizer) -> None:
    """labels[i] is inputs[i + 1]; the last label belongs to the example itself, never to the next one."""
    examples = [chat(f"Question {i}", f"Answer {i} is here." * (i + 1)) for i in range(5)]
    examples += [Example("a:1", text="Once upon a time")]
    data = make(tokenizer, *examples)
    assert len(data) == 6 and sum(len(parts(data, i)[0]) for i in range(6)) == data.statistics["tokens"]
    for i, example in enumerate(examples):
        inputs, labels = parts(data, i)
        text = tokenizer.apply_template(example.messages) if example.messages else example.text + "<|im_end|>"
        ids = tokenizer.encode(text, special=False)
        assert inputs == ids[:-1]
        assert all(label in (IGNORE, token) for label, token in zip(labels, ids[1:], strict=True))
    assert parts(data, 5)[1][-1] == STOP


def test_trained_prompt_is_the_served_prompt(tokenizer: Tokenizer) -> None:
    messages = [{"role": r, "content": c} for r, c in [("system", "S "), ("user", " \n🙂\n"), ("assistant", "Yes")]]
    data = make(tokenizer, Example("a:1", messages=messages))
    prompt = tokenizer.encode_prompt(messages[:2])
    inputs, labels = parts(data)
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert inputs[: first + 1] == prompt


def test_train_on_all(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every token but the first; and no span is needed, so any template will do."""
    data = make(tokenizer, chat("Hi", "Yes"), train_on="all")
    inputs, labels = parts(data)
    assert labels == [*inputs[1:], tokenizer.encode("\n")[0]]
    assert parts(make(tokenizer, Example("a:1", prompt="a", text="ab"), train_on="all"))[1][-1] == STOP
    unstable = with_template(
        tokenizer, tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert trained(unstable, make(unstable, chat("Hi", "Yes"), train_on="all")) == ["HiYes"]


def test_raw_text(tokenizer: Tokenizer) -> None:
    """All of it is trained after the prompt, and then the end, though no template says so."""
    data = make(
        tokenizer, Example("a:1", text="Once <|im_end|> upon"), Example("a:2", prompt="Add:", text="Add: 3 🙂\n")
    )
    first = tokenizer.encode(tokenizer.mark("Once <|im_end|> upon"))
    assert parts(data, 0) == (first, [*first[1:], STOP])
    assert trained(tokenizer, data, 1) == [" 3 🙂\n<|im_end|>"]


def test_truncation_is_counted(tokenizer: Tokenizer) -> None:
    """An example one token too long is cut; one that fits to the token is not."""
    example = chat("Hi", "word " * 30)
    inputs, labels = parts(make(tokenizer, example))
    length = len(inputs)
    for limit, cut in ((length, 0), (length - 1, 1), (20, 1)):
        data = make(tokenizer, example, max_seq_len=limit)
        assert parts(data) == (inputs[:limit], labels[:limit])
        assert (data.statistics["truncated_examples"], data.statistics["longest"]) == (cut, min(limit, length))
    assert "truncated 1 (50.0%), dropped 0" in make(tokenizer, example, chat("a", "b"), max_seq_len=20).describe(
        "training"
    )


def test_examples_without_a_target_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    good, question, cut = chat("Hi", "Yes"), chat("Only a question"), chat("long " * 60, "Yes")
    examples = [question, good, cut, good]
    data = make(tokenizer, *examples, max_dropped=0.5, max_seq_len=40)
    assert len(data) == 2 and parts(data, 0) == parts(data, 1) == parts(make(tokenizer, good))
    s = data.statistics
    assert (s["examples"], s["dropped_examples"], s["truncated_examples"]) == (2, 2, 1)
    assert s["tokens"] == 2 * len(parts(data)[0])
    with pytest.raises(
        UserError, match=r"2 of 4 training examples have no supervised token within max_seq_len 40 .*a:1"
    ):
        make(tokenizer, *examples, max_dropped=0.49, max_seq_len=40)
    empty = Example("a:1", text="")
    assert make(tokenizer, good, empty, max_dropped=0.5).statistics["dropped_examples"] == 1
    with pytest.raises(UserError, match=r"2 of 2 training examples have no supervised token"):
        make(tokenizer, question, question, max_dropped=1.0)


def test_a_template_that_ends_the_whole_conversation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As Phi-3's does: an end token after the last answer that is not there after earlier ones."""
    text = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    text += "{{ '' if add_generation_prompt else '<|im_start|>' }}"
    other = with_template(tokenizer, tmp_path, text)
    data = make(other, chat("ab", "bc", "cd", "de"))
    labels = [label for i in range(len(data)) for label in data[i][1].tolist() if label != IGNORE]
    assert other.decode(labels, skip_special=False) == "bc<|im_end|>de<|im_end|>"


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        # what asks for an answer is not what stands before one
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}model: {% endif %}",
            ["a", "b"],
            r"a:1: the chat template renders turn 2 differently",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            ["a", "b"],
            r"a:1: the chat template puts no stop token after an assistant's turn",
        ),
        (
            "{% if messages | length % 2 and not add_generation_prompt %}{{ raise_exception('in pairs') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            ["a", "b", "c"],
            r"a:1: the chat template of .* fails on these messages: in pairs",
        ),
    ],
    ids=["other prompt", "no stop token", "refusal"],
)
def test_templates_whose_turns_cannot_be_told_apart(
    tokenizer: Tokenizer, tmp_path: Path, template: str, turns: list[str], message: str
) -> None:
    directory = Path(shutil.copytree(tokenizer.directory, tmp_path / "tokenizer"))
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        make(Tokenizer(directory), chat(*turns))


@pytest.mark.parametrize(
    "template",
    [
        # a space before the answer, which is part of the answer's first token
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        # two newlines before the answer: one token alone, two tokens with a letter after them, none across
        "{% for m in messages %}{{ m.role }}\n\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n\n{% endif %}",
    ],
    ids=["token across", "other tokens"],
)
def test_a_prompt_has_the_tokens_with_which_the_model_is_asked(
    tokenizer: Tokenizer, tmp_path: Path, template: str
) -> None:
    """Where a token would cross its end, each turn is an example of its own, tokenised in two."""
    fast = FastTokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    content = json.loads(fast.to_str())
    content["model"]["vocab"]["ĊĊ"] = len(content["model"]["vocab"])
    content["model"]["merges"].insert(0, ["Ċ", "Ċ"])
    directory = Path(shutil.copytree(tokenizer.directory, tmp_path / "tokenizer"))
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(template)
    changed, example = Tokenizer(directory), chat("a", "b", "c", "d")
    data = make(changed, example)
    assert len(data) == 2 and data.notes["apart"] == 2 and trained(changed, data, 1) == ["d<|im_end|>"]
    for number, turns in enumerate((1, 3)):
        prompt = changed.encode_prompt(example.messages[:turns])
        assert data[number][0].tolist()[: len(prompt)] == prompt


def test_a_context_that_changes_when_the_turn_is_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What follows the last turn of the prompt is what the model says, whatever happened to the turns before."""
    template = "{% for m in messages %}{{ '<!>' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}"
    changed, example = with_template(tokenizer, tmp_path, template), chat("a", "b", "c", "d")
    data = make(changed, example)
    assert [trained(changed, data, i) for i in range(2)] == [["<!>b<|im_end|>"], ["<!>d<|im_end|>"]]
    for number, turns in enumerate((1, 3)):
        prompt = changed.encode_prompt(example.messages[:turns])
        assert data[number][0].tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("content", "turns"),
    [
        # the same question twice: what the prompt ends with stands in the whole at two places
        ("{{ messages | length - loop.index if m.role == 'user' }}:{{ m.content }}", ["Hi", "a", "Hi", "b"]),
        # the question itself is another one when it is asked
        ("{{ m.content | upper if add_generation_prompt and loop.last else m.content }}", ["Hi", "a"]),
    ],
    ids=["two places", "another question"],
)
def test_a_context_that_changes_so_that_the_turn_cannot_be_found(
    tokenizer: Tokenizer, tmp_path: Path, content: str, turns: list[str]
) -> None:
    template = "{% for m in messages %}" + content + "<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match=rf"a:1: the chat template renders turn {len(turns)} differently"):
        make(with_template(tokenizer, tmp_path, template), chat(*turns))


def test_a_turn_with_stop_tokens_of_two_kinds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All of it is trained, up to the last of them."""
    directory = Path(shutil.copytree(tokenizer.directory, tmp_path / "tokenizer"))
    for stops in ([0, 2], [2, 0]):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        other = Tokenizer(directory, special_tokens_in_text=True)
        assert set(other.stop_ids) == {0, 2}
        assert trained(other, make(other, chat("Q", "a<|endoftext|>b"))) == ["a<|endoftext|>b<|im_end|>"]


def test_character_split_over_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A token of a space and half an emoji: its bytes cannot be shared out, so both sides are tokenised alone."""
    content = json.loads((tokenizer.directory / "tokenizer.json").read_text())
    content["model"]["vocab"]["Ġð"] = len(content["model"]["vocab"])
    content["model"]["merges"].insert(0, ["Ġ", "ð"])
    directory = Path(shutil.copytree(tokenizer.directory, tmp_path / "tokenizer"))
    (directory / "tokenizer.json").write_text(json.dumps(content))
    changed = Tokenizer(directory)
    assert "Ġð" in changed.encode_batch([" 🙂"])[0].tokens
    data = make(changed, Example("a:1", prompt="A: ", text="A: 🙂"))
    assert trained(changed, data) == ["🙂<|im_end|>"] and data.notes["apart"] == 1
    assert data[0][0].tolist()[:3] == changed.encode("A: ")
    assert trained(changed, make(changed, Example("a:1", prompt="A:", text="A: 🙂"))) == [" 🙂<|im_end|>"]


@pytest.mark.parametrize("style", ["normalizer", "pre-tokenizer"])
def test_sentencepiece(tmp_path: Path, style: str) -> None:
    """Llama 2's kind: spaces are a letter, text gets one in front, unknown characters are bytes, BOS in each round."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"[]/INSTabcxy", "▁a", "ab"]
    vocab = {letter: i for i, letter in enumerate(dict.fromkeys(letters))}
    fast = FastTokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>"))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    if style == "normalizer":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    tokenizer, example = Tokenizer(tmp_path), chat("ab 🙂", "ab  é", "c", "🙂")
    inputs, labels = parts(make(tokenizer, example))
    tokens = [tokenizer.fast.id_to_token(label) if label != IGNORE else "." for label in labels]
    runs = "▁a b ▁ ▁ <0xC3> <0xA9> </s>", "▁ <0xF0> <0x9F> <0x99> <0x82> </s>"
    assert " ".join(tokens).strip(". ").split(" . ", 1)[0] == runs[0] and " ".join(tokens).endswith(". " + runs[1])
    assert sum(token != "." for token in tokens) == len(" ".join(runs).split())
    assert inputs.count(1) == 2
    prompt = tokenizer.encode_prompt(example.messages[:3])
    assert inputs[: len(prompt)] == prompt
    data = make(tokenizer, Example("a:1", prompt="c ", text="c a"))  # "▁a" would cross; alone, "a" would get a space
    assert [tokenizer.fast.id_to_token(i) for i in parts(data)[1] if i != IGNORE] == ["a", "</s>"]
    assert data.notes["apart"] == 1


def test_problems_come_in_one_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ raise_exception('no') if m.content == 'bad' }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = with_template(tokenizer, tmp_path, template)
    examples = [replace(chat("bad" if i in (3, 1500) else "a", "b"), where=f"a:{i}") for i in range(1, 2001)]
    with pytest.raises(UserError) as error:
        make(tokenizer, *examples)
    assert re.search("2 records: .*; first a:3$", str(error.value))


def test_offsets_cover_white_space(tokenizer_dir: Path, tmp_path: Path) -> None:
    """`trim_offsets` in tokenizer.json would leave tokens of white space without a span; ids are the same."""
    directory = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    reference, tokenizer = FastTokenizer.from_file(str(directory / "tokenizer.json")), Tokenizer(directory)
    text = "a \n\n   b"
    assert any(start == stop for start, stop in reference.encode(text).offsets), "the case that this test is about"
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert trained(tokenizer, make(tokenizer, chat("Hi", text))) == [text + "<|im_end|>"]


def test_load_data_splits_validation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}", "completion": f"{i}"}) + "\n" for i in range(20)))
    other.write_text('{"text": "other"}\n')

    def load(seed: int = 0, **changes: object):
        return load_data(DataConfig(str(file), **changes), tokenizer, seed)

    train, val, val_examples = load()
    assert len(train) == 20 and val is None and val_examples == []
    train, val, val_examples = load(val_path=str(other))
    assert len(train) == 20 and val is not None and len(val) == 1 and val_examples[0].text == "other"
    train, val, val_examples = load(val_fraction=0.25)
    assert val is not None and (len(train), len(val), len(val_examples)) == (15, 5, 5)
    together = sorted(tuple(parts(data, i)[0]) for data in (train, val) for i in range(len(data)))
    assert together == sorted(tuple(parts(load()[0], i)[0]) for i in range(20)), "each on one side, none lost"
    assert [e.where for e in load(val_fraction=0.25)[2]] == [e.where for e in val_examples]
    assert [e.where for e in load(seed=1, val_fraction=0.25)[2]] != [e.where for e in val_examples]
    assert len(load(val_fraction=0.001)[2]) == 1
    for changes, message in (
        ({"val_fraction": 0.99}, "val_fraction 0.99 leaves none of 20 examples to train on"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": 0.1, "val_path": str(other)}, "val_path and data.val_fraction are both given"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
    ):
        with pytest.raises(UserError, match=message):
            load(**changes)


def test_load_data_without_a_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Alpaca becomes plain text then, and conversations are refused."""
    (tmp_path / "a.jsonl").write_text('{"instruction": "Add", "output": "3"}')
    plain = Tokenizer(tokenizer.directory, "none")
    train, _, _ = load_data(DataConfig(str(tmp_path / "a.jsonl")), plain, 0)
    assert tokenizer.decode(parts(train)[0]).endswith("### Instruction:\nAdd\n\n### Response:\n3")
    assert trained(plain, train) == ["3<|im_end|>"]
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "assistant", "content": "3"}]}')
    with pytest.raises(
        UserError, match=r"b.jsonl:1: .* has no chat template, as base models have none. Choose one with"
    ):
        load_data(DataConfig(str(tmp_path / "b.jsonl")), plain, 0)


def test_show_masks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(tokenizer, chat("Q", "A"), Example("a:2", prompt="Q:", text="Q: A"), chat("R", "B"))
    first, second = data.show_masks(tokenizer, 2).split("\n--- ")
    assert first.startswith(f"--- example 1: 2 of {len(parts(data)[0])} tokens supervised\n")
    assert first.endswith("supervised\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[A][<|im_end|>]")
    assert second == "example 2: 2 of 3 tokens supervised\nQ:[ A][<|im_end|>]"
    assert data.show_masks(tokenizer, 99).count("--- example") == 3
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = data.show_masks(tokenizer, 2).split("\n--- ")[1]
    assert coloured.endswith("\033[2mQ\033[0m\033[2m:\033[0m\033[32m A\033[0m\033[32m<|im_end|>\033[0m")


def test_describe(tokenizer: Tokenizer) -> None:
    data = make(tokenizer, Example("a:1", text="a"), Example("a:1", prompt="a", text="a b c"))
    assert data.describe("training") == (
        "training: 2 examples, 4 tokens, 100% supervised, longest 3, truncated 0 (0.0%), dropped 0"
    )


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(str(tmp_path / "a")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.real
def test_quickstart_masks(smollm2: Path) -> None:
    """The first example of the quickstart: exactly its answer and the end of its turn are trained."""
    tokenizer = Tokenizer(smollm2)
    file = Path(__file__).parents[2] / "config_hub/quickstart/train.jsonl"
    train, _, _ = load_data(DataConfig(str(file), max_seq_len=512), tokenizer, 0)
    examples = [json.loads(line)["messages"] for line in file.open()]
    assert len(train) == len(examples)
    for i in (0, 1, len(examples) - 1):
        assert trained(tokenizer, train, i) == [examples[i][-1]["content"] + "<|im_end|>"]
        inputs, labels = parts(train, i)
        prompt = tokenizer.encode_prompt(examples[i][:-1])
        assert inputs[: len(prompt)] == prompt and labels[: len(prompt) - 1] == [IGNORE] * (len(prompt) - 1)
    assert train.table["size"].max() == train.statistics["longest"] < 512
