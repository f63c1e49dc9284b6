"""Log-probabilities as OpenAI has them, and the list of models."""

import json
import math

import pytest
import torch
from test_server import LIMITS, MESSAGES, alone, post, serving
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from litmini.generation.prompts import describe
from litmini.generation.sampling import Logprobs, log_probabilities
from litmini.generation.token_bytes import token_bytes, token_text
from litmini.serving.server import Server
from litmini.tokenizer import Tokenizer

TEXTS = [
    "Two large mugs",
    " leading",
    "naïve 你好",
    "🙂🙃 a",
    "tab\t\nline",
    "<|im_end|> end",
    "a  b   c",
    "½ ¡ÿ\u00ad\u0100",
]


@pytest.fixture(params=["byte-level", "sentencepiece", "metaspace"])
def tokenizer(request, tokenizer_dir, tmp_path) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer(tokenizer_dir)
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdeTwolrgmus",
        "▁a",
        "▁l",
        "mu",
    ]
    merges = [("▁", "a"), ("▁", "l"), ("m", "u")]
    fast = Fast(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True))
    if request.param == "metaspace":
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        fast.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
        )
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = decoders.Strip(" ", 1, 0)
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    fast.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    """Joined, they are the text; no byte is lost, and none is that of U+FFFD."""
    ids = tokenizer.encode(text, special=False)
    content = b"".join(token_bytes(tokenizer, i) for i in ids)
    assert content.decode().removeprefix(" ") == text.removeprefix(" ")
    for i in ids:
        named = describe(Logprobs(i, -0.5, [(i, -0.5)]), tokenizer)
        assert bytes(named["bytes"]) == token_bytes(tokenizer, i)
        assert named["token"] == token_text(bytes(named["bytes"])) and "\ufffd" not in named["token"]


def test_every_token_has_bytes(tokenizer):
    for i in range(tokenizer.fast.get_vocab_size()):
        content = token_bytes(tokenizer, i)
        assert content, tokenizer.fast.id_to_token(i)
        if tokenizer.decode([i], skip_special=False).strip() and "\ufffd" not in tokenizer.decode(
            [i], skip_special=False
        ):
            assert content.decode().strip() == tokenizer.decode([i], skip_special=False).strip()
    assert token_bytes(tokenizer, 10**6) == b""
    assert token_text(b"\xf0\x9f") == "\\xf0\\x9f" and token_text("½".encode()) == "½"


def test_a_token_that_cannot_be_has_a_number_that_json_has():
    logs = log_probabilities(torch.tensor([0.0, -math.inf, 1.0]), 2, 3)
    assert logs.top[2][1] == -math.inf


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_in_the_text(base, stream):
    model, tokenizer = base
    expected = alone(model, tokenizer, tokenizer.encode("naïve"), max_new_tokens=120, ignore_eos=True, logprobs=4)
    asked = {
        "prompt": "naïve",
        "max_tokens": 120,
        "ignore_eos": True,
        "logprobs": 4,
        "temperature": 0,
        "stream": stream,
    }
    with serving(Server(model, {"tiny": tokenizer}, LIMITS, None)) as address:
        _, answer = post(address, asked, "/v1/completions", raw=True)
    events = [e.removeprefix("data: ") for e in answer.decode().strip().split("\n\n")[:-1]] if stream else [answer]
    parts = [json.loads(event)["choices"][0] for event in events]
    text = "".join(part["text"] for part in parts)
    tokens, offsets, logprobs, tops = (
        [x for part in parts for x in part["logprobs"][key]]
        for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    )
    assert text == expected.text and len(tokens) == len(offsets) == len(logprobs) == len(tops) == 120
    assert offsets[0] == 0 and offsets == sorted(offsets) and any(token.startswith("bytes:\\x") for token in tokens)
    for token, offset, logprob, top, own in zip(tokens, offsets, logprobs, tops, expected.logprobs, strict=True):
        if not token.startswith("bytes:") and own.token not in tokenizer.special_ids:
            assert text[offset:].startswith(token)
        assert top[token] == logprob and 4 <= len(top) <= 5


def test_bytes_of_a_chat_joined_are_its_text(base):
    model, tokenizer = base
    asked = {
        "messages": MESSAGES,
        "max_tokens": 100,
        "ignore_eos": True,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    with serving(Server(model, {"tiny": tokenizer}, LIMITS, None)) as address:
        choice = post(address, asked)[1]["choices"][0]
        assert post(address, {**asked, "logprobs": False})[0] == post(address, {**asked, "logprobs": None})[0] == 400
        assert post(address, {"prompt": "a", "top_logprobs": 2, "logprobs": 2}, "/v1/completions")[0] == 400
    tokens = choice["logprobs"]["content"]
    special = {token_text(token_bytes(tokenizer, i)) for i in tokenizer.special_ids}
    joined = b"".join(bytes(token["bytes"]) for token in tokens if token["token"] not in special)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    assert any("\\x" in token["token"] for token in tokens) and all(len(t["top_logprobs"]) == 2 for t in tokens)


def test_one_model_of_the_list(base):
    model, tokenizer = base
    with serving(Server(model, {"tiny": tokenizer, "shop/orders v2": tokenizer}, LIMITS, None)) as address:
        _, answer = post(address, b"", "/v1/models", method="GET")
        for name, path in (("tiny", "tiny"), ("shop/orders v2", "shop/orders%20v2")):
            status, found = post(address, b"", f"/v1/models/{path}", method="GET")
            assert status == 200 and found in answer["data"] and found["id"] == name
        status, answer = post(address, b"", "/v1/models/gpt-9", method="GET")
        assert status == 404 and "no model 'gpt-9'; available: tiny, shop/orders v2" in answer["error"]["message"]
