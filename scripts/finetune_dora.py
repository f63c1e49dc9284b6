"""Finetune with DoRA: LoRA, and a trained magnitude for each row of a weight. With `--quantize.bits 4` over a 4-bit base.

    python scripts/finetune_dora.py --config config_hub/quickstart_dora.yaml

The result in OUT_DIR/final is an adapter in PEFT's format.
"""

from pathlib import Path
from typing import Any

from litmini.cli import command
from litmini.config.finetune import FinetuneDoraConfig


def main(config: FinetuneDoraConfig) -> None:
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import load_device, make_fabric, product_dtype, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.dora import DoRALinear
    from litmini.ops.rounding import dither
    from litmini.runs.run import Run
    from litmini.tasks.setup import finish, preview, run_training
    from litmini.tasks.sft import prepare_data
    from litmini.training.optimizer import make_optimizer

    # 1. Run directory
    run = Run(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config)

    # 4. Base model, in 16 or 4 bits
    model = load_quantized(config.checkpoint_dir, config.quantize, weight_dtype(config.precision), load_device(fabric))

    # 5. Method: freeze everything, adapters with magnitudes over linears
    add_adapters(model, config.lora, DoRALinear)
    ratios = learning_rate_ratios(model, config.lora)

    def save_weights(directory: Path | None) -> None:
        save_adapter(model, directory, config.checkpoint_dir, quantize=config.quantize)

    if config.dry_run or config.show_masks:
        return preview(data, config, model)
    dither(model.parameters(), product_dtype(config.precision), config.seed)

    # 6. Shard and optimizer
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config.optim, ratios))

    # 7. Resume
    progress = run.begin(fabric, model, optimizer, data.tokenizer)

    # 8. Fit
    run_training(fabric, wrapped, model, optimizer, data, run, progress, save_weights)

    # 9. Save and measure
    final = run.save_final(save_weights)
    fabric.print(finish(fabric, wrapped, model, data, run, config.checkpoint_dir, adapter_dir=final))


if __name__ == "__main__":
    command(main, FinetuneDoraConfig, __doc__)
