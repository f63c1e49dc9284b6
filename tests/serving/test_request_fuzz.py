"""Requests with random values in every field: each is answered with 200 or 4xx, and others beside them as ever.

LITMINI_FUZZ is a factor on their number.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzz_amount import seeds
from test_server import alone, post, serving, wait_until_idle

import litmini
from litmini.serving.openai_protocol import IGNORED, KNOWN, NEUTRAL
from litmini.serving.server import Limits, Server

CASES = len(seeds(250))
LIMITS = Limits(max_batch=6, max_queue=40, max_new_tokens=60, max_context=256, max_body_bytes=200_000, body_seconds=5)
SCALARS = [
    *(None, True, False, 0, 1, -1, 2, 5, 16, 20, 21, 2**31, 2**63, -(2**63), 2**64, 10**400, 10**4000, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 5e-324, 1e-300, 1e-46, 1e-40, 1e-20, 1e20, 1e40, 1e300, float("inf"), float("nan")),
    *(
        "",
        " ",
        "a",
        "Two large mugs",
        "tiny",
        "user",
        "null",
        "\x00",
        "\u202e",
        "🙂",
        "\ud83d",
        "\ud83dx",
        "<|im_end|>",
    ),
    *("x" * 5_000, "none", "text", "\ufffd", "{{ 7 * 7 }}", "../..", "true"),
]
MESSAGES = [{"role": "user", "content": "Say 7."}]


def value(draw: random.Random, depth: int = 0):
    """Any JSON value."""
    kind = draw.random()
    if kind < 0.7 or depth > 3:
        return draw.choice(SCALARS)
    if kind < 0.85:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    if kind < 0.99:
        keys = ["role", "content", "text", "type", "include_usage", "name", "\ud800", "", "tool_calls"]
        return {draw.choice(keys): value(draw, depth + 1) for _ in range(draw.randint(0, 3))}
    nested: object = 1
    for _ in range(draw.choice([10, 300, 900, 5_000])):
        nested = [nested]
    return nested


def message(draw: random.Random):
    content = draw.choice(["hello", "", "a b", [{"type": "text", "text": "x"}], value(draw)])
    role = draw.choice(["system", "user", "assistant", "tool", "developer", value(draw)])
    extra = {draw.choice(["name", "tool_calls", "tool_call_id", "refusal"]): value(draw)} if draw.random() < 0.3 else {}
    return {"role": role, "content": content, **extra}


def near(draw: random.Random) -> dict:
    """A good value for some of the settings."""
    good = {
        "temperature": [0, 1, 0.7, 1e-40, 1e-300, 2**64, 1e300],
        "top_p": [1, 0.5, 1e-300, 1e-40],
        "min_p": [0, 0.5, 1, 1e-300],
        "top_k": [1, 5, 10**30],
        "repetition_penalty": [1.0, 1e-40, 1e-300, 1e300, 1.3],
        "seed": [0, -1, 2**64],
        "n": [1, 3],
        "stop": ["a", ["b", "cd"], "\ufffd"],
        "stream": [True, False],
        "ignore_eos": [True],
        "logprobs": [True, 3, 0],
        "top_logprobs": [0, 3, 20],
        "stream_options": [{"include_usage": True}],
    }
    return {key: draw.choice(values) for key, values in good.items() if draw.random() < 0.25}


def body(draw: random.Random, chat: bool) -> dict:
    fields = [*KNOWN, *IGNORED, *NEUTRAL]
    made: dict = {"max_tokens": draw.choice([1, 4, 12]), **near(draw)}
    if chat:
        made["messages"] = MESSAGES if draw.random() < 0.6 else [message(draw) for _ in range(draw.randint(0, 4))]
    else:
        made["prompt"] = draw.choice(["abc", ["a", "b"], [1, 2, 3], [[1], [2, 3]], [511], [512], [-1], value(draw)])
    for _ in range(draw.choice([0, 0, 1, 2])):
        made[draw.choice([*fields, "temprature", "\ud83d", ""])] = value(draw)
    return made


def encode(draw: random.Random, content: dict) -> bytes:
    """As JSON text, at times damaged: cut off, with raw bytes of surrogates, in UTF-16, or with a byte changed."""
    try:
        text = json.dumps(content, ensure_ascii=draw.random() < 0.7)
    except RecursionError:
        text = "[" * 100_000
    written = text.encode("utf-8", "surrogatepass")
    kind = draw.random()
    if kind < 0.03:
        return written[: draw.randint(0, len(written))]
    if kind < 0.05:
        return text.encode("utf-16", "surrogatepass")
    if kind < 0.1 and written:
        at = draw.randrange(len(written))
        return written[:at] + bytes([draw.randrange(256)]) + written[at + 1 :]
    return written


def read(status: int, answer: bytes) -> None:
    """Check that the answer is what OpenAI's clients can read: JSON, without NaN, or events of it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    if not answer.startswith(b"data: "):
        content = json.loads(answer, parse_constant=refuse)
        assert ("error" in content) == (status != 200)
        return
    events = answer.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert "error" not in json.loads(event.removeprefix("data: "), parse_constant=refuse), event


@pytest.fixture(scope="module")
def server(tiny_dir):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    return Server(model, {"tiny": tokenizer}, LIMITS, None)


def test_random_requests(server, tiny_dir, capfd):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    asked = {"prompt": "Two large mugs", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    prompt = tokenizer.encode(asked["prompt"])
    expected = alone(model, tokenizer, prompt, max_new_tokens=60, ignore_eos=True).text
    draw = random.Random(20)
    made = []
    for _ in range(CASES):
        chat = draw.random() < 0.6
        made.append((encode(draw, body(draw, chat)), f"/v1/{'chat/' * chat}completions"))
    statuses, wrong = [], []
    with serving(server) as address, ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(post, address, asked, "/v1/completions") for _ in range(4)]
        for number, (written, path) in enumerate(made):
            status, answer = post(address, written, path, raw=True)
            statuses.append(status)
            try:
                assert status == 200 or 400 <= status < 500, status
                read(status, answer)
            except (AssertionError, ValueError) as error:
                wrong.append((path, written[:300], status, answer[-300:], repr(error)))
            if number % 25 == 24:  # someone else's request, running all the while
                found = [request.result() for request in beside]
                assert [(s, a["choices"][0]["text"]) for s, a in found] == [(200, expected)] * len(found)
                beside = [pool.submit(post, address, asked, "/v1/completions")]
        wait_until_idle(server)
    assert not wrong, f"{len(wrong)} of {CASES}, such as {wrong[0]}"
    assert statuses.count(200) > CASES / 5 and statuses.count(400) > CASES / 5
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and max(map(len, errors.splitlines()), default=0) < 1_000, errors[:3_000]
