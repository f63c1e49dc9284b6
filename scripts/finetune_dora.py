"""Finetune with DoRA: LoRA with a trained magnitude for each row of a weight; with `--quantize.bits 4`, over a 4-bit base.

    python scripts/finetune_dora.py --config config_hub/quickstart_dora.yaml

The result in OUT_DIR/final is an adapter in PEFT's format.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.finetune import FinetuneDoraConfig


def main(config: FinetuneDoraConfig) -> None:
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.dora import DoRALinear
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

    # 4. Base model, in 16 or 4 bits
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)

    # 5. Method: freeze everything, adapters with magnitudes over linears
    if config.continued:
        from litmini.checkpoints.continue_adapter import continue_adapter

        continue_adapter(model, config.continued, DoRALinear, config.lora.dropout)
    else:
        add_adapters(model, config.lora, DoRALinear)
    if tokens := data.tokenizer.new_tokens:
        from litmini.methods.trainable_tokens import add_tokens

        add_tokens(model, tokens.ids, tokens.known)
    ratios = learning_rate_ratios(model, config.lora)

    def save_weights(directory: Path | None) -> None:
        save_adapter(model, directory, config.base, quantize=config.quantize)

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
    command(main, FinetuneDoraConfig, __doc__)
