"""What holds on any device, counted: bytes kept for backward, host synchronisations, collectives, compilations."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.compiler.config
import transformers
from lightning_fabric import Fabric
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import make_setup
from two import run_two, values

from litmini.config.finetune import LoraConfig
from litmini.distributed.fsdp import blocks, shard
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.nf4 import quantize_linears
from litmini.models import FAMILIES, family
from litmini.ops.attention import Documents
from litmini.ops.cross_entropy import IGNORE, linear_cross_entropy
from litmini.training.compile import DYNAMIC
from litmini.training.loop import fit
from litmini.training.objective import LanguageModeling

RANK = 4
METHODS = ["lora", "qlora", "dora", "full"]


def build(name: str, method: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A family's tiny model, in training, with random weights where it has any."""
    module = family(name)
    with torch.device(device):
        model = module.Model(module.PRESETS["tiny"])
    model.init_weights(
        torch.Generator(device if device == "cpu" else "cpu").manual_seed(0)
    ) if device == "cpu" else None
    model.to(dtype if method != "full" else torch.float32)
    if method == "qlora":
        quantize_linears(model)
    if method != "full":
        add_adapters(model, LoraConfig(rank=RANK), DoRALinear if method == "dora" else None)
    return model.train()


def packed(model: Any, documents: int, length: int = 32, device: str = "cpu") -> dict[str, torch.Tensor]:
    """One row of documents of one length, every token a target."""
    tokens = torch.arange(documents * length) % model.config.vocab_size
    batch = {
        "tokens": tokens,
        "positions": torch.arange(length).repeat(documents),
        "documents": torch.arange(documents).repeat_interleave(length) + 1,
        "labels": tokens.roll(-1),
    }
    return {name: tensor[None].to(device) for name, tensor in batch.items()}


# Bytes kept for backward


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass, the model's own tensors not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # the graph holds it, so no other storage comes to be at this address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(kept.values())


def ours(name: str, method: str, documents: int) -> int:
    model = build(name, method)
    batch = packed(model, documents)
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "full"):
        return saved_bytes(model, lambda: model(**batch)[0])


def theirs(name: str, method: str, documents: int) -> int:
    """The same with transformers and PEFT, as many rows of one document."""
    module = family(name)
    config = module.config_to_hf(module.PRESETS["tiny"])
    full = method == "full"
    model: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32 if full else torch.bfloat16
    ).train()
    if not full:
        targets = ["in_proj"] if name == "mamba2" else "all-linear"  # where PEFT refuses out_proj
        options = {"r": RANK, "target_modules": targets, "use_dora": method == "dora", "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
    tokens = torch.arange(documents * 32).view(documents, 32) % config["vocab_size"]
    with torch.autocast("cpu", torch.bfloat16, enabled=full):
        return saved_bytes(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_less_is_kept_for_backward_than_by_peft(name):
    assert ours(name, "lora", 4) < 0.7 * theirs(name, "lora", 4)


@pytest.mark.parametrize("method", METHODS)
def test_less_is_kept_for_backward_in_each_method(method):
    """4-bit weights change nothing in what is kept of activations, so QLoRA is compared with PEFT's LoRA, too."""
    assert ours("llama", method, 4) < theirs("llama", method.replace("qlora", "lora"), 4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_gated_activations_are_not_kept_beside_their_factors(name):
    """An adapter over `down_proj` needs them for its gradient, and computes them again."""
    model = build(name, "lora")
    wide, batch = set(), packed(model, 4)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.shape[-1] == model.config.ffn_dim and tensor.numel() >= 128:
            wide.add((tensor.untyped_storage().data_ptr(), tensor.shape[-2]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(**batch)
    assert loss.requires_grad
    tokens = batch["tokens"].numel()
    assert len({address for address, rows in wide if rows == tokens}) == 2 * model.config.n_layers


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_activation_memory_is_linear_in_tokens(name):
    few, many, most = (ours(name, "lora", documents) for documents in (4, 8, 16))
    assert most - many == pytest.approx(2 * (many - few), rel=0.02)
    assert many == pytest.approx(2 * few, rel=0.1)  # and nearly nothing is there once only


# Host synchronisation

WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "unique2")


class Waits(TorchDispatchMode):
    """Notes each operation whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "_index_put_impl_") else []
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in chosen):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def on_meta(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch without labels on the meta device, its documents with their bounds, as on a GPU."""
    inputs = {name: batch[name].to("meta") for name in ("tokens", "positions")}
    return {**inputs, "documents": Documents.of(batch["documents"]).map(lambda tensor: tensor.to("meta"))}


@pytest.mark.parametrize(("name", "method"), [*((name, "lora") for name in sorted(FAMILIES)), ("llama", "dora")])
def test_blocks_wait_for_nothing(name, method):
    """On the meta device the code takes a GPU's way, and a look at a value would be an error, if it were not noted."""
    model = build(name, method, "meta")
    batch = on_meta(packed(model, 4))
    with Waits() as waits:
        model(**batch).sum().backward()
    assert not waits.found


@pytest.mark.parametrize("first", [0, IGNORE])
def test_the_loss_waits_once_for_the_choice_of_rows(first):
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), nn.Linear(8, 40, bias=False)
    labels = torch.tensor([first, *range(1, 18)]).view(2, 9)
    with Waits() as waits:
        linear_cross_entropy(hidden, head, labels)[0].backward()
    assert waits.found == {"nonzero": 1}


class Reads(TorchFunctionMode):
    """Counts values that Python reads out of tensors."""

    NAMES = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


class Small(nn.Module):
    """A model as the loop sees it, which reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.weight * tokens).sum(), (labels >= 0).sum()


def reads(micro_batches: int, steps: int = 2) -> int:
    """Values read in `steps` optimizer steps; each writes a line of the log."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Small()
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "lr_ratio": 1.0}], fused=True)
    batch = {"tokens": torch.ones(1, 3), "labels": torch.ones(1, 3, dtype=torch.int64)}
    with Reads() as counted:
        wrapped, optimizer = fabric.setup_module(model), fabric.setup_optimizers(optimizer)
        fit(make_setup(fabric, wrapped, optimizer, [[batch] * micro_batches] * steps, 0.1), LanguageModeling())
    return counted.count


def test_accumulation_reads_nothing_back():
    """Of a micro-batch, the loop counts targets on the host, before they go to a device; all else is read in one go
    after the step's last backward pass: whether it is to be taken is decided on the host."""
    one, many = reads(1), reads(9)
    assert many - one == 2 * 8 and one == 2 * (1 + 1)


# Collectives


def collectives(methods: list[str]) -> dict[str, dict[str, int]]:
    """What the processes of a sharded model say to each other in one forward and backward pass."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)), {}
    for method in methods:
        model = shard(build("llama", method), mesh)
        for _ in range(2):  # the first pass sets up what later ones have
            with CommDebugMode() as debug:
                model(**packed(model, 4))[0].backward()
        found[method] = {str(op).split(".")[-1]: count for op, count in debug.get_comm_counts().items()}
    dist.destroy_process_group()
    return found


@pytest.mark.xdist_group("two")
def test_sharded_blocks_are_gathered_twice_and_their_gradients_once():
    """Each block, and what is outside of them, before its forward and its backward; only what is trained is reduced."""
    groups = len(blocks(build("llama", "full"))) + 1
    for found in values(run_two(collectives, ["full", "lora", "qlora"])):
        assert found["full"] == {"_allgather_base_": 2 * groups, "_reduce_scatter_base_": groups}
        assert found["lora"] == found["qlora"]
        assert found["lora"] == {"_allgather_base_": 2 * groups, "_reduce_scatter_base_": groups - 1}


# Compilation


@pytest.mark.parametrize(("name", "method", "kinds"), [("llama", "lora", 2), ("gpt2", "full", 1)])
def test_blocks_compile_once_and_without_a_break(name, method, kinds, monkeypatch):
    """On the meta device, so as on a GPU: all blocks share one graph, whatever documents come; over frozen embeddings the
    first block has one of its own, as its input needs no gradient."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.compiler.config, "dynamic_sources", DYNAMIC)
    torch._dynamo.reset()
    model = build(name, method, "meta")
    for block in blocks(model):
        block.compile(backend=count, fullgraph=True)  # a break is an error
    for documents in (4, 8):
        model(**on_meta(packed(model, documents, 128 // documents))).sum().backward()
    torch._dynamo.reset()
    assert len(graphs) == kinds
