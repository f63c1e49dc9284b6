"""TRL's SFTTrainer with its own loop, over prepared micro-batches with the same samples in each step."""

import math
from typing import Any

from common import Clock, Job, main, validation_losses
from run_transformers import batch


def finetune(job: Job) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    bf16 = job["dtype"] == "bf16"
    clock = Clock(job)
    # The trainer accumulates the same number of micro-batches in every step, so samples are distributed evenly
    samples = sum(map(len, job["steps"])) / len(job["steps"])
    parts = 1 if job["packed"] else math.ceil(samples / job["micro_batch_size"])
    batches = [batch(step[part::parts], job["packed"]) for step in job["steps"] for part in range(parts)]

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

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
        callbacks=[Timer()],
    )
    trainer.train()
    found = clock.result()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).float()

    def loss(samples: list[list[int]], targets: int) -> Any:
        return model(**batch(samples, False), num_items_in_batch=targets, use_cache=False).loss

    return {**found, **validation_losses(job, model, loss)}


if __name__ == "__main__":
    main(dict.fromkeys(("lora", "full", "packed"), finetune), ["trl", "transformers", "peft", "accelerate"])
