"""A request's completion depends on nothing but the request: alone, or beside others that are longer, shorter, come and go."""

import dataclasses
from typing import Any

import pytest
import torch
from numerics import ulps
from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.models import FAMILIES, family, llama, phi3

LONG = phi3.LongRope((1.0,) * 8, tuple(1.0 + i for i in range(8)), 64)
"""Requests of up to 64 tokens have other rotary factors than longer ones."""
VARIANTS: dict[str, Any] = {
    "phi3-longrope": dataclasses.replace(phi3.PRESETS["tiny"], long_rope=LONG),
    "phi3-longrope-window": dataclasses.replace(phi3.PRESETS["tiny"], long_rope=LONG, window=9),
    "llama3": dataclasses.replace(llama.PRESETS["tiny"], rope_scaling=llama.RopeScaling("llama3", 8.0, 1, 4, 16)),
    "mistral-window": dataclasses.replace(llama.PRESETS["tiny"], window=6, model_type="mistral"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.3, "seed": 1},
    "top_k": {"temperature": 1.3, "seed": 2, "top_k": 5},
    "top_p": {"temperature": 1.3, "seed": 3, "top_p": 0.7},
    "min_p": {"temperature": 1.3, "seed": 4, "min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "everything": {"temperature": 2.0, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.7},
    "logprobs": {"logprobs": 3},
    "ignore_eos": {"ignore_eos": True},
    "limit": {"max_new_tokens": 7},
    "long": {"max_new_tokens": 60},
}


def lively(config: Any) -> nn.Module:
    """Weights that make greedy completions vary, and attention far from even."""
    module = next(m for m in map(family, FAMILIES) if isinstance(config, m.Config))
    model = module.Model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 and "bias" not in name else 0.0, std=0.3)
    return model


def requests() -> dict[str, Request]:
    """One for each setting; prompts of 2 to 92 tokens, and a stop token that some of them meet."""
    generator, made = torch.Generator().manual_seed(1), {}
    for number, (name, options) in enumerate(SETTINGS.items()):
        prompt = torch.randint(0, 500, (2 + 9 * number,), generator=generator).tolist()
        made[name] = Request(prompt, SamplingConfig(**{"max_new_tokens": 20, **options}), list(range(0, 500, 12)))
    return made


def finish(batch: Batch) -> None:
    step(batch, 1_000)


def step(batch: Batch, times: int) -> None:
    for _ in range(times):
        if batch.requests:
            batch.step()


def same(found: Request, alone: Request) -> bool:
    if (found.ids, found.finish) != (alone.ids, alone.finish):
        return False
    ours, theirs = ([t.logprob for t in request.logprobs] for request in (found, alone))
    return ours == pytest.approx(theirs, abs=ulps(scale=torch.tensor(100.0)))


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def model(request) -> nn.Module:
    return lively(VARIANTS.get(request.param) or family(request.param).PRESETS["tiny"])


def test_a_request_beside_others_is_completed_as_alone(model):
    alone = requests()
    for request in alone.values():
        batch = Batch(model)
        batch.add([request])
        finish(batch)
    assert len({tuple(r.ids[:3]) for r in alone.values()}) >= 8
    assert "length" in {r.finish for r in alone.values()}

    together = requests()
    batch = Batch(model)
    batch.add(list(together.values()))
    finish(batch)
    different = [name for name in SETTINGS if not same(together[name], alone[name])]

    coming = requests()
    order = sorted(coming, key=lambda name: len(coming[name].prompt) % 5)
    batch = Batch(model)
    for number, name in enumerate(order):  # one every second step, while others leave
        batch.add([coming[name]])
        step(batch, 2)
        if number == 4:  # one gives up
            gone = Request(list(range(120)), SamplingConfig(max_new_tokens=100), [])
            batch.add([gone])
            step(batch, 1)
            gone.end("stop")
            batch.drop()
    finish(batch)
    different += [name for name in SETTINGS if not same(coming[name], alone[name])]
    assert not different


def test_a_row_of_nan_is_an_error_of_its_request_alone(model):
    """Its neighbours are answered as without it, even where tokens of all rows meet, as in experts."""
    alone, beside = requests(), requests()
    batch = Batch(model)
    batch.add(list(alone.values()))
    finish(batch)
    poison = next(token for token in range(512) if all(token not in request.tokens for request in alone.values()))
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    embedding.register_forward_hook(lambda _, args, y: y.masked_fill((args[0] == poison)[..., None], torch.nan))
    broken = [Request([1, poison, 2], SamplingConfig(max_new_tokens=9, **o), []) for o in ({}, SETTINGS["everything"])]
    batch = Batch(model)
    batch.add([broken[0], *list(beside.values())[:5]])
    step(batch, 1)
    batch.add([broken[1], *list(beside.values())[5:]])
    finish(batch)
    assert all(isinstance(r.error, UserError) and "not finite" in str(r.error) for r in broken)
    assert [name for name in SETTINGS if not same(beside[name], alone[name])] == []
    with pytest.raises(UserError, match="not finite"):
        finish_all(model, [Request([poison, 2], SamplingConfig(), [])])
