"""The server, asked by OpenAI's own client, and by clients that behave badly."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
import uvicorn
from torch import nn

import litmini
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import save_adapter
from litmini.config.finetune import LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.generation.generate import finish_all
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.serving.engine import Busy, Engine, Job
from litmini.serving.server import Limits, Server, make_app
from litmini.tokenizer import Tokenizer

LIMITS = Limits(max_batch=4, max_queue=6, max_new_tokens=200, max_context=256, max_body_bytes=20_000, body_seconds=0.5)
MESSAGES = [{"role": "user", "content": "Say 7."}]


@contextmanager
def serving(server: Server):
    """The address of a running server."""
    settings = uvicorn.Config(make_app(server), port=0, log_level="error", limit_concurrency=40)
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield running.servers[0].sockets[0].getsockname()
    finally:
        running.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def adapter(base, tiny_dir, tmp_path_factory):
    """The directory of an adapter that changes much."""
    model = load_model(tiny_dir, torch.float32)
    config = LoraConfig(rank=4, alpha=64)
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory, str(tiny_dir))
    return directory


@pytest.fixture(scope="module")
def models(base, adapter, tiny_dir) -> dict[str, tuple[nn.Module, Tokenizer]]:
    """Each model by itself, as the server must answer for it."""
    return {"tiny": base, "orders": litmini.load(tiny_dir, adapter, dtype="fp32")}


@pytest.fixture(scope="module")
def server(tiny_dir, adapter):
    """A base, and an adapter on the same weights."""
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    bank = MultiLoRA(model)
    bank.add("orders", adapter)
    return Server(model, {"tiny": tokenizer, "orders": tokenizer}, LIMITS, None, bank)


@pytest.fixture(scope="module")
def address(server):
    with serving(server) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(model: nn.Module, tokenizer: Tokenizer, prompt: list[int], **options) -> Request:
    request = Request(prompt, SamplingConfig(**options), tokenizer.stop_ids, tokenizer)
    finish_all(model, [request])
    return request


def wait_until_idle(server: Server) -> None:
    until = time.monotonic() + 10
    while server.engine.waiting or server.engine.running:
        assert time.monotonic() < until, "a slot was not freed"
        time.sleep(0.01)


def post(
    address, body: bytes | dict, path="/v1/chat/completions", raw: bool = False, method: str = "POST", **headers
) -> tuple[int, Any]:
    """A request by hand, and the status and JSON (or bytes) of its response."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content if raw else json.loads(content)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "orders"]


@pytest.mark.parametrize("name", ["tiny", "orders"])
def test_chat_is_what_the_engine_says_alone(client, models, name):
    model, tokenizer = models[name]
    expected = alone(model, tokenizer, tokenizer.encode_prompt(MESSAGES), max_new_tokens=20)
    options = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish
    assert answer.usage.completion_tokens == len(expected.ids) and answer.usage.prompt_tokens == len(expected.prompt)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == expected.finish
    assert chunks[-1].usage.completion_tokens == len(expected.ids)
    assert len(chunks) > 3


def test_many_at_once_are_completed_like_each_alone(client, models):
    prompts = ["a", "bb ccc", "Two large mugs to Oslo, please.", "d e f g h", "7", "x"]
    expected = {}
    for name, (model, tokenizer) in models.items():
        for prompt in prompts:
            expected[name, prompt] = alone(model, tokenizer, tokenizer.encode(prompt), max_new_tokens=25).text

    def ask(job: tuple[str, str]) -> str:
        time.sleep(0.005 * len(job[1]))
        answer = client.completions.create(model=job[0], prompt=job[1], temperature=0, max_tokens=25)
        return answer.choices[0].text

    with ThreadPoolExecutor(6) as pool:
        found = dict(zip(expected, pool.map(ask, expected), strict=True))
    assert found == expected
    assert len(set(expected.values())) > 6


def test_completions_with_several_prompts_stop_and_logprobs(client, models):
    model, tokenizer = models["tiny"]
    expected = alone(model, tokenizer, tokenizer.encode("abc"), max_new_tokens=12, logprobs=2)
    stop = expected.text[5:8]
    ids = tokenizer.encode("abc")
    options = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    answer = client.completions.create(prompt=["abc", "de"], n=2, logprobs=2, **options)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == expected.text != answer.choices[2].text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx([t.logprob for t in expected.logprobs], abs=1e-4)
    assert all(1 <= len(top) <= 2 for top in answer.choices[0].logprobs.top_logprobs)
    answer = client.completions.create(prompt=ids, stop=stop, **options)
    assert answer.choices[0].text == expected.text[: expected.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs_in_a_stream(client):
    options = {
        "model": "tiny",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    parts = [c.choices[0].logprobs.content for c in client.chat.completions.create(**options, stream=True)]
    assert [t for part in parts for t in part] == whole and len(whole) == 9
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in whole)


def test_seeds_repeat(client):
    def ask(seed: int) -> str:
        options = {"temperature": 1.5, "max_tokens": 20, "seed": seed, "extra_body": {"top_k": 50, "min_p": 0.001}}
        return client.chat.completions.create(model="tiny", messages=MESSAGES, **options).choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "available: tiny, orders"),
        ({"messages": []}, openai.BadRequestError, "at least one message"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, r"messages\[0\].content is missing"),
        (
            {"messages": [{"role": "user", "content": "a b " * 300}]},
            openai.BadRequestError,
            "no token remains",
        ),
        ({"max_tokens": 201}, openai.BadRequestError, "at most 200"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_new_tokens is 0"),
        ({"top_p": 0}, openai.BadRequestError, "top_p is 0"),
        ({"temperature": -1}, openai.BadRequestError, "temperature is -1"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature is 'hot'"),
        ({"n": 17}, openai.BadRequestError, "n is 17"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "not implemented: frequency_penalty = 0.5"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "leaves out the tools"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown settings: temprature"),
        ({"stop": [""]}, openai.BadRequestError, "stop is"),
    ],
)
def test_bad_requests_are_refused_by_name(client, change, error, message):
    with pytest.raises(error, match=message):
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **change})


def test_a_template_that_fails_is_a_clean_error(base, tmp_path):
    model, tokenizer = base
    template = tmp_path / "bad.jinja"
    template.write_text("{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}x")
    server = Server(model, {"tiny": Tokenizer(tokenizer.directory, str(template))}, LIMITS, None)
    with serving(server) as address:
        status, answer = post(address, {"messages": [{"role": "user", "content": "no"}]})
        assert status == 400 and "not that" in answer["error"]["message"]
        assert post(address, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


def test_an_api_key_is_asked_for(base):
    model, tokenizer = base
    server = Server(model, {"tiny": tokenizer}, LIMITS, "secret")
    with serving(server) as address:
        asked = {"messages": MESSAGES, "max_tokens": 2}
        for key in ("", "Bearer ", "Bearer secre", "Bearer säcret", "secre"):
            status, answer = post(address, asked, Authorization=key.encode("latin-1"))
            assert status == 401 and "secret" not in json.dumps(answer)
        assert post(address, asked, Authorization="Bearer secret")[0] == 200
        assert post(address, b"{" * 100)[0] == 401


def test_bodies_that_are_too_large_slow_or_no_json(address, server):
    for body in (b"{", b"[" * 15_000, b"\xff\xfe", b"3", b"[]", b'"a"'):
        status, answer = post(address, body)
        assert status == 400 and answer["error"]["message"]
    assert post(address, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert post(address, b'{"a": "' + b"x" * 30_000 + b'"}')[0] == 413

    def raw(head: str, body: bytes = b"") -> bytes:
        with socket.create_connection(address, timeout=10) as connection:
            start = (
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
            )
            connection.sendall(start.encode() + body)
            return connection.recv(300)

    assert b" 413 " in raw("Content-Length: 100000000", b"x" * 1000)
    assert b" 413 " in raw(
        "Transfer-Encoding: chunked", b"".join(b"1000\r\n" + b"x" * 4096 + b"\r\n" for _ in range(6))
    )
    assert b" 408 " in raw("Content-Length: 1000", b"{")
    wait_until_idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(address, server, stream):
    body = json.dumps({"prompt": ["a", "b"], "max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    jobs: list[Job] = []
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head.encode() + body)
        while len(jobs) < 2:
            jobs = list(server.engine.running)
        if stream:
            assert connection.recv(10)
    wait_until_idle(server)
    assert all(job.cancelled and len(job.request.ids) < 200 for job in jobs)


def test_a_flood_is_refused_and_nothing_grows(address, server, client):
    """Requests beyond the queue get 429, connections beyond the limit 503; threads and memory stay."""
    stream = {"model": "tiny", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(16) as pool:
        found = [pool.submit(post, address, {"prompt": "a", "max_tokens": 150, "ignore_eos": True}, "/v1/completions")]
        found += [
            pool.submit(post, address, {"prompt": ["a"] * 6, "max_tokens": 60, "ignore_eos": True}, "/v1/completions")
            for _ in range(15)
        ]
        statuses = [f.result()[0] for f in found]
    assert 200 in statuses and 429 in statuses and set(statuses) <= {200, 429}
    threads = threading.active_count()
    open_ones = []
    for _ in range(60):  # idle connections
        open_ones.append(socket.create_connection(address, timeout=10))
    open_ones[-1].sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 503 " in open_ones[-1].recv(300)
    for connection in open_ones:
        connection.close()
    for number in range(200):
        post(address, [b"{", b'{"prompt": 3}', b'{"prompt": "a", "max_tokens": -1}'][number % 3], "/v1/completions")
    wait_until_idle(server)
    assert threading.active_count() <= threads + 1
    assert client.completions.create(**stream).usage.completion_tokens == 200
    assert server.engine.batch.cache is None


def test_an_error_ends_the_requests_that_it_happens_to_and_the_server_continues(tiny_dir, capsys):
    """As memory that runs out does."""
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")

    def fail(module, args, kwargs):
        if kwargs["cache"].length > 40 or args[0].shape[1] > 40:
            raise RuntimeError("out of memory, say")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    server = Server(model, {"tiny": tokenizer}, LIMITS, None)
    with serving(server) as address:
        asked = {"prompt": "a b c", "max_tokens": 10, "ignore_eos": True}
        for wrong in ({"max_tokens": 60}, {"prompt": "Send 4 of them. " * 12}):  # in a step, and while it is read
            status, answer = post(address, {**asked, **wrong}, "/v1/completions")
            assert status == 500 and "out of memory, say" in answer["error"]["message"]
            assert post(address, asked, "/v1/completions")[0] == 200
    assert "out of memory, say" in capsys.readouterr().err


def test_an_engine_stops_with_work_in_hand(base):
    model, _ = base
    before = threading.active_count()
    engine = Engine(model, None, 2, 10)
    started = threading.Event()
    requests = [Request([1, 2], SamplingConfig(max_new_tokens=200, ignore_eos=True), []) for _ in range(4)]
    engine.submit([Job(request, started.set) for request in requests])
    assert started.wait(10)
    engine.close()
    assert threading.active_count() == before
    assert not requests[3].ids


def test_a_cancelled_job_leaves_the_queue_at_once(base):
    """Not at the next step, which may take long: until then a full queue would refuse those who still wait."""
    model, _ = base
    stepping, go_on = threading.Event(), threading.Event()
    engine = Engine(model, None, 1, 2)
    step, engine.batch.step = engine.batch.step, lambda: (stepping.set(), go_on.wait(10), step())
    jobs = [Job(Request([1, 2], SamplingConfig(max_new_tokens=2), []), lambda: None) for _ in range(4)]
    engine.submit(jobs[:1])
    assert stepping.wait(10)
    engine.submit(jobs[1:3])
    with pytest.raises(Busy):
        engine.submit(jobs[3:])
    engine.cancel(jobs[1])
    engine.submit(jobs[3:])
    go_on.set()
    engine.close()
