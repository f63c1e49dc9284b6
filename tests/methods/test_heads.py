"""Heads for other objectives: per-token log-probabilities and scores, on every family and on a model file by path."""

import importlib
from pathlib import Path

import pytest
import torch
import transformers
from numerics import assert_close, assert_gradients_close, difference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters
from litmini.methods.heads import LogProbHead, head_name, use_log_probs, use_scores
from litmini.models import FAMILIES, llama, use_model_file
from litmini.ops.cross_entropy import IGNORE, original_head
from litmini.training.optimizer import block_matrices

OWN_FILE = Path(__file__).parents[2] / "scripts/examples/llama_gelu.py"
MODULES = [*sorted(set(FAMILIES.values())), str(OWN_FILE)]


def tiny(name: str, **changes) -> nn.Module:
    known = dict(FAMILIES)
    try:
        module = use_model_file(name) if name.endswith(".py") else importlib.import_module(name)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)
    model = module.Model(module.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0  # so that logits are far from even
    return model


def batch(packed: bool) -> dict[str, torch.Tensor]:
    """Two rows of 24 tokens; packed: of documents of 11 and 9 tokens, and padding."""
    tokens = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = labels[0, :5] = IGNORE
    if not packed:
        return {"tokens": tokens, "labels": labels}
    sizes = (11, 9, 4)
    documents = torch.repeat_interleave(torch.tensor([1, 2, 0]), torch.tensor(sizes)).expand(2, -1).contiguous()
    positions = torch.cat([torch.arange(n) for n in sizes]).expand(2, -1).contiguous()
    labels[:, [10, 19]] = labels[:, 20:] = IGNORE
    return {"tokens": tokens, "labels": labels, "documents": documents, "positions": positions}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", MODULES, ids=lambda n: n.rpartition(".")[2] if "/" not in n else "own file")
def test_log_probabilities_and_gradients_are_those_of_the_logits(name, packed):
    model, given = tiny(name).train(), batch(packed)
    labels, weights = given["labels"], torch.randn(2, 24)  # any upstream gradient
    inputs = {key: value for key, value in given.items() if key != "labels"}
    logits = model(**inputs)
    targets = labels != IGNORE
    expected = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * targets
    (expected * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use_log_probs(model, chunk=7)
    found, count = model(**given)
    assert found.shape == labels.shape and found.dtype == torch.float32 and count == targets.sum()
    assert not found[~targets].any()
    assert_close(found, expected)
    (found * weights).sum().backward()
    with original_head(model):
        assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
        assert torch.equal(model(**inputs), logits)
    assert torch.equal(model(**inputs), logits)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_whole_logits_never_exist():
    model, tokens = tiny("litmini.models.llama").requires_grad_(False), torch.randint(3, 512, (4, 250))
    add_adapters(model, LoraConfig(rank=2))
    use_log_probs(model, chunk=4)
    with Largest() as largest:
        model(tokens, labels=tokens)[0].sum().backward()
    assert 4 * model.config.vocab_size <= largest.size < tokens.numel() * model.config.vocab_size / 2


@pytest.mark.parametrize("kind", ["lora", "tied", "in full"])
def test_log_probabilities_of_other_heads(kind):
    model, given = tiny("litmini.models.llama"), batch(True)
    if kind == "tied":
        model.lm_head.weight = model.model["embed_tokens"].weight
    if kind == "lora":
        add_adapters(model, LoraConfig(rank=2, targets=["lm_head"]))
        nn.init.normal_(model.lm_head.lora_B)
    if kind == "in full":
        add_adapters(model, LoraConfig(rank=2, modules_to_save=["lm_head"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    inputs = {key: value for key, value in given.items() if key != "labels"}
    logits = model(**inputs)
    use_log_probs(model)
    found, _ = model(**given)
    targets = given["labels"] != IGNORE
    assert_close(found[targets], logits.log_softmax(-1)[targets].gather(1, given["labels"][targets][:, None])[:, 0])
    found.sum().backward()
    with original_head(model):
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_no_label_at_all_is_zero_with_a_graph():
    model, given = tiny("litmini.models.llama"), batch(False)
    given["labels"] = torch.full_like(given["labels"], IGNORE)
    use_log_probs(model)
    found, count = model(**given)
    found.sum().backward()
    assert count == 0 and not found.any() and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("family", MODULES, ids=lambda n: n.rpartition(".")[2] if "/" not in n else "own file")
def test_scores_are_a_linear_of_the_labelled_hidden_states(family, packed):
    model, given = tiny(family).train(), batch(packed)
    given["labels"] = torch.full_like(given["labels"], IGNORE)
    given["labels"][0, 10] = given["labels"][1, 4] = given["labels"][1, 18] = 0
    name = head_name(model)
    score = use_scores(model, 3, torch.Generator().manual_seed(0))
    head, seen = getattr(model, name), []
    outputs = head.outputs
    head.outputs = lambda hidden, *rest: seen.append(hidden) or outputs(hidden, *rest)
    found, count = model(**given)
    assert found.shape == (3, 3) and found.dtype == torch.float32 and count == 3
    found.square().sum().backward()
    assert score.weight.grad is not None and score.weight.grad.any()
    assert_close(found, nn.functional.linear(seen[0][given["labels"] != IGNORE], score.weight))


HF = {
    "litmini.models.llama": transformers.LlamaForSequenceClassification,
    "litmini.models.qwen3": transformers.Qwen3ForSequenceClassification,
    "litmini.models.gemma2": transformers.Gemma2ForSequenceClassification,
    "litmini.models.gpt_neox": transformers.GPTNeoXForSequenceClassification,
    "litmini.models.mixtral": transformers.MixtralForSequenceClassification,
}


@pytest.mark.parametrize("name", HF)
def test_scores_are_those_of_transformers(name, tmp_path):
    """Requirement 40: under the name and in the layout of a sequence classifier."""
    from litmini.checkpoints.config import disk_tensors

    model, module = tiny(name), importlib.import_module(name)
    use_scores(model, 4)
    raw = {**module.config_to_hf(model.config), "num_labels": 4, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**raw)
    tensors = dict(disk_tensors(module, model.config, [(n, p.detach()) for n, p in model.named_parameters()]))
    assert "score.weight" in tensors and not any(n.startswith(("lm_head", "embed_out")) for n in tensors)
    config.architectures = [HF[name].__name__]
    config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, report = HF[name].from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(3, 512, (3, 20))
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -1] = 0
    with torch.no_grad():
        assert_close(model(tokens, labels=labels)[0], theirs.eval()(tokens).logits)


@pytest.mark.parametrize("before", [True, False])
def test_a_score_is_trained_beside_adapters(before):
    """Requirement 40: added after the adapters, or before them and named in modules_to_save."""
    model, given = tiny("litmini.models.llama").bfloat16(), batch(False)
    if before:
        use_scores(model, 2)
        add_adapters(model, LoraConfig(rank=2, targets=["q_proj"], modules_to_save=["score"]))
    else:
        add_adapters(model, LoraConfig(rank=2, targets=["q_proj"]))
        use_scores(model, 2)
    model(**given)[0].square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score" in n for n in trained)
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    with original_head(model):
        assert head_name(model) == "lm_head"


def test_scores_are_in_fp32_under_autocast():
    model, given = tiny("litmini.models.llama"), batch(False)
    use_scores(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model(**given)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_log_probabilities_without_gradients_and_under_autocast():
    model, given = tiny("litmini.models.llama"), batch(True)
    use_log_probs(model, chunk=5)
    expected, _ = model(**given)
    with torch.no_grad():
        assert torch.equal(model(**given)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model(**given)
    assert found.dtype == torch.float32 and 0 < difference(found, expected) < 0.05


@pytest.mark.parametrize("method", ["full", "lora"])
def test_saved_with_another_head_in_place(method, tiny_dir, tmp_path):
    """Under the names that modules have without it."""
    from litmini.checkpoints.hf import load_model, save_trained
    from litmini.checkpoints.peft import load_adapter, save_adapter

    model, tokens = load_model(tiny_dir, torch.float32), batch(False)["tokens"]
    if method == "lora":
        add_adapters(model, LoraConfig(rank=2, targets=["q_proj", "lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected, own = model(tokens), model.lm_head
    use_log_probs(model)
    matrices = block_matrices(model)
    assert matrices and not matrices & set(own.parameters()), "the head is no matrix of a block"
    if method == "full":
        save_trained(model, tmp_path, tiny_dir)
        again = load_model(tmp_path, torch.float32)
    else:
        save_adapter(model, tmp_path, str(tiny_dir))
        again = load_model(tiny_dir, torch.float32)
        load_adapter(again, tmp_path)
    assert torch.equal(again(tokens), expected)


def test_a_model_without_a_head_is_refused():
    model = llama.Model(llama.PRESETS["tiny"])
    model.lm_head = nn.Identity()
    with pytest.raises(UserError, match="expected one output head on the model itself, found 0: none"):
        head_name(model)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_frozen_head_gives_the_same_as_one_that_is_trained(softcap):
    """By a function of its own that computes logits once."""
    model, given = tiny("litmini.models.llama"), batch(True)
    hidden, weights = torch.randn(2, 24, model.config.dim, requires_grad=True), torch.randn(2, 24)
    found = []
    for frozen in (False, True):
        head = LogProbHead(model.lm_head.requires_grad_(not frozen), chunk=7)
        log_probs, _ = head.outputs(hidden, given["labels"], softcap)
        (log_probs * weights).sum().backward()
        found.append((log_probs.detach(), hidden.grad.clone()))
        hidden.grad = None
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1].flatten(0, 1), found[0][1].flatten(0, 1))
    with torch.no_grad():
        assert torch.equal(head.outputs(hidden, given["labels"], softcap)[0], found[1][0])


def test_scores_of_a_checkpoint_that_gives_as_many_are_kept():
    model = llama.Model(llama.PRESETS["tiny"])
    first = use_scores(model, 2)
    assert use_scores(model, 2) is first
    assert use_scores(model, 3) is not first and model.score.out_features == 3


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["litmini.models.llama", "litmini.models.gemma2"])
def test_a_temperature_divides_the_logits_after_their_softcap(name, frozen):
    model, given, T = tiny(name).train(), batch(False), 0.7
    head = model.get_submodule(head_name(model))
    head.weight.requires_grad_(not frozen)
    if frozen:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer the embedding's
    labels, weights = given["labels"], torch.randn(2, 24)
    logits = model(tokens=given["tokens"]).float() / T
    expected = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE)
    (expected * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use_log_probs(model, chunk=7, temperature=T)
    found, _ = model(**given)
    assert_close(found, expected)
    (found * weights).sum().backward()
    with original_head(model):
        assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
