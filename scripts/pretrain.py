"""Train a model from raw text, or continue the training of one.

    python scripts/pretrain.py --config config_hub/pretrain/char.yaml

The result in OUT_DIR/final is a checkpoint. Memory by default (`bf16-mixed`, AdamW): 16 bytes per parameter, and activations.
"""

from litmini.cli import command
from litmini.config.pretrain import PretrainConfig


def main(config: PretrainConfig) -> None:
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.pretrain import blueprint, prepare_data, use_z_loss
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit
    from litmini.training.objective import LanguageModeling

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

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
        from litmini.tasks.dry_run import preview

        return preview(data, config, model)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 5. Setup: shard, make the optimizer, restore what is resumed
    setup, objective = make_setup(directory, fabric, data, model, save_weights), LanguageModeling()

    # 6. Fit
    measure_start(setup, objective)
    fit(setup, objective)

    # 7. Save and measure
    fabric.print(finish(setup, objective))


if __name__ == "__main__":
    command(main, PretrainConfig, __doc__)
