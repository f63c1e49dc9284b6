"""litgpt: its model, chunked loss and precision, in the loop of its finetuning scripts."""

import time
from pathlib import Path
from typing import Any

from common import Job, device, main, padded, peak_memory_mib, train, validation_losses


def finetune(job: Job) -> dict[str, Any]:
    import lightning
    from litgpt.utils import chunked_cross_entropy

    mixed = job["task"] == "full" and job["dtype"] == "bf16"
    precision = "bf16-mixed" if mixed else "bf16-true" if job["dtype"] == "bf16" else "32-true"
    fabric = lightning.Fabric(devices=1, precision=precision)  # type: ignore[arg-type]
    model: Any = fabric.setup_module(load(job, fabric))

    def loss(samples: list[list[int]], targets: int) -> Any:
        tokens, _, labels = padded(samples)
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        logits = [part.float() for part in logits]
        wanted = labels[..., 1:]
        return chunked_cross_entropy(logits, wanted) * ((wanted != -100).sum() / targets)

    found = train(job, model, loss, fabric.backward)
    model = model.module  # without Fabric's autocast
    return {**found, **validation_losses(job, model, loss)}


def load(job: Job, fabric: Any) -> Any:
    import torch

    checkpoint = Path(job["litgpt_dir"])
    lora = job["method"] != "full"
    if lora:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    else:
        from litgpt import GPT, Config
    names = ("query", "key", "value", "projection", "mlp")
    settings = {"lora_r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.0}
    settings |= {f"lora_{name}": True for name in names}
    config = Config.from_file(checkpoint / "model_config.yaml", **(settings if lora else {}))
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    if lora:
        mark_only_lora_as_trainable(model)
    tensors = torch.load(checkpoint / "lit_model.pth", mmap=True, weights_only=True)
    model.load_state_dict(tensors, strict=not lora)
    return model.to(device())


def convert(job: Job) -> dict[str, Any]:
    """Convert a directory of links to the checkpoint: litgpt writes beside the checkpoint that it reads."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    source, target = Path(job["model"]).resolve(), Path(job["out_dir"])
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    convert_hf_checkpoint(target, model_name=source.name)
    return {"seconds": time.time() - job["started_at"], "peak_memory_mib": peak_memory_mib()}


if __name__ == "__main__":
    main({**dict.fromkeys(("lora", "full"), finetune), "convert": convert}, ["litgpt", "lightning"])
