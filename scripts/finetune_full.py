"""Finetune all weights.

    python scripts/finetune_full.py --config config_hub/quickstart_full.yaml

The result in OUT_DIR/final is a checkpoint. The default (`bf16-mixed`) has fp32 master weights: 16 bytes per parameter with
AdamW.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.finetune import FinetuneFullConfig


def main(config: FinetuneFullConfig) -> None:
    from litmini.checkpoints.hf import load_model, save_trained
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
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
    model = load_model(config.checkpoint_dir, weight_dtype(config.precision), load_device(fabric))

    # 5. Method: every weight is trained
    if config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print(
            "warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32, and "
            "--optim.stochastic_rounding true rounds them stochastically."
        )
    if tokens := data.tokenizer.new_tokens:
        from litmini.methods.trainable_tokens import add_tokens

        add_tokens(model, tokens.ids, tokens.known)
    ratios: dict[str, float] = {}

    def save_weights(directory: Path | None) -> None:
        save_trained(model, directory, base=config.checkpoint_dir)

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
    fabric.print(finish(setup, objective))


if __name__ == "__main__":
    command(main, FinetuneFullConfig, __doc__)
