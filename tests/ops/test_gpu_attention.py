"""The attention of GPUs, on a CPU: the varlen operator by its contract, FlexAttention uncompiled, and tensors that pretend."""

import functools
from dataclasses import replace

import pytest
import torch
import varlen_kernel
from numerics import ULPS, assert_as_accurate, assert_close, assert_gradients_close
from packed_batch import packed_batch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from litmini.errors import UserError
from litmini.models import FAMILIES, family, gemma2
from litmini.ops import chunks, flex_attention, varlen
from litmini.ops.attention import Documents, record_kernels
from litmini.ops.kv_cache import KVCache

MODULES = {name.rsplit(".", 1)[-1]: model_type for model_type, name in reversed(FAMILIES.items())}  # one type each
FLEX = ("gemma2", "gpt_oss", "mpt")
T = 50
ROWS = [[17, 1, 22, 10], [50], [1, 1, 1, 32, 15], [42, 8]]
PADDING = [0, 0, 5, 8]  # tokens at the end that are padding


def batch() -> dict[str, torch.Tensor]:
    return packed_batch(ROWS, PADDING)


def tiny(name: str, dtype: torch.dtype) -> torch.nn.Module:
    module = family(MODULES[name])
    config = module.PRESETS["tiny"]
    if getattr(config, "window", None) is not None or name in ("llama", "mixtral", "phi3"):
        config = replace(config, window=7)
    if name in ("gemma2", "gemma3"):
        config = replace(config, query_scalar=5)  # so scores are not scaled by the size of heads
    model = module.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # scores that differ
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 3.0)
    return model.to(dtype)


def with_kernel(data: dict, kernel: str | None) -> dict:
    return {**data, "documents": Documents.of(data["documents"], kernel)}


def loss_and_gradients(model: torch.nn.Module, data: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, _ = model.train()(**data)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_trains_as_on_a_cpu(model: torch.nn.Module, data: dict, kernel: str) -> None:
    """Loss and gradients by the kernel that a GPU takes, which is `kernel`, are those of a CPU."""
    with record_kernels() as kernels:
        loss, gradients = loss_and_gradients(model, with_kernel(data, None))
    assert kernels == {kernel}
    expected, expected_gradients = loss_and_gradients(model, data)
    assert_close(loss, expected)
    assert_gradients_close(gradients, expected_gradients)


def attention_layers(model) -> int:
    return model.config.n_layers - sum(hasattr(module, "state_size") for module in model.modules())


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FLEX])
def test_varlen_equals_the_cpu_path(name, monkeypatch):
    """Windows, GQA, documents of one token and padding; in fp32, which the operator of the tests computes, too."""
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    model, data = tiny(name, torch.float32), batch()
    real = data["documents"] > 0
    varlen_kernel.calls.clear()
    with torch.no_grad(), record_kernels() as kernels:
        ours = model.eval()(**with_kernel({**data, "labels": None}, None))
    layers = attention_layers(model)
    assert kernels == ({"varlen"} if layers else set()) and len(varlen_kernel.calls) == layers
    assert {call["documents"] for call in varlen_kernel.calls} <= {13}
    with torch.no_grad():
        theirs = model(**{**data, "labels": None})
    assert_close(ours[real], theirs[real])
    loss, gradients = loss_and_gradients(model, with_kernel(data, "varlen"))
    expected, expected_gradients = loss_and_gradients(model, data)
    assert_close(loss, expected)
    amplified = 4 if layers < model.config.n_layers else 1  # rounding, by recurrent layers
    assert_gradients_close(gradients, expected_gradients, amplified * ULPS)


@pytest.mark.parametrize("head_dim", [8, 18])
def test_heads_of_any_size_go_through_varlen(head_dim, monkeypatch):
    """FlashAttention takes multiples of 8; packed, and over a static cache."""
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    module = family(MODULES["llama"])
    model, data = module.Model(replace(module.PRESETS["tiny"], head_dim=head_dim, window=7)), batch()
    model.init_weights(torch.Generator().manual_seed(0))
    assert_trains_as_on_a_cpu(model, data, "varlen")
    with torch.no_grad(), record_kernels() as kernels:
        cache = KVCache(model.config, 4, T, torch.float32, static=True)
        assert_close(model(data["tokens"], cache=cache), model(data["tokens"]))
    assert "varlen" in kernels


def test_varlen_of_an_older_torch_gets_as_many_key_heads(monkeypatch):
    """torch 2.10's `varlen_attn` has no `enable_gqa`; without windows, it is not used."""
    plain, heads = torch.nn.attention.varlen.varlen_attn, []

    def older(q, k, v, *bounds, scale=None, window_size=(-1, -1)):
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return plain(q, k, v, *bounds, scale=scale, window_size=window_size)

    def oldest(q, k, v, *bounds, is_causal=False):
        raise AssertionError("it has no windows")

    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    model, data = tiny("llama", torch.float32), {**batch(), "labels": None}
    real = data["documents"] > 0
    for function, kernel in ((older, "varlen"), (oldest, "sdpa")):
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
        varlen.parameters.cache_clear()
        varlen.has_flash.cache_clear()
        with torch.no_grad(), record_kernels() as kernels:
            assert_close(model(**with_kernel(data, None))[real], model(**data)[real])
        assert kernels == {kernel, "documents"}
    varlen.parameters.cache_clear()
    varlen.has_flash.cache_clear()
    assert heads == [(4, 4, 4)] * model.config.n_layers


def test_heads_that_flex_does_not_compile_take_another_kernel():
    config = replace(gemma2.PRESETS["tiny"], head_dim=8)
    model, data = gemma2.Model(config).eval(), {**batch(), "labels": None}
    model.init_weights(torch.Generator().manual_seed(0))
    real = data["documents"] > 0
    with torch.no_grad(), record_kernels() as kernels:
        assert_close(model(**with_kernel(data, None))[real], model(**data)[real])
    assert kernels == {"explicit", "documents"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "falcon"])
def test_varlen_in_16_bits_is_as_accurate_as_the_cpu_path(name):
    data = {**batch(), "labels": None}
    real = data["documents"] > 0
    model, exact = tiny(name, torch.bfloat16).eval(), tiny(name, torch.float64).eval()
    with torch.no_grad():
        ours = model(**with_kernel(data, "varlen"))
        assert_as_accurate(ours[real].float(), model(**data)[real].float(), exact(**data)[real])


@pytest.mark.parametrize("name", [*FLEX, "llama"])
def test_flex_equals_the_cpu_path(name):
    """Uncompiled, FlexAttention has no backward pass on a CPU."""
    model, data = tiny(name, torch.float32).eval(), {**batch(), "labels": None}
    real = data["documents"] > 0
    with torch.no_grad(), record_kernels() as kernels:
        ours = model(**with_kernel(data, "flex" if name == "llama" else None))
        assert kernels == {"flex"}
        assert_close(ours[real], model(**data)[real])


def test_flex_stays_compiled_for_sequences_of_any_size(monkeypatch):
    """Uncompiled, it would have all scores in memory."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        flex_attention, "flex_attention", flex_attention.compiled.__wrapped__(flex_attention.flex_attention)
    )
    said: list[str] = []  # of what runs uncompiled
    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "_warn_once", lambda warning_id, **_: said.append(warning_id)
    )
    model = tiny("gemma2", torch.float32).eval()
    for rows, length in ((4, 40), (4, 56), (2, 64), (3, 130), (1, 80), (4, 200), (1, 300), (2, 90)):
        data = with_kernel(packed_batch([[length]] * rows, [0] * rows), "flex")
        with torch.no_grad():
            model(**{**data, "labels": None})
    assert counters["stats"]["unique_graphs"] > 8 and not said


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_dense_mask_equals_the_cpu_path(name):
    """fp32 on a GPU, and attention dropout."""
    assert_trains_as_on_a_cpu(tiny(name, torch.float32), batch(), "sdpa")


class Operators(TorchDispatchMode):
    """Records each operator and the largest tensor that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.calls.append((str(func.overloadpacket), value))
        return result


SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.masked_select", "aten.unique")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FLEX])
def test_a_training_step_makes_no_mask_and_waits_for_nothing(name, monkeypatch):
    """Of what runs for a batch with its bounds known, nothing reads a value on the host, and nothing has T x T values."""
    monkeypatch.setattr(chunks, "CHUNK", 16)  # of fewer tokens than the batch has
    model, data = tiny(name, torch.bfloat16), with_kernel(batch(), "varlen")
    with Operators() as seen:
        model(**{**data, "labels": None}).sum().backward()
    names = [name for name, _ in seen.calls]
    assert names.count("torch_attn._varlen_attn") == 3 * attention_layers(model)  # three results each
    assert not set(names) & set(SYNCS), set(names) & set(SYNCS)
    masks = [value.shape for _, value in seen.calls if value.shape[-2:] == (T, T)]
    assert not masks


def test_grouped_heads_never_meet_a_dense_mask(monkeypatch):
    """With both, `scaled_dot_product_attention` takes the math kernel on a GPU, quadratic in memory."""
    used = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **how: used.append(how["attn_mask"] is not None and how["enable_gqa"]) or plain(*args, **how),
    )
    tiny("llama", torch.float32)(**with_kernel(batch(), None))
    assert used == [False, False]


def test_attention_dropout_needs_a_dense_mask():
    """Neither FlashAttention's varlen nor FlexAttention has it; in evaluation there is none."""
    model = family("gpt2").Model(replace(family("gpt2").PRESETS["tiny"], attn_dropout=0.1)).to(torch.bfloat16)
    data = with_kernel({**batch(), "labels": None}, None)
    for training, kernel in ((True, "sdpa"), (False, "varlen")):
        model.train(training)
        with torch.no_grad(), record_kernels() as kernels:
            model(**data)
        assert kernels == {kernel}


@pytest.mark.parametrize(
    ("kernel", "name", "dtype", "found"),
    [
        ("varlen", "llama", torch.float32, "float32"),
        ("varlen", "gemma2", torch.bfloat16, "softcap 50"),
        ("varlen", "mpt", torch.bfloat16, "ALiBi"),
        ("varlen", "gpt_oss", torch.bfloat16, "sinks"),
        ("sdpa", "gemma2", torch.bfloat16, "softcap 50"),
    ],
)
def test_a_kernel_that_cannot_is_refused(kernel, name, dtype, found):
    with pytest.raises(UserError, match=f"--attention {kernel} cannot .*{found}.*use --attention auto"):
        tiny(name, dtype)(**with_kernel({**batch(), "labels": None}, kernel))


def test_newer_flash_attention_is_used_where_it_is_installed(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    capability, activated = {"device": (9, 0)}, []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["device"])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert varlen.activate_newer(torch.device("cuda", 0)) == "FA3" == activated.pop()
    for number, capability["device"] in ((1, (8, 0)), (2, (10, 0))):  # of an older GPU, and 4 is not installed
        assert varlen.activate_newer(torch.device("cuda", number)) is None and not activated

    def refuse(name):
        raise RuntimeError("does not expose FA3 kernels")

    capability["device"] = (9, 0)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", refuse)
    with pytest.warns(UserWarning, match="FA3 is installed, but cannot be used: does not expose"):
        assert varlen.activate_newer(torch.device("cuda", 3)) is None
