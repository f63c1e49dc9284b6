"""Finetune all weights.

    python scripts/finetune_full.py --config config_hub/quickstart_full.yaml

The result in OUT_DIR/final is a checkpoint. By default (`bf16-mixed`) weights are in fp32: 16 bytes a parameter with AdamW.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config import FinetuneFullConfig


def main(config: FinetuneFullConfig) -> None:
    from litmini.checkpoint import load_model, save_trained
    from litmini.finetune import finish, prepare_data, preview, run_training
    from litmini.launch import make_fabric, weight_dtype
    from litmini.optim import make_optimizer
    from litmini.runs import Run

    # 1. Run directory
    run = Run(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config)

    # 4. Base model
    model = load_model(config.checkpoint_dir, weight_dtype(config.precision))

    # 5. Method: every weight is trained
    if config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print(
            "warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32, and "
            "--optim.stochastic_rounding true rounds them by chance."
        )

    def save_weights(directory: Path) -> None:
        save_trained(model, directory, base=config.checkpoint_dir)
        data.tokenizer.save(directory)

    if config.dry_run or config.show_masks:
        return preview(data, config, model)

    # 6. Shard and optimizer
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, config.optim))

    # 7. Resume
    progress = run.begin(fabric, model, optimizer, data.tokenizer)

    # 8. Fit
    run_training(fabric, wrapped, model, optimizer, data, run, progress, save_weights)

    # 9. Save and measure
    final = run.save_final(save_weights)
    fabric.print(finish(fabric, wrapped, model, data, run, checkpoint_dir=final))


if __name__ == "__main__":
    command(main, FinetuneFullConfig, __doc__)
