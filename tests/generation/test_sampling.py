"""Every setting that is accepted samples, however extreme: never an error, never a token that cannot be."""

import json
import random

import pytest
import torch
from fuzz_amount import seeds

import litmini
from litmini.checkpoints.hf import load_model, save_model
from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.generate import generate
from litmini.generation.prompts import Prompt, complete_lines
from litmini.generation.sampling import Sampler
from litmini.models import llama


def choose(logits: torch.Tensor, sampling: SamplingConfig, tokens: list[int], generator: torch.Generator | None) -> int:
    """Return the token that one sequence gets from logits (vocab,)."""
    return int(Sampler([sampling], [tokens], [generator]).choose(logits[None]))


CASES = len(seeds(300))
TINY = [5e-324, 1e-300, 1e-46, 1e-40, 1e-38, 1e-20, 1e-7]


def test_any_setting_chooses_a_token():
    """Logits of any size, with exact ties and with -inf, which some models give tokens that they never say."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(CASES):
        options = {
            "temperature": draw.choice([*TINY, 0, 0.0, 1, 2**64, 1e38, 1e300, draw.uniform(0, 3)]),
            "top_p": draw.choice([None, *TINY, 1.0, draw.uniform(0.01, 1)]),
            "min_p": draw.choice([None, *TINY, 0, 1, draw.uniform(0, 1)]),
            "top_k": draw.choice([None, 1, 5, 10**30]),
            "repetition_penalty": draw.choice([1, 1.0, *TINY, 1.3, 2**63, 2**64, 1e20, 1e40, 1e308]),
        }
        logits = torch.randn(40, generator=generator) * draw.choice([1e-30, 1.0, 30.0, 1e10]) + draw.choice(
            [0.0, 100, -100]
        )
        logits[:20] = draw.choice([-torch.inf, 0.0, logits[3]])
        token = choose(logits, SamplingConfig(**options), [1, 25, 26], generator)
        assert 0 <= token < 40 and logits[token] > -torch.inf, options


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0])
def test_a_temperature_near_zero_is_greedy(temperature, shift):
    for seed in range(20):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) + shift
        assert choose(logits, SamplingConfig(temperature=temperature), [], None) == logits.argmax()


def test_a_top_p_near_zero_is_greedy_and_penalties_near_zero_repeat():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    for p in TINY:
        assert choose(logits, SamplingConfig(temperature=1.0, top_p=p), [], None) == 1
        assert choose(logits, SamplingConfig(repetition_penalty=p), [2, 3], None) == 2
    assert choose(logits, SamplingConfig(repetition_penalty=1e300), [1, 2, 0], None) in (0, 1, 2)
    assert choose(torch.zeros(3), SamplingConfig(repetition_penalty=1e300), [0], None) == 0


@pytest.fixture
def damaged(tiny_dir, tmp_path):
    """A checkpoint with a NaN in one value of one layer, and an infinite one in another."""
    model = load_model(tiny_dir, torch.float32)
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    state["model.norm.weight"][0] = torch.inf
    save_model(tmp_path, llama.config_to_hf(model.config), state.items(), side_files=tiny_dir)
    return tmp_path


def test_weights_of_nan_are_said_by_generation(damaged):
    for dtype in ("fp32", "bf16"):
        model, tokenizer = litmini.load(damaged, dtype=dtype)
        for temperature in (0.0, 1.0):
            with pytest.raises(UserError, match=r"logits are not finite.*check_finite"):
                generate(model, tokenizer, "Hello", temperature=temperature)
    (line,) = complete_lines(model, tokenizer, [Prompt(1, {}, "Hello")], SamplingConfig(), 4)
    assert "not finite" in line["error"] and "answer" not in line


def test_weights_of_nan_are_said_by_load_on_request(damaged, tiny_dir):
    for bits in (4, 16):
        with pytest.raises(
            UserError, match=r"NaN or infinite values in 2 tensors of .*: model.layers.1.mlp.up_proj.*, model.norm"
        ):
            litmini.load(damaged, bits=bits, check_finite=True)
        litmini.load(tiny_dir, bits=bits, check_finite=True)


def test_seeds_of_lines_do_not_overflow(tiny_dir):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    sampling = SamplingConfig(max_new_tokens=2, temperature=1.0, seed=2**63 - 1)
    (line,) = complete_lines(model, tokenizer, [Prompt(3, {}, "Hello")], sampling, 4)
    assert json.dumps(line) and line["n_tokens"] <= 2
