"""How the server samples where a request does not say, and the line that it logs for each request."""

import json
import re

import pytest
from test_server import post, serving, wait_until_idle

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.defaults import describe_sampling, sampling_defaults
from litmini.serving.server import Limits, Server

LIMITS = Limits(max_batch=4, max_queue=6, max_new_tokens=50, max_context=256, max_body_bytes=20_000)
LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 127\.0\.0\.1 POST "


def written(directory, **values):
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("values", "expected", "text"),
    [
        ({"eos_token_id": 2}, SamplingConfig(), "greedy"),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingConfig(), "greedy"),
        ({"do_sample": True}, SamplingConfig(temperature=1.0), "temperature 1"),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": None,
                "repetition_penalty": 1.05,
            },
            SamplingConfig(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05),
            "temperature 0.6, top_k 20, top_p 0.9, repetition_penalty 1.05",
        ),
        ({"do_sample": True, "top_k": 0}, SamplingConfig(temperature=1.0), "temperature 1"),
        ({"repetition_penalty": 1.1}, SamplingConfig(repetition_penalty=1.1), "greedy, repetition_penalty 1.1"),
    ],
)
def test_the_defaults_are_those_of_generation_config(tmp_path, values, expected, text):
    assert sampling_defaults(tmp_path / "none", written(tmp_path / "a", **values)) == expected
    assert describe_sampling(expected) == text


@pytest.mark.parametrize("values", [{"do_sample": True, "temperature": -1}, {"do_sample": True, "top_p": "high"}])
def test_a_wrong_value_names_the_file(tmp_path, values):
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        sampling_defaults(written(tmp_path / "a", **values))


def test_a_request_that_says_nothing_takes_them_and_one_that_does_not(base):
    model, tokenizer = base
    defaults = {"tiny": SamplingConfig(temperature=0.7, top_p=0.5, repetition_penalty=1.2)}
    server = Server(model, {"tiny": tokenizer}, LIMITS, None, defaults=defaults)
    try:
        for given, expected in (
            ({}, (0.7, 0.5, 1.2)),
            ({"temperature": 0, "top_p": 1, "model": "tiny"}, (0, None, 1.2)),
        ):
            settings, _, _ = server.prepare(json.dumps({"prompt": "a", **given}).encode(), chat=False)
            found = settings.sampling
            assert (found.temperature, found.top_p, found.repetition_penalty) == expected
    finally:
        server.close()


def test_each_request_is_one_line(base, capfd):
    model, tokenizer = base
    server = Server(model, {"tiny": tokenizer}, LIMITS, None)
    asked = {"prompt": "Two mugs", "max_tokens": 4, "ignore_eos": True}
    n_prompt = len(tokenizer.encode("Two mugs"))
    with serving(server) as address:
        assert post(address, asked, "/v1/completions")[0] == 200
        assert post(address, asked | {"stream": True}, "/v1/completions", raw=True)[0] == 200
        assert post(address, asked | {"model": "no\nsuch"}, "/v1/completions")[0] == 404
        wait_until_idle(server)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    for line in lines[:2]:
        assert re.fullmatch(rf"{LINE}/v1/completions 200 tiny, {n_prompt} \+ 4 tokens, \d+\.\d s", line), line
    assert re.match(rf"{LINE}/v1/completions 404 invalid_request_error$", lines[2])


def test_a_stream_that_is_left_frees_its_slot_and_is_logged(base, capfd):
    import http.client

    model, tokenizer = base
    server = Server(model, {"tiny": tokenizer}, LIMITS, None)
    body = json.dumps({"prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": True})
    with serving(server) as address:
        connection = http.client.HTTPConnection(*address, timeout=10)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read(20)
        connection.close()
        wait_until_idle(server)
    assert capfd.readouterr().err.count("/v1/completions 200 tiny, ") == 1
