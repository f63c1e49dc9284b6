"""TRL's SFTTrainer and DPOTrainer with its own loop, over prepared micro-batches with the same samples in each step."""

import math
from typing import Any

from common import Clock, Job, main, validation_losses
from run_transformers import batch


def finetune(job: Job) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    bf16 = job["dtype"] == "bf16"
    clock = Clock(job)
    # The trainer accumulates the same number of micro-batches in every step, so samples are distributed evenly
    samples = sum(map(len, job["steps"])) / len(job["steps"])
    parts = 1 if job["packed"] else math.ceil(samples / job["micro_batch_size"])
    batches = [batch(step[part::parts], job["packed"]) for step in job["steps"] for part in range(parts)]

    class Trainer(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    settings = SFTConfig(
        output_dir=job["out_dir"],
        max_steps=len(job["steps"]),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=parts,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    adapters = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear")
    dtype = torch.bfloat16 if bf16 and job["method"] != "full" else torch.float32
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype),
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": step[0]} for step in job["steps"]]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=None if job["method"] == "full" else adapters,
        callbacks=[timer(clock)],
    )
    trainer.train()
    found = clock.result()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).float()

    def loss(samples: list[list[int]], targets: int) -> Any:
        return model(**batch(samples, False), num_items_in_batch=targets, use_cache=False).loss

    return {**found, **validation_losses(job, model, loss)}


def prefer(job: Job) -> dict[str, Any]:
    """DPO with LoRA: the reference is the model without its adapters."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    clock, collate = Clock(job), DataCollatorForPreference(0)
    steps = []
    for samples, prompts in zip(job["steps"], job["prompts"], strict=True):
        cut = [(ids[:size], ids[size:]) for ids, size in zip(samples, prompts, strict=True)]
        pairs = zip(cut[::2], cut[1::2], strict=True)
        steps.append([{"prompt_ids": c[0], "chosen_ids": c[1], "rejected_ids": r[1]} for c, r in pairs])
    at_once = max(1, job["micro_batch_size"] // 2)  # pairs: as many sequences as of other tasks
    parts = math.ceil(sum(map(len, steps)) / len(steps) / at_once)
    batches = [collate(step[part::parts]) for step in steps for part in range(parts)]

    class Trainer(DPOTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    settings = DPOConfig(
        output_dir=job["out_dir"],
        max_steps=len(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=parts,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        beta=job["beta"],
        bf16=job["dtype"] == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
        ),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[timer(clock)],
    )
    trainer.train()
    return clock.result()


def timer(clock: Clock) -> Any:
    """Return a callback that times steps and remembers their losses."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    return Timer()


if __name__ == "__main__":
    main(
        {"lora": finetune, "full": finetune, "packed": finetune, "dpo": prefer},
        ["trl", "transformers", "peft", "accelerate"],
    )
