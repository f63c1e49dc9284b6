"""--compile: the same answers, from one compilation of each block."""

import shutil

import pytest
import torch
from test_generation import PROMPTS, generate_batch, random_model
from test_scripts import run

from litmini.cache import KVCache
from litmini.compiled import compile_decoding
from litmini.models import llama

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def decode(model: llama.Model, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of each token after the first `start`, which are read at once."""
    cache = KVCache(model.config, 1, tokens.shape[1] + start, next(model.parameters()).dtype)
    with torch.inference_mode():  # as generation does
        parts = [model(tokens[:, :start], cache=cache)[:, -1:]]
        parts += [model(part, cache=cache) for part in tokens[:, start:].split(1, 1)]
    return torch.cat(parts, 1).float()


def test_compiled_logits_are_no_less_exact():
    """In bf16, beyond the window too, and for other prompts without another compilation."""
    torch.compiler.reset()
    exact, model = random_model("window"), random_model("window").to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same numbers, computed with in fp32
    cases = [(torch.randint(0, 64, (1, length)), start) for length, start in ((20, 4), (31, 9))]
    truth = [decode(exact, *case) for case in cases]
    plain = [decode(model, *case) for case in cases]
    compile_decoding(model)
    compiled = [decode(model, *cases[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.append(decode(model, *cases[1]))
        (answer,) = generate_batch(model, [PROMPTS[0]], 12, [])
    assert len(answer) == 12
    for true, eager, found in zip(truth, plain, compiled, strict=True):
        assert not torch.equal(found, eager)  # it was compiled
        assert 0 < (found - true).square().mean() < 1.2 * (eager - true).square().mean()


def test_compile_refuses(tiny_dir, monkeypatch):
    base = ["generate.py", "--checkpoint_dir", tiny_dir, "--prompt=Hi", "--compile"]
    assert "not for --bits 4" in run(*base, "--bits=4", status=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not there" in run(*base, status=1)
    assert "not with --adapters" in run("serve.py", *base[1:3], "--compile", "--adapters={a: b}", status=2)
