"""Models of a preset's shape with random weights, drawn on the device, and packed sequences, for the benchmark of GPUs."""

from typing import Any

import torch
from torch import Tensor, nn

from litmini.config.finetune import LoraConfig
from litmini.models import FAMILIES, family

Job = dict[str, Any]
DOCUMENTS = 4  # of a packed sequence
LORA = LoraConfig(rank=8, alpha=16)


def preset(name: str) -> tuple[Any, Any]:
    """Return the family module and `Config` of a preset."""
    modules = map(family, ["llama", *sorted(FAMILIES)])
    return next((module, module.PRESETS[name]) for module in modules if name in module.PRESETS)


def packed(vocab: int, length: int, rows: int, seed: int) -> dict[str, Tensor]:
    """Return sequences (rows, length) of documents of unequal length, all tokens targets but the last of a document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    starts = torch.zeros(rows, length, dtype=torch.bool)
    for row in starts:
        row[torch.randperm(length - 1, generator=generator)[: DOCUMENTS - 1] + 1] = True
        row[0] = True
    at = torch.arange(length).expand(rows, -1)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    labels = tokens.roll(-1, 1).masked_fill(starts.roll(-1, 1), -100)
    return {"tokens": tokens, "positions": positions, "documents": starts.cumsum(1), "labels": labels}


def random_model(job: Job, device: torch.device) -> nn.Module:
    """Return litmini's model of a shape, its weights drawn on the device."""
    module, config = preset(job["shape"])
    torch.set_default_dtype(torch.float32 if job["task"] == "full" else torch.bfloat16)
    try:
        with device:
            model = module.Model(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model  # type: ignore[no-any-return]


def transformers_model(job: Job, device: torch.device) -> Any:
    """Return transformers' model of the same shape, with PEFT's adapters, its weights drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    module, config = preset(job["shape"])
    hf = module.config_to_hf(config)
    settings = AutoConfig.for_model(**{key: value for key, value in hf.items() if key != "architectures"})
    dtype = torch.float32 if job["task"] == "full" else torch.bfloat16
    with device:
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=job["attention"])
    if "liger" in job["variant"]:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if job["task"] == "qlora":
        _quantize(model, device)
    if job["task"] in ("lora", "qlora"):
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        peft = PeftConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, peft)
    return model


def _quantize(model: Any, device: torch.device) -> None:
    """Put bitsandbytes' 4-bit linears into the blocks, as transformers does for a checkpoint that it loads."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            new = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4"
            )
            new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            new.bias = linear.bias
            model.set_submodule(name, new.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layer
