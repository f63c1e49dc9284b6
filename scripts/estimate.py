"""Estimate the memory and throughput of a training run without loading weights.

    python scripts/estimate.py HuggingFaceTB/SmolLM2-135M --method lora --max_seq_len 2048
    python scripts/estimate.py meta-llama/Llama-3.1-8B --method full --devices 8 --num_nodes 64 --strategy hsdp

--check trains two steps at each given length, each in its own process, and compares the estimate with the measured peak.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from litmini.cli import command
from litmini.config.finetune import Ia3Config, LoraConfig
from litmini.config.training import OptimConfig
from litmini.errors import UserError, check, counted

POSITIVE = ("max_seq_len", "micro_batch_size", "micro_batches", "devices", "num_nodes", "node_gb", "network_gb", "mfu")


@dataclass
class EstimateConfig:
    """Settings of estimate.py."""

    model: str
    """Checkpoint directory; the hub id of a preset of a family; or MY_FILE.py:PRESET."""
    model_file: str | None = None
    """With a checkpoint directory: the model file of a family that is not in litmini/models/."""
    method: Literal["lora", "qlora", "dora", "ia3", "full"] = "lora"
    """Finetuning method."""
    max_seq_len: int = 2048
    """Tokens of a sequence."""
    micro_batch_size: int = 4
    """Sequences in one forward pass on one device."""
    micro_batches: int = 1
    """Micro-batches of one device in an optimizer step; if there are several, gradients exist while the next one runs."""
    checkpoint_activations: bool = False
    """Keep only each block's input."""
    precision: Literal["auto", "32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "auto"
    """auto: bf16-mixed for full, else bf16-true, as the scripts do."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ia3: Ia3Config = field(default_factory=Ia3Config)
    devices: int = 1
    """Number of devices on each node."""
    num_nodes: int = 1
    """Number of nodes (machines)."""
    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """How several devices train one model."""
    node_gb: float = 450.0
    """GB per second that a device sends to others of its node."""
    network_gb: float = 50.0
    """GB per second that a device sends to other nodes."""
    mfu: float = 0.4
    """MFU of training, as a fraction of a GPU's published peak, for tokens per day."""
    check: list[int] = field(default_factory=list)
    """Sequence lengths at which to train two steps on this machine and compare; MODEL must be a checkpoint directory."""

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) > 0 for name in POSITIVE}
        check("", self, check=all(length > 0 for length in self.check), **numbers)
        if self.precision == "auto":
            self.precision = "bf16-mixed" if self.method == "full" else "bf16-true"


def main(config: EstimateConfig) -> None:
    from litmini.training import gpus
    from litmini.training.memory import describe

    if config.check:
        return compare(config)
    model = build(config)
    mixed = config.precision == "bf16-mixed"
    memory = estimate_at(config, model, config.max_seq_len, gpu_memory=gpus.SMALLEST)
    memory = gpus.memory_per_device(memory, model, config.devices, config.strategy, config.num_nodes, mixed)
    memory = gpus.on_gpu(memory)
    devices = config.devices * config.num_nodes
    parameters = {id(p): p for p in model.parameters()}.values()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"{config.model}, {config.method}, {config.precision}: {trained:,} parameters are trained")
    batch = f"{counted(config.micro_batch_size, 'sequence')} of {config.max_seq_len:,} tokens in a micro-batch"
    print(
        f"peak memory of each of {counted(devices, 'GPU')}, {batch} (estimated, not run on a GPU):\n{describe(memory)}"
    )
    print("fits on:", *gpus.fits_on(memory), sep="\n")
    print(f"tokens per day at {config.mfu:.0%} MFU of the published bf16 peak:")
    for name, tokens in gpus.tokens_per_day(model, config.max_seq_len, config.mfu, devices).items():
        print(f"  {devices} x {name:10}{tokens:18,.0f}")
    if devices > 1:
        sent = gpus.communication_volume(model, config.strategy, config.devices, config.num_nodes, mixed)
        flops, tokens = gpus.token_flops(model, config.max_seq_len), config.micro_batch_size * config.max_seq_len
        speeds = (config.node_gb * 1e9, config.network_gb * 1e9)
        print(f"communication and compute ({config.strategy}, {config.micro_batches} micro-batches a step):")
        print(gpus.compare(sent, flops, tokens, config.micro_batches, config.mfu, speeds))


def build(config: EstimateConfig) -> Any:
    """Return the model with its method, on the meta device."""
    from litmini.checkpoints.config import empty_model
    from litmini.distributed.fabric import weight_dtype
    from litmini.methods.adapters import add_adapters
    from litmini.methods.dora import DoRALinear
    from litmini.methods.ia3 import add_ia3
    from litmini.methods.nf4 import quantize_linears
    from litmini.models import preset, use_model_file
    from litmini.training.low_memory import checkpoint_activations

    use_model_file(config.model_file)
    model = preset_of_file(config.model) or preset(config.model) or empty_model(existing(config.model))[1]
    model.to(weight_dtype(config.precision))
    if config.method == "qlora":
        quantize_linears(model)
    if config.method == "ia3":
        add_ia3(model, config.ia3)
    elif config.method != "full":
        add_adapters(model, config.lora, DoRALinear if config.method == "dora" else None)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    return model


def preset_of_file(name: str) -> Any:
    """Return the model of MY_FILE.py:PRESET, on the meta device; None if `name` is not of that form."""
    from litmini.models import meta_model, use_model_file

    file, _, chosen = name.rpartition(":")
    if not file.endswith(".py"):
        return None
    module: Any = use_model_file(file)
    if chosen not in module.PRESETS:
        raise UserError(f"{file} has no preset '{chosen}'; there are: {', '.join(module.PRESETS)}.")
    return meta_model(module, module.PRESETS[chosen])


def existing(directory: str) -> Any:
    from pathlib import Path

    from litmini.models import preset_names

    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory} is neither a checkpoint directory nor a preset; those are: {preset_names()}")
    return Path(directory)


def estimate_at(config: EstimateConfig, model: Any, length: int, process: int = 0, gpu_memory: int = 0) -> Any:
    from litmini.training.memory import estimate, full_rows

    batch = full_rows(config.micro_batch_size, length, model.config.vocab_size)
    return estimate(
        model, batch, config.optim, config.precision, config.micro_batches > 1, process, gpu_memory=gpu_memory
    )


def compare(config: EstimateConfig) -> None:
    """Print a table of predicted and measured peaks."""
    import json
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    if config.method == "qlora":
        import bitsandbytes  # noqa: F401
    process = process_bytes()  # before the estimate, which imports modules that a run does not
    model = build(config)
    print(
        f"| {config.method}, tokens in a micro-batch | predicted MiB | measured MiB | difference |\n|---|---|---|---|"
    )
    for length in config.check:
        predicted = estimate_at(config, model, length, process).total / 2**20
        with tempfile.TemporaryDirectory() as place:
            data, out = Path(place, "data.jsonl"), Path(place, "run")
            data.write_text((json.dumps({"text": "one two " * length}) + "\n") * 2 * config.micro_batch_size)
            command = [sys.executable, f"scripts/finetune_{config.method}.py", "--checkpoint_dir", config.model]
            command += ["--out_dir", str(out), "--data.path", str(data), "--data.max_seq_len", str(length)]
            command += ["--data.chat_template=none", "--eval.samples=0", "--train.max_steps=2"]
            rows = config.micro_batch_size
            command += [
                f"--train.micro_batch_size={rows}",
                f"--train.global_batch_size={rows * config.micro_batches}",
            ]
            command += [f"--precision={config.precision}", f"--optim.name={config.optim.name}"]
            command += [f"--train.checkpoint_activations={str(config.checkpoint_activations).lower()}"]
            command += [] if config.method in ("full", "ia3") else [f"--lora.rank={config.lora.rank}"]
            command += ["--model_file", config.model_file] if config.model_file else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
            measured = json.loads((out / "manifest.json").read_text())["results"]["peak_memory_mib"]
        print(
            f"| {rows} x {length:,} | {predicted:,.0f} | {measured:,.0f} | {predicted / measured - 1:+.1%} |",
            flush=True,
        )


def process_bytes() -> int:
    """Return the bytes of a process after a training step, without its model, as measured in this process."""
    import torch

    from litmini.distributed.fabric import fabric_class
    from litmini.models import llama
    from litmini.system import resident_bytes
    from litmini.training.memory import full_rows

    fabric_class()(accelerator="cpu", devices=1)
    tiny = llama.Model(llama.PRESETS["tiny"])
    tiny.init_weights(torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        loss, _ = tiny.to(dtype)(**full_rows(1, 32, 512))
        loss.backward()
    return resident_bytes()


if __name__ == "__main__":
    command(main, EstimateConfig, __doc__, positional=["model"])
