"""Finetune with rewards (GRPO and its relatives, RLOO): the model completes prompts, functions score the completions, and
better ones become more probable.

    python scripts/finetune_grpo.py --config config_hub/quickstart_grpo.yaml

A line of the data is {"prompt": ..., any columns that rewards read}; rewards are --rewards.functions
'[rewards.py:my_function]', built-in ones or a reward model. The result in OUT_DIR/final is an adapter in PEFT's
format or, with --lora null, a checkpoint.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.grpo import FinetuneGrpoConfig


def main(config: FinetuneGrpoConfig) -> None:
    from litmini.checkpoints.hf import save_trained
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.heads import use_log_probs
    from litmini.methods.reference import disable_dropout
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.grpo import prepare_data
    from litmini.tasks.grpo_objective import PolicyOptimization
    from litmini.tasks.grpo_report import completion_tables, describe_rewards, plot_rewards
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer, prompts and rewards
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
    use_log_probs(model, temperature=config.grpo.temperature)
    objective = PolicyOptimization(config.grpo, model, data.sampling.rewards.names)

    def save_weights(directory: Path | None) -> None:
        if config.lora is None:
            save_trained(model, directory, base=config.base)
        else:
            save_adapter(model, directory, config.base, quantize=config.quantize)
        data.sampling.save(directory)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        fabric.print(data.prompts.show(data.tokenizer, config.show_masks))
        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed; from here on there is a model that samples
    setup = make_setup(directory, fabric, data, model, save_weights, ratios, objective.names)
    data.sampling.begin(setup, objective)

    # 7. Fit: each step samples, scores and learns
    measure_start(setup, objective)
    fit(setup, objective)

    # 8. Save and measure
    base = config.base if config.lora else None
    fabric.print(finish(setup, objective, adapter_of=base, more_tables=completion_tables(setup)))
    plot_rewards(setup)
    fabric.print(describe_rewards(setup, data.sampling.rewards), end="")


if __name__ == "__main__":
    command(main, FinetuneGrpoConfig, __doc__)
