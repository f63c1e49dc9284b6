"""Finetune with preferences: DPO and its relatives, from pairs of a chosen and a rejected completion; or KTO.

    python scripts/finetune_preference.py --config config_hub/quickstart_preference.yaml

A line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}, or {"prompt": ..., "completion": ..., "label": ...} for
--preference.loss kto. The result in OUT_DIR/final is an adapter in PEFT's format or, with --lora null, a checkpoint.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.preference import FinetunePreferenceConfig


def main(config: FinetunePreferenceConfig) -> None:
    from litmini.checkpoints.hf import save_trained
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.heads import use_log_probs
    from litmini.methods.reference import disable_dropout
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.preference import make_objective, prepare_data
    from litmini.tasks.preference_measures import measure_matches, warn_of_falling
    from litmini.tasks.reference import remember_reference
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config, directory.began)

    # 4. Base model
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)

    # 5. Method: adapters over linears, without which the model is the reference; or every weight is trained
    ratios: dict[str, float] = {}
    if config.lora is not None:
        add_adapters(model, config.lora)
        ratios = learning_rate_ratios(model, config.lora)
    elif config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print("warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32.")
    disable_dropout(model)
    use_log_probs(model)
    objective = make_objective(config, model, fabric)

    def save_weights(directory: Path | None) -> None:
        if config.lora is None:
            save_trained(model, directory, base=config.base)
        else:
            save_adapter(model, directory, config.base, quantize=config.quantize)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, compute what the model is compared with, restore what is resumed
    setup = make_setup(
        directory, fabric, data, model, save_weights, ratios, objective.names,
        before=lambda wrapped: remember_reference(fabric, wrapped, data, config),
    )  # fmt: skip

    # 7. Fit
    measure_start(setup, objective)
    measure_matches(setup, "before")
    fit(setup, objective)

    # 8. Save and measure
    measure_matches(setup, "after")
    fabric.print(finish(setup, objective, adapter_of=config.base if config.lora else None))
    warn_of_falling(setup)


if __name__ == "__main__":
    command(main, FinetunePreferenceConfig, __doc__)
