"""torch.compile for blocks: the same losses and gradients, compiled once for all blocks and batches, and in training only."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from litmini import attention
from litmini.adapters import add_adapters
from litmini.finetune_config import LoraConfig
from litmini.launch import checkpoint_activations, compile_blocks
from litmini.models import gemma2, llama


def packed(seed: int) -> dict[str, torch.Tensor]:
    """Two rows of documents of other lengths with each seed."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (2, 48), generator=g)
    starts = torch.rand(2, 48, generator=g) < 0.1
    starts[:, 0] = True
    documents = starts.cumsum(1)
    at = torch.arange(48).expand(2, -1)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": tokens.roll(-1, 1)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(
        attention, "_document_by_document", attention._document_by_document
    )  # compile_blocks replaces it
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("family", "recompute", "backend"), [(llama, True, "aot_eager"), (gemma2, False, "eager")])
def test_equals_what_is_not_compiled_and_compiles_once(family, recompute, backend):
    torch.manual_seed(0)
    plain = family.Model(family.PRESETS["tiny"])
    plain.init_weights()
    add_adapters(plain, LoraConfig(rank=4))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend)
    if recompute:
        checkpoint_activations(compiled)
    graphs = []
    for seed in range(4):
        found = []
        for model in (plain, compiled):
            loss, _ = model.train()(**packed(seed))
            loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
            model.zero_grad()
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1] <= 8, graphs  # some parts around the loop over documents, shared by all blocks
    compiled.eval()(packed(9)["tokens"][:, :7])
    assert counters["stats"]["unique_graphs"] == graphs[-1]


def test_without_documents_on_a_cpu_a_block_is_one_graph():
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    compile_blocks(model, "aot_eager")
    for length in (20, 33, 47):
        tokens = torch.randint(0, 512, (2, length))
        model.train()(tokens, labels=tokens)[0].backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2, counters
