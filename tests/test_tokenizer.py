"""The tokenizer and its template: the same text and ids as transformers, in training, generation and after saving."""

import json
import shutil
from pathlib import Path

import pytest
from tokenized import tokenize
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from litmini.config.finetune import DataConfig
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.tokenizer import Tokenizer

END, START, STOP = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Please put <b>7</b> rugs aside 🙂"},
    {"role": "assistant", "content": "  Über {'naïve'}\n\n\tcafé 🙂"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "你好"},
]
BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def directory(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def settings(directory: Path, name: str = "tokenizer_config.json", **changes: object) -> None:
    """Change settings; None removes one."""
    file = directory / name
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def frame(directory: Path, single: str, **tokens: int) -> None:
    """Let the tokenizer put special tokens around text, as `single` says."""
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    special = [(fast.id_to_token(i), i) for i in tokens.values()]
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    fast.save(str(directory / "tokenizer.json"))


def template(directory: Path, text: str) -> Tokenizer:
    (directory / "chat_template.jinja").write_text(text)
    return Tokenizer(directory)


def test_template_as_in_transformers(directory: Path) -> None:
    """Text and ids, with everything that templates in the wild make use of."""
    rich = (
        "{%- if tools is not none %}TOOLS{% endif %}{% for m in messages %}\n"
        "  {%- if loop.index > 4 %}{% break %}{% endif %}\n"
        "  {% if m.role == 'assistant' %}\n"
        "{% generation %}{{ m.content | tojson }}{{ eos_token }}{% endgeneration %}\n"
        "  {% else %}\n"
        "{{ m.content | trim }} {{ m | tojson(indent=1) }} {{ strftime_now('%Y') }}{{ pad_token }}\n"
        "  {% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    for text in (Tokenizer(directory).chat_template, BOS_TEMPLATE, rich):
        settings(directory, bos_token="<|endoftext|>")
        ours, theirs = template(directory, text), AutoTokenizer.from_pretrained(directory)
        for messages in (CHAT, CHAT[1:], CHAT[:2]):
            for prompt in (False, True):
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                assert ours.apply_template(messages, add_generation_prompt=prompt) == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ours.encode_prompt(messages) == ids


@pytest.mark.parametrize("frames", [False, True], ids=["bare", "tokenizer adds BOS"])
@pytest.mark.parametrize("writes", [False, True], ids=["template without", "template writes BOS"])
def test_bos_once(directory: Path, frames: bool, writes: bool) -> None:
    """In a conversation the template alone decides, in raw text the tokenizer."""
    settings(directory, bos_token="<|endoftext|>")
    if frames:
        frame(directory, "<|endoftext|> $A", bos=END)
    if writes:
        (directory / "chat_template.jinja").write_text(BOS_TEMPLATE)
    tokenizer, config = Tokenizer(directory), DataConfig("")
    trained = tokenize([Example("a:1", messages=CHAT)], tokenizer, config, "training")
    for ids in (trained[0][0].tolist(), tokenizer.encode_prompt(CHAT[:2]), tokenizer.encode_prompt("Hi")):
        assert ids.count(END) == writes and (ids[0] == END) == writes
    raw = Tokenizer(directory, "none")
    trained = tokenize([Example("a:1", prompt="Add:", text="Add: 3")], raw, config, "training")
    for ids in (trained[0][0].tolist(), raw.encode_prompt("Add:"), raw.encode("")):
        assert ids.count(END) == frames and (ids[:1] == [END]) == frames
    assert AutoTokenizer.from_pretrained(directory)("Add:").input_ids == raw.encode("Add:")


@pytest.mark.parametrize("modern", [False, True])
def test_tokens_named_in_special_tokens_map(directory: Path, modern: bool) -> None:
    """Where older checkpoints name them; it counts unless tokenizer_config.json lists all added tokens, as newer ones do."""
    names = {"bos_token": {"content": "<|endoftext|>", "lstrip": False}, "eos_token": "<|im_start|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    settings(directory, bos_token="<|im_end|>" if modern else None, added_tokens_decoder={} if modern else None)
    ours, theirs = template(directory, BOS_TEMPLATE + "{{ eos_token }}"), AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert ours.apply_template(CHAT) == expected
    assert expected.startswith("<|im_end|>" if modern else "<|endoftext|>")
    assert ours.stop_ids[0] == theirs.eos_token_id == (STOP if modern else START)
    (directory / "saved").mkdir()
    ours.save(directory / "saved")
    assert Tokenizer(directory / "saved").apply_template(CHAT) == expected


def test_a_template_that_adds_a_token_that_no_file_names(directory: Path) -> None:
    """As in transformers: nothing is written where it stands alone, for which templates ask; else an error."""
    ours = template(directory, "{{ bos_token }}{% if bos_token is defined %}no{% endif %}{{ messages[1].content }}")
    assert ours.apply_template(CHAT) == AutoTokenizer.from_pretrained(directory).apply_chat_template(
        CHAT, tokenize=False
    )
    with pytest.raises(UserError, match="'bos_token' is undefined"):
        template(directory, "{{ bos_token + messages[1].content }}").apply_template(CHAT)


def test_raw_text_framed_with_an_end(directory: Path) -> None:
    """Only what stands before the text is put there, even where BOS and the end are one token."""
    frame(directory, "<|im_start|> $A <|im_end|>", bos=START, eos=STOP)
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("") == [START]
    assert tokenizer.encode("ab") == [START, *tokenizer.encode("ab", special=False)]
    assert tokenizer.encode("ab<|im_end|>")[-1] == STOP
    frame(directory, "<|im_end|> $A <|im_end|>", bos=STOP)
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("") == [STOP]
    assert tokenizer.encode("ab") == [STOP, *tokenizer.encode("ab", special=False)]


def test_stop_ids_from_everywhere(directory: Path) -> None:
    """tokenizer_config.json, generation_config.json, config.json, and what the template puts after an answer."""
    settings(directory, eos_token={"content": "a"})
    settings(directory, "generation_config.json", eos_token_id=[5, 6])
    (directory / "config.json").write_text('{"eos_token_id": 7}')
    a = Tokenizer(directory).fast.token_to_id("a")
    assert Tokenizer(directory).stop_ids == [a, 5, 6, 7, STOP]
    assert Tokenizer(directory, "none").stop_ids == [a, 5, 6, 7]
    assert template(directory, "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}").stop_ids == [a, 5, 6, 7]


def test_what_is_saved_is_what_was_used(directory: Path, tmp_path: Path) -> None:
    """A template from a file, and every stop id, travel with the weights; transformers sees the same."""
    settings(directory, chat_template="{{ 'an older one' }}", bos_token="<|endoftext|>")
    settings(directory, "generation_config.json", eos_token_id=0, temperature=0.6)
    file = tmp_path / "mine.jinja"
    file.write_text(BOS_TEMPLATE + "{# ü #}", encoding="utf-8")
    used, out = Tokenizer(directory, str(file)), tmp_path / "out"
    assert used.stop_ids == [STOP, END]
    out.mkdir()
    used.save(out)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [STOP, END], "temperature": 0.6}
    again, theirs = Tokenizer(out), AutoTokenizer.from_pretrained(out)
    assert (again.chat_template, again.stop_ids) == (used.chat_template, used.stop_ids)
    text = used.apply_template(CHAT)
    assert text.startswith("<|endoftext|><|im_start|>system")
    assert text == again.apply_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    prompt = theirs.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    assert used.encode_prompt(CHAT[:2]) == again.encode_prompt(CHAT[:2]) == prompt
    Tokenizer(directory, "none").save(out)  # over the old one: no template may stay
    assert Tokenizer(out).chat_template is None


def test_one_stop_id_is_saved_as_a_number(directory: Path, tmp_path: Path) -> None:
    Tokenizer(directory).save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == STOP


def test_where_a_template_is_found(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    assert Tokenizer(directory).chat_template is None
    settings(directory, chat_template="one")
    assert Tokenizer(directory).chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    settings(directory, chat_template=named)
    assert Tokenizer(directory).chat_template == "plain"
    assert template(directory, "a file").chat_template == "a file"


def test_without_a_template(directory: Path) -> None:
    tokenizer = Tokenizer(directory, "none")
    with pytest.raises(UserError, match="has no chat template: give the prompt as text"):
        tokenizer.encode_prompt(CHAT)
    with pytest.raises(
        UserError,
        match=r"has no chat template, as base models have none. Choose one with --data.chat_template: chatml, llama3",
    ):
        tokenizer.apply_template(CHAT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__.* is unsafe|unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not callable|immutable"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange too big"),
        ("{{ raise_exception('only two turns, please') }}", "only two turns, please"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages[7].role }}", "fails on these messages"),
        ("{% for m in messages %}", "is not valid jinja: Unexpected end of template"),
        ("{% include '/etc/passwd' %}", "fails on these messages"),
    ],
)
def test_a_hostile_or_broken_template_is_an_error(directory: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        template(directory, text).apply_template(CHAT)
    assert str(directory) in str(error.value)


def test_a_template_that_does_not_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litmini.templates.render.SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"chat template of .*tokenizer takes more than 1 s"):
        template(directory, endless)
    late = template(directory, "{% if messages|length > 3 %}" + endless + "{% endif %}" + BOS_TEMPLATE)
    with pytest.raises(UserError, match="takes more than 1 s"):
        late.encode_prompt(CHAT)
    assert late.encode_prompt("hi")


def test_a_template_is_text_without_a_byte_order_mark(directory: Path, tmp_path: Path) -> None:
    """As data files; it would be the first token of every prompt."""
    plain = Tokenizer(directory)
    file = directory / "chat_template.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for tokenizer in (Tokenizer(directory), Tokenizer(directory, str(file))):
        assert tokenizer.encode_prompt(CHAT) == plain.encode_prompt(CHAT)
    file.write_bytes(b"\xe9{{ 1 }}")
    for choice in ("auto", str(file)):
        with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8 text"):
            Tokenizer(directory, choice)


def test_a_template_that_ends_with_the_user(directory: Path) -> None:
    """It refuses the conversation by which the end of a turn is found; a prompt is what it is for."""
    refuses = "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}" + BOS_TEMPLATE
    tokenizer, theirs = template(directory, refuses), AutoTokenizer.from_pretrained(directory)
    assert (
        tokenizer.encode_prompt("hi")
        == theirs.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.stop_ids == [STOP]
    settings(directory, eos_token="<|endoftext|>")
    settings(directory, "generation_config.json", eos_token_id=None)
    assert Tokenizer(directory).stop_ids == [END, STOP]
    nothing = template(directory, "{% if messages[0].content == 'question' %}{{ raise_exception('no') }}{% endif %}x")
    assert nothing.template.after_completion == "" and nothing.stop_ids == [END]


def test_errors_of_files(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat template not found: .*chat\.jinja.*chat_template\.jinja"):
        Tokenizer(directory, str(directory / "chat.jinja"))
    settings(directory, eos_token=None)
    settings(directory, "generation_config.json", eos_token_id=None)
    with pytest.raises(UserError, match="names no end token"):
        Tokenizer(directory, "none")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(directory)
    whole = (directory / "tokenizer.json").read_bytes()
    for content in (b"", b"{}", whole[:1000], b"\xff" + whole):
        (directory / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
            Tokenizer(directory)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_file_that_truncates_or_pads(directory: Path) -> None:
    """Such settings in tokenizer.json are of another use; litmini cuts and pads where it counts it."""
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    fast.enable_truncation(3)
    fast.enable_padding(length=50)
    fast.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode("a b c d e f")) == "a b c d e f"
    assert 3 < len(tokenizer.encode("a b c d e f")) < 50


def test_decode(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    ids = tokenizer.encode("a 🙂<|im_end|>")
    assert tokenizer.decode(ids) == "a 🙂" and tokenizer.decode(ids, skip_special=False) == "a 🙂<|im_end|>"


@pytest.mark.real
def test_smollm2_equals_transformers(smollm2: Path) -> None:
    ours, theirs = Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for messages in (CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]):
        assert ours.apply_template(messages) == theirs.apply_chat_template(messages, tokenize=False)
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ours.encode_prompt(messages) == prompt
        assert (
            ours.encode(ours.apply_template(messages), special=False)
            == theirs.apply_chat_template(messages)["input_ids"]
        )
    for text in ("", "a  b\n\n 1984 🙂 Über", "<|im_start|>user\n"):
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.stop_ids == [STOP]
