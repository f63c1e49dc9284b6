"""Finetune with LoRA: train an adapter on each linear; all weights are frozen.

    python scripts/finetune_lora.py --config config_hub/quickstart.yaml

The result in OUT_DIR/final is an adapter in PEFT's format.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.finetune import FinetuneLoraConfig


def main(config: FinetuneLoraConfig) -> None:
    from litmini.checkpoints.hf import load_model
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.lora import LoRALinear
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.setup import make_setup
    from litmini.tasks.sft import prepare_data
    from litmini.training.loop import fit
    from litmini.training.objective import LanguageModeling

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config, directory.began)

    # 4. Base model
    model = load_model(config.base, weight_dtype(config.precision), load_device(fabric))

    # 5. Method: freeze everything, adapters over linears
    if config.continued:
        from litmini.checkpoints.continue_adapter import continue_adapter

        continue_adapter(model, config.continued, LoRALinear, config.lora.dropout)
    else:
        add_adapters(model, config.lora)
    if tokens := data.tokenizer.new_tokens:
        from litmini.methods.trainable_tokens import add_tokens

        add_tokens(model, tokens.ids, tokens.known)
    ratios = learning_rate_ratios(model, config.lora)

    def save_weights(directory: Path | None) -> None:
        save_adapter(model, directory, config.base)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed
    setup, objective = make_setup(directory, fabric, data, model, save_weights, ratios), LanguageModeling()

    # 7. Fit
    measure_start(setup, objective)
    fit(setup, objective)

    # 8. Save and measure
    fabric.print(finish(setup, objective, adapter_of=config.base))


if __name__ == "__main__":
    command(main, FinetuneLoraConfig, __doc__)
