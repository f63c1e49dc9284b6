"""What one request does is that request's own: its errors, and what is kept for it."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_server import LIMITS, alone, post, serving, wait_until_idle

import litmini
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import save_adapter
from litmini.config.finetune import LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.serving.engine import Engine, Job
from litmini.serving.server import Limits, Server

EXTREME = [
    *({"temperature": t} for t in (1e-40, 1e-300, 5e-324, 2**64, 1e300)),
    *({"repetition_penalty": p} for p in (1e-40, 1e-300, 1e40, 1e300)),
    *({"top_p": p} for p in (1e-300, 1e-40)),
    *({"temperature": 1.0, "min_p": 1.0, "top_k": 10**30, "top_p": 1e-300, "repetition_penalty": 1e-300},),
]
RUNNING = {"prompt": "Two large mugs", "max_tokens": 150, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def broken(tiny_dir, tmp_path_factory):
    """The directory of an adapter whose values overflow: its logits are NaN."""
    model = load_model(tiny_dir, torch.float32)
    add_adapters(model, LoraConfig(rank=2, targets=["down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.fill_(1e25)
    directory = tmp_path_factory.mktemp("broken")
    save_adapter(model, directory, str(tiny_dir))
    return directory


@pytest.fixture
def server(tiny_dir, broken):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    multi_lora = MultiLoRA(model)
    multi_lora.add("broken", broken)
    return Server(model, {"tiny": tokenizer, "broken": tokenizer}, LIMITS, None, multi_lora)


def test_extreme_settings_and_a_broken_adapter_beside_others(server, base, capfd):
    expected = alone(*base, base[1].encode(RUNNING["prompt"]), max_new_tokens=150, ignore_eos=True).text
    with serving(server) as address, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post, address, RUNNING, "/v1/completions") for _ in range(2)]
        for change in EXTREME:
            status, _ = post(address, {"prompt": "a b", "max_tokens": 3, **change}, "/v1/completions")
            assert status == 200, change
        for stream in (False, True):
            asked = {"prompt": "a b", "model": "broken", "max_tokens": 9, "stream": stream}
            status, answer = post(address, asked, "/v1/completions", raw=True)
            assert status == (200 if stream else 500) and b"logits are not finite" in answer
        for request in running:
            status, answer = request.result()
            assert status == 200 and answer["choices"][0]["text"] == expected
        wait_until_idle(server)
        assert not server.engine.batch.requests
    errors = [line for line in capfd.readouterr().err.splitlines() if " POST /v1/" not in line]
    assert len(errors) == 2 and all("not finite" in line and len(line) < 300 for line in errors)


@pytest.mark.parametrize("where", ["push", "news", "end"])
def test_an_error_in_the_work_of_one_request(base, where, capfd):
    """Whatever it is: in its next token, in its text, or in telling its client."""
    model, tokenizer = base
    engine, ended = Engine(model, None, 4, 10), threading.Event()

    def fail(*_: object) -> None:
        raise OSError("only mine " + "x" * 10_000)

    sampling = SamplingConfig(max_new_tokens=12, ignore_eos=True)
    requests = [Request([1, 2, i], sampling, tokenizer.stop_ids, tokenizer) for i in range(3)]
    jobs = [Job(requests[i], ended.set if i == 2 else lambda: None) for i in range(3)]
    if where == "news":
        calls: list[int] = []
        jobs[1].news = lambda: fail() if not calls.append(1) and len(calls) == 1 else None
    else:
        setattr(requests[1], where, fail)
    if where == "end":
        jobs[1].cancelled = True
    engine.submit(jobs)
    until = time.monotonic() + 10
    while not all(job.done for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.close()
    assert [job.error is None for job in jobs] == [True, False, True] and "only mine" in str(jobs[1].error)
    for i in (0, 2):
        assert requests[i].ids == alone(model, tokenizer, [1, 2, i], max_new_tokens=12, ignore_eos=True).ids
    assert max(map(len, capfd.readouterr().err.splitlines())) < 1_500


def test_log_probabilities_that_a_client_does_not_take_are_bounded(base, capfd):
    model, tokenizer = base
    engine = Engine(model, None, 4, 10)
    sampling = SamplingConfig(max_new_tokens=60, ignore_eos=True, logprobs=20)
    slow, fast = (Job(Request([1, 2], sampling, [], tokenizer), lambda: None, max_kept=10) for _ in range(2))
    taken = []
    fast.news = lambda: taken.extend(fast.request.take_logprobs())
    engine.submit([slow, fast])
    until = time.monotonic() + 10
    while not (slow.done and fast.done):
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.close()
    assert len(slow.request.logprobs) == 11 and "does not receive" in str(slow.error)
    assert capfd.readouterr().err == ""
    assert len(taken) == 60 and fast.error is None and not fast.request.logprobs


def test_a_response_that_is_sent_as_a_whole_is_bounded_before_it_is_made(base):
    model, tokenizer = base
    limits = Limits(4, 16, 200, 256, 20_000, max_output_bytes=100_000)
    with serving(Server(model, {"tiny": tokenizer}, limits, None)) as address:
        asked = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "n": 2, "logprobs": 4}
        status, answer = post(address, asked, "/v1/completions")
        assert (
            status == 400 and "200 tokens with 1000 log-probabilities are more than 500" in answer["error"]["message"]
        )
        for change in ({"n": 1}, {"logprobs": 1}, {"max_tokens": 50}, {"stream": True}, {"logprobs": None}):
            assert post(address, {**asked, **change}, "/v1/completions", raw=True)[0] == 200


def test_token_ids_beyond_the_model_do_not_reach_the_batch(base, tmp_path):
    """As the last token of a prompt, which is read together with the others' next tokens."""
    model, tokenizer = base
    tokenizer.fast.add_tokens(["<|extra|>"])
    try:
        with serving(Server(model, {"tiny": tokenizer}, LIMITS, None)) as address:
            for prompt in ("a <|extra|>", [1, 512], [512, 1]):
                status, answer = post(address, {"prompt": prompt, "max_tokens": 2}, "/v1/completions")
                assert status == 400 and "512, but the model has rows for 0 to 511" in answer["error"]["message"]
    finally:
        tokenizer.fast = type(tokenizer)(tokenizer.directory).fast


def test_a_forward_that_fails_for_one_request_fails_for_it_alone(tiny_dir, base, capfd):
    """As a request that is too long for the memory, or an adapter that fails."""
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")

    def fail(module, args, kwargs):
        if (args[1] > 60).any():
            raise RuntimeError("out of memory, say")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    sampling = {"max_new_tokens": 50, "ignore_eos": True, "temperature": 1.0, "seed": 1, "logprobs": 2}
    prompts = [[1, 2, 3], [4, 5] * 15, [7], [5] * 28]  # the second and fourth come to position 61
    engine = Engine(model, None, 4, 10)
    jobs = [Job(Request(prompt, SamplingConfig(**sampling), [], tokenizer), lambda: None) for prompt in prompts]
    engine.submit(jobs)
    until = time.monotonic() + 20
    while not all(job.done for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.close()
    assert [job.error is None for job in jobs] == [True, False, True, False]
    for job, prompt in zip(jobs, prompts, strict=True):
        expected = alone(base[0], tokenizer, prompt, **sampling)
        assert job.request.ids == expected.ids[: len(job.request.ids)] and len(job.request.ids) >= 30
    assert "out of memory, say" in capfd.readouterr().err


def test_tokens_without_text_do_not_wait_for_text(base):
    """Log-probabilities of special tokens and of parts of characters are sent as they come."""
    model, tokenizer = base
    limits = Limits(4, 16, 200, 256, 20_000, max_output_bytes=200 * 3 * 50)  # of fifty tokens
    with serving(Server(model, {"tiny": tokenizer}, limits, None)) as address:
        server_tokens = []
        tokenizer_decode, tokenizer.decode = tokenizer.decode, lambda ids, skip_special=True: ""
        try:
            asked = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "logprobs": 2, "stream": True}
            status, answer = post(address, asked, "/v1/completions", raw=True)
        finally:
            tokenizer.decode = tokenizer_decode
        for event in answer.decode().strip().split("\n\n")[:-1]:
            server_tokens += json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"]["tokens"]
    assert status == 200 and len(server_tokens) == 100
