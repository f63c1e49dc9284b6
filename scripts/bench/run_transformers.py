"""transformers, with PEFT for adapters, in a plain loop without the overhead of a trainer."""

import time
from typing import Any

from common import Job, device, in_row, main, padded, peak_memory_mib, train, validation_losses


def finetune(job: Job) -> dict[str, Any]:
    import torch

    model = load(job)
    mixed = job["task"] == "full" and job["dtype"] == "bf16"  # fp32 master weights, bf16 compute

    def loss(samples: list[list[int]], targets: int) -> Any:
        with torch.autocast(device().type, torch.bfloat16, enabled=mixed and model.training):
            return model(**batch(samples, job["packed"]), num_items_in_batch=targets, use_cache=False).loss

    found = train(job, model, loss)
    return found if job["method"] == "qlora" else {**found, **validation_losses(job, model, loss)}


def classify(job: Job) -> dict[str, Any]:
    """A classifier with LoRA, over texts padded to the longest of a micro-batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        job["model"],
        num_labels=job["labels"],
        pad_token_id=0,
        dtype=torch.bfloat16 if job["dtype"] == "bf16" else torch.float32,
    ).to(device())
    adapters = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS"
    )
    model = get_peft_model(model, adapters)
    pairs = zip(job["steps"], job["classes"], strict=True)
    classes = {tuple(ids): number for texts, numbers in pairs for ids, number in zip(texts, numbers, strict=True)}

    def loss(samples: list[list[int]], units: int) -> Any:
        tokens, mask, _ = padded(samples)
        labels = torch.tensor([classes[tuple(ids)] for ids in samples], device=device())
        scores = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(scores, labels, reduction="sum") / units

    return train(job, model, loss, count=len)


def load(job: Job) -> Any:
    """Return the model of a job, with its adapters, on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = job["method"] == "full"
    dtype = torch.bfloat16 if job["dtype"] == "bf16" and not whole else torch.float32
    options: dict[str, Any] = {}
    if job["method"] == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, **options).to(device())
    if whole:
        return model
    from peft import LoraConfig, get_peft_model

    # no prepare_model_for_kbit_training: it casts embedding, head and norms to fp32, which makes QLoRA slower
    config = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=job["method"] == "dora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=job["variant"] != "bf16 adapters")


def batch(samples: list[list[int]], packed: bool) -> dict[str, Any]:
    """Return samples padded to the longest; or packed into one sequence, without a mask."""
    names = ("input_ids", "position_ids" if packed else "attention_mask", "labels")
    return dict(zip(names, in_row(samples) if packed else padded(samples), strict=True))


def convert(job: Job) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").save_pretrained(job["out_dir"])
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["out_dir"])
    return {"seconds": time.time() - job["started_at"], "peak_memory_mib": peak_memory_mib()}


if __name__ == "__main__":
    training = dict.fromkeys(("lora", "qlora", "dora", "full", "packed"), finetune)
    main({**training, "classifier": classify, "convert": convert}, ["transformers", "peft", "bitsandbytes"])
