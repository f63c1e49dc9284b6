"""Speculative decoding with drafts that are longer than what a cache of windows takes in one forward, and over states."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.generation.speculative import Draft, DraftModel, PromptLookup
from litmini.models import gemma2, gemma3, granite_hybrid, lfm2, llama, mamba2, olmo2, phi3, qwen3_5

CONFIGS = {
    "mistral": replace(llama.PRESETS["tiny"], window=6, model_type="mistral", max_positions=2048),
    "phi3": replace(phi3.PRESETS["tiny"], window=6, max_positions=2048),
    "gemma2": replace(gemma2.PRESETS["tiny"], max_positions=2048),
    "gemma3": replace(gemma3.PRESETS["tiny"], max_positions=2048),
    "olmo2": replace(olmo2.PRESETS["tiny"], max_positions=2048),
    "qwen3_5": replace(qwen3_5.PRESETS["tiny"], max_positions=2048),
    "granite_hybrid": replace(granite_hybrid.PRESETS["tiny"], max_positions=2048),
    "lfm2": replace(lfm2.PRESETS["tiny"], max_positions=2048),
    "mamba2": replace(mamba2.PRESETS["tiny"], max_positions=2048),
}
MODULES = {"mistral": llama, "phi3": phi3, "gemma2": gemma2, "gemma3": gemma3, "olmo2": olmo2, "qwen3_5": qwen3_5}
MODULES |= {"granite_hybrid": granite_hybrid, "lfm2": lfm2, "mamba2": mamba2}


class Truth:
    """Proposes the right tokens at every other time, and then wrong ones."""

    def __init__(self, tokens: list[int], count: int) -> None:
        self.tokens, self.count, self.calls, self.longest = tokens, count, 0, 0

    def begin(self, capacity: int) -> None:
        pass

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        self.calls += 1
        found = self.tokens[len(tokens) :][: min(self.count, limit)]
        self.longest = max(self.longest, len(found))
        return found if self.calls % 2 else [(t + 1) % 512 for t in found]


def drafted(model: nn.Module, prompt: list[int], count: int, draft: Draft, chunk: int) -> list[int]:
    request = Request(prompt, SamplingConfig(max_new_tokens=count), [])
    batch = Batch(model, draft, chunk)
    batch.add([request])
    while batch.requests:
        batch.step()
    assert request.error is None
    return request.ids


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [512, 16])
@torch.no_grad()
def test_a_draft_as_long_as_one_likes(name, chunk):
    model = MODULES[name].Model(CONFIGS[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    prompt, count = [5, 9, 33, 1, 60] * 4, 700 if chunk == 512 else 60
    plain = Request(prompt, SamplingConfig(max_new_tokens=count), [])
    finish_all(model, [plain])
    truth = Truth(prompt + plain.ids, 100_000)
    assert drafted(model, prompt, count, truth, chunk) == plain.ids
    assert truth.longest == chunk - 1
    assert drafted(model, prompt, count, PromptLookup(100_000), chunk) == plain.ids
    if chunk == 16:
        assert drafted(model, prompt, count, DraftModel(model, 100_000), chunk) == plain.ids
