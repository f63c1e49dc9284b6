"""Finetune all weights.

    python scripts/finetune_full.py --config config_hub/quickstart_full.yaml

The result in OUT_DIR/final is a checkpoint. By default (`bf16-mixed`) weights are in fp32: 16 bytes a parameter with AdamW.
"""

from pathlib import Path
from typing import Any

from litmini.cli import command
from litmini.config.finetune import FinetuneFullConfig


def main(config: FinetuneFullConfig) -> None:
    from litmini.checkpoints.hf import load_model, save_trained
    from litmini.distributed.fabric import load_device, make_fabric, product_dtype, weight_dtype
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

    # 4. Base model
    model = load_model(config.checkpoint_dir, weight_dtype(config.precision), load_device(fabric))

    # 5. Method: every weight is trained
    if config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print(
            "warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32, and "
            "--optim.stochastic_rounding true rounds them by chance."
        )
    ratios: dict[str, float] = {}

    def save_weights(directory: Path | None) -> None:
        save_trained(model, directory, base=config.checkpoint_dir)

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
    fabric.print(finish(fabric, wrapped, model, data, run, checkpoint_dir=final))


if __name__ == "__main__":
    command(main, FinetuneFullConfig, __doc__)
