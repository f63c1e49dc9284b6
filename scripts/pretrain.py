"""Train a model from raw text, or go on with one.

    python scripts/pretrain.py --config config_hub/pretrain/char.yaml

The result in OUT_DIR/final is a checkpoint. Memory by default (`bf16-mixed`, AdamW): 16 bytes a parameter, and activations.
"""

from typing import Any

from litmini.cli import command
from litmini.config.pretrain import PretrainConfig


def main(config: PretrainConfig) -> None:
    from litmini.distributed.fabric import load_device, make_fabric, product_dtype, weight_dtype
    from litmini.ops.rounding import dither
    from litmini.runs.run import Run
    from litmini.tasks.pretrain import blueprint, prepare_data, use_z_loss
    from litmini.tasks.setup import finish, preview, run_training
    from litmini.training.optimizer import make_optimizer

    # 1. Run directory
    run = Run(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. The model's shape, and the data
    plan = blueprint(config)
    data = prepare_data(fabric, config, plan)

    # 4. Model
    model = plan.model(weight_dtype(config.precision), config.seed, load_device(fabric))
    if config.z_loss:
        use_z_loss(model, config.z_loss)
    save_weights = plan.saver(model, data.tokenizer)
    if config.precision == "bf16-true":
        fabric.print("warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32.")
    if config.dry_run:
        return preview(data, config, model)
    dither(model.parameters(), product_dtype(config.precision), config.seed)

    # 5. Shard and optimizer
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config.optim))

    # 6. Resume
    progress = run.begin(fabric, model, optimizer, data.tokenizer)

    # 7. Fit
    run_training(fabric, wrapped, model, optimizer, data, run, progress, save_weights)

    # 8. Save and measure
    final = run.save_final(save_weights)
    fabric.print(finish(fabric, wrapped, model, data, run, checkpoint_dir=final))


if __name__ == "__main__":
    command(main, PretrainConfig, __doc__)
