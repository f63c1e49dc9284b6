"""The chunked loss is the plain one: value, gradients, precision and memory."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litmini.methods.lora import LoRALinear
from litmini.models import llama
from litmini.ops.cross_entropy import IGNORE, linear_cross_entropy

B, T, DIM, VOCAB = 3, 11, 16, 53


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Hidden states, a head and labels, of which about a quarter are no targets."""
    hidden = torch.randn(B, T, DIM, dtype=dtype, requires_grad=True)
    head = nn.Linear(DIM, VOCAB, bias=False, dtype=dtype)
    labels = torch.randint(0, VOCAB, (B, T)).masked_fill(torch.rand(B, T) < 0.25, IGNORE)
    return hidden, head, labels


def adapt(head: nn.Linear) -> LoRALinear:
    adapted = LoRALinear(head, rank=4, alpha=8)
    nn.init.normal_(adapted.lora_B)
    return adapted


def plain_loss(hidden, head, labels) -> torch.Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORE)


def gradients(loss, tensors) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(tensors)))


@pytest.mark.parametrize("chunk", [1, 4, 5, 1024])
@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
def test_loss_and_gradients_are_the_plain_ones(chunk, kind):
    hidden, head, labels = problem()
    if kind == "bias":
        head = nn.Linear(DIM, VOCAB)
    if kind == "lora":
        head = adapt(head.requires_grad_(False))
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert len(trained) == {"plain": 2, "bias": 3, "lora": 3}[kind]
    expected = plain_loss(hidden, head, labels)
    loss, n_targets = linear_cross_entropy(hidden, head, labels, chunk=chunk)
    assert n_targets == (labels != IGNORE).sum() and n_targets.dtype == torch.int64
    assert loss.shape == n_targets.shape == () and loss.dtype == torch.float32
    assert_close(loss, expected)
    for found, exact in zip(gradients(loss, trained), gradients(expected, trained), strict=True):
        assert_close(found, exact)


@pytest.mark.parametrize("kind", ["plain", "lora"])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_softcap(kind, chunk):
    hidden, head, labels = problem()
    if kind == "lora":
        head = adapt(head)
    trained = [hidden, *head.parameters()]
    bent = 0.7 * torch.tanh(head(hidden) / 0.7)
    expected = F.cross_entropy(bent.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    loss, _ = linear_cross_entropy(hidden, head, labels, softcap=0.7, chunk=chunk)
    assert_close(loss, expected)
    for found, exact in zip(gradients(loss, trained), gradients(expected, trained), strict=True):
        assert_close(found, exact)
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, head, labels, softcap=0.7)[0], expected)
    assert (plain_loss(hidden, head, labels) - expected).abs() > 0.1


def test_a_chunk_that_divides_the_targets():
    hidden, head, labels = problem()
    labels = torch.randint(0, VOCAB, (B, T))
    assert_close(linear_cross_entropy(hidden, head, labels, chunk=11)[0], plain_loss(hidden, head, labels))


def test_an_adapted_head_equals_the_merged_one():
    """So the generic way and the one of plain heads agree."""
    hidden, head, labels = problem()
    adapted = adapt(head)
    loss, _ = linear_cross_entropy(hidden, adapted, labels, chunk=5)
    merged, _ = linear_cross_entropy(hidden, adapted.merge(), labels, chunk=5)
    assert_close(loss, merged)
    assert_close(*(gradients(x, [hidden])[0] for x in (loss, merged)))


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    hidden, head, labels = problem()
    (head if frozen == "head" else hidden).requires_grad_(False)
    trained = hidden if frozen == "head" else head.weight
    loss, _ = linear_cross_entropy(hidden, head, labels)
    assert_close(*(gradients(x, [trained])[0] for x in (loss, plain_loss(hidden, head, labels))))
    linear_cross_entropy(hidden, head, labels)[0].backward()
    assert head.weight.grad is None if frozen == "head" else hidden.grad is None


def test_the_gradient_of_a_tied_weight_has_both_uses():
    tokens, (_, head, labels) = torch.randint(0, VOCAB, (B, T)), problem()
    expected = plain_loss(F.embedding(tokens, head.weight).tanh(), head, labels)
    loss, _ = linear_cross_entropy(F.embedding(tokens, head.weight).tanh(), head, labels)
    assert_close(*(gradients(x, [head.weight])[0] for x in (loss, expected)))


@pytest.mark.parametrize("kind", ["plain", "lora", "lora over frozen hidden states"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_targets_at_all(kind, autocast):
    """Requirement 4: an exact zero whose backward reaches every trained parameter, so no rank waits for another."""
    hidden, head, labels = problem()
    if kind != "plain":
        head = adapt(head.requires_grad_(False))
    hidden.requires_grad_(kind != "lora over frozen hidden states")
    trained = [p for p in (hidden, *head.parameters()) if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, n_targets = linear_cross_entropy(hidden, head, torch.full_like(labels, IGNORE))
    assert loss.item() == 0 and loss.dtype == torch.float32 and n_targets.item() == 0
    loss.backward()
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_a_batch_of_no_targets_changes_no_gradient_of_a_model():
    model, tokens = llama.Model(llama.PRESETS["tiny"]), torch.randint(0, 512, (2, 9))
    loss, n_targets = model(tokens, labels=torch.full_like(tokens, IGNORE))
    assert loss.item() == 0 and n_targets.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_under_bf16_autocast(kind):
    """fp32 weights, products in bf16: as near to fp32 as torch's own loss under autocast; gradients in fp32."""
    hidden, head, labels = problem()
    head = adapt(head) if kind == "lora" else head
    trained = [hidden, *head.parameters()]
    exact = plain_loss(hidden, head, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = plain_loss(hidden, head, labels)
        loss, _ = linear_cross_entropy(hidden, head, labels, chunk=5)
    assert loss.dtype == torch.float32 and loss != exact
    assert abs(loss - exact) <= 1e-3 * exact
    expected = gradients(exact, trained)
    for found, other, best in zip(gradients(loss, trained), gradients(torchs, trained), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - best).norm() <= 1.5 * (other - best).norm() + 1e-6 * best.norm()


def test_bf16_gradients_are_scaled_in_fp32():
    """The loss is divided by the number of targets. Rounded to bf16, that factor would bias every gradient alike."""
    hidden, head, labels = problem(torch.bfloat16)
    factor = 1 / 1369  # in bf16 off by 0.25%
    (whole,), (found,) = (gradients(linear_cross_entropy(hidden, head, labels)[0] * f, [hidden]) for f in (1.0, factor))
    assert found.dtype == torch.bfloat16
    expected = whole.float() * factor
    assert abs((found.float() * expected).sum() / expected.square().sum() - 1) < 5e-4


def test_gradients_scale_with_what_is_done_to_the_loss():
    hidden, head, labels = problem()
    loss, _ = linear_cross_entropy(hidden, head, labels)
    expected = gradients(plain_loss(hidden, head, labels) * -0.37, [hidden, head.weight])
    for found, exact in zip(gradients(loss * -0.37, [hidden, head.weight]), expected, strict=True):
        assert_close(found, exact)


def test_a_second_backward_is_refused_and_not_wrong():
    """The head's gradient, which is as large as the head, was scaled where it lies."""
    hidden, head, labels = problem()
    loss, _ = linear_cross_entropy(hidden, head, labels)
    loss.backward(gradient=torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Shapes(TorchDispatchMode):
    """Notes every operation, and the shape of every tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.operations: list[str] = []
        self.in_fp32: list[tuple[int, ...]] = []  # what is allocated, not computed in place

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append(str(function))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.seen += [tuple(x.shape) for x in made]
        if "_." not in str(function) and not function.is_view:
            self.in_fp32 += [tuple(x.shape) for x in made if x.dtype == torch.float32]
        return result


@pytest.mark.parametrize("kind", ["plain", "lora"])
@pytest.mark.parametrize("grad", [True, False])
def test_whole_logits_never_exist(kind, grad):
    hidden, head, labels = problem()
    head = adapt(head.requires_grad_(False)) if kind == "lora" else head
    with Shapes() as shapes, torch.set_grad_enabled(grad):
        loss, n_targets = linear_cross_entropy(hidden, head, labels, chunk=4)
        if grad:
            loss.backward()
    rows = max(shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == VOCAB and shape[0] != DIM)
    assert rows == 4 < n_targets
    assert all(len(shape) < 3 or shape[-1] != VOCAB for shape in shapes.seen)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_no_logits_are_kept_for_the_backward_pass(kind):
    """All chunks together would be as large as whole logits."""
    hidden, head, labels = problem()
    head, kept = adapt(head.requires_grad_(False)) if kind == "lora" else head, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        linear_cross_entropy(hidden, head, labels, chunk=4)
    assert kept and not [shape for shape in kept if shape[-1:] == (VOCAB,) and shape[0] != DIM]


def test_evaluation_computes_no_gradient_of_the_head():
    """It would cost as much again, and the memory of another head in fp32."""
    hidden, head, labels = problem()
    with Shapes() as shapes, torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, head, labels)
    assert not loss.requires_grad
    assert_close(loss, plain_loss(hidden, head, labels).detach())
    assert shapes.operations.count("aten.mm.out") == 1


def test_the_gradient_of_a_head_is_in_memory_once():
    """Under autocast; it is as large as the head in fp32. One chunk, then scaled by the gradient from above."""
    hidden, head, labels = problem()
    with Shapes() as shapes, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, head, labels)[0].mul(0.5).backward()
    assert shapes.in_fp32.count((VOCAB, DIM)) == 1


def test_all_chunks_use_the_same_memory():
    """On a CPU, allocating so much memory again costs more than the softmax."""
    hidden, head, labels = problem(torch.bfloat16)
    head.requires_grad_(False)
    with Shapes() as shapes:
        linear_cross_entropy(hidden, head, labels, chunk=4)[0].backward()
    assert shapes.operations.count("aten.mm.out") > 6 and "aten.mm.default" not in shapes.operations
    assert shapes.operations.count("aten.new_empty.default") == 2
    assert [shape for shape in shapes.in_fp32 if shape[-1:] == (VOCAB,)] == [(4, VOCAB)]


def test_large_losses_and_certain_predictions_are_exact():
    """Where a probability is 0 in fp32, its logarithm is not; where it is almost 1, the loss is small and not 0."""
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[300.0, 0.0], [0.0, 0.0], [288.0, 0.0]])
    hidden = torch.tensor([[[1.0, 0.0]]])
    for label, expected in ((1, 300.0), (0, 6.144e-6)):
        loss, _ = linear_cross_entropy(hidden, head, torch.tensor([[label]]))
        assert loss.item() == pytest.approx(expected, rel=0.02)


def test_inference_mode():
    hidden, head, labels = problem()
    with torch.inference_mode():
        loss, _ = linear_cross_entropy(hidden, head, labels)
    assert_close(loss, plain_loss(hidden, head, labels).detach())
