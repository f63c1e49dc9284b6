"""Finetune a reward model: a score for a conversation, at its last token, learned from pairs (Bradley-Terry).

    python scripts/finetune_reward.py --config config_hub/quickstart_reward.yaml

A line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}, with "margin", if you like. The result in OUT_DIR/final
is an adapter in PEFT's format (task_type SEQ_CLS) or, with --lora null, a Hugging Face ...ForSequenceClassification.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.preference import FinetuneRewardConfig


def main(config: FinetuneRewardConfig) -> None:
    from litmini.checkpoints.load import load_quantized
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.heads import use_scores
    from litmini.methods.reference import disable_dropout
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.classify import save_classifier, with_score
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.reward import BradleyTerry, prepare_data
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config, directory.began)

    # 4. Base model, with one score in place of its head
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)
    use_scores(model, 1)

    # 5. Method: freeze everything, adapters over linears, the score is trained in full; or every weight is trained
    ratios: dict[str, float] = {}
    if config.lora is not None:
        add_adapters(model, with_score(config.lora))
        ratios = learning_rate_ratios(model, config.lora)
    elif config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print("warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32.")
    disable_dropout(model)
    objective = BradleyTerry(config.reward)

    def save_weights(directory: Path | None) -> None:
        save_classifier(model, directory, config, data)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed
    setup = make_setup(directory, fabric, data, model, save_weights, ratios, objective.names)

    # 7. Fit
    measure_start(setup, objective)
    fit(setup, objective)

    # 8. Save and measure
    base = f" --checkpoint_dir {config.base} --adapter_dir" if config.lora else " --checkpoint_dir"
    usage = f"Rank pairs with it:\n  python scripts/evaluate.py{base} {config.out_dir}/final --reward PAIRS.jsonl"
    fabric.print(finish(setup, objective, usage=usage))


if __name__ == "__main__":
    command(main, FinetuneRewardConfig, __doc__)
