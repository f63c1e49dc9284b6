"""Finetune a classifier: a score for each class, at the last token of a text, in place of the language model head.

    python scripts/finetune_classifier.py --config config_hub/quickstart_classifier.yaml

A line of the data is {"text": ..., "label": ...}, or {"messages": [...], "label": ...}; a label is a class, a list of classes
or a number. Beside the result stand the majority class and a bag of words on the same validation data. The result in
OUT_DIR/final is an adapter in PEFT's format (task_type SEQ_CLS) or, with --lora null, a ...ForSequenceClassification.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.classify import FinetuneClassifierConfig


def main(config: FinetuneClassifierConfig) -> None:
    from litmini.checkpoints.load import load_quantized
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.heads import use_scores
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.classify import Classification, label_weights, prepare_data, save_classifier, with_score
    from litmini.tasks.classify_measures import (
        describe_classifier,
        measure_baselines,
        measure_classifier,
        report_charts,
        report_tables,
    )
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config)
    objective = Classification(data.problem_type, label_weights(data.train.examples, config.classes.weights))

    # 4. Base model, with a score for each class in place of its head
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)
    use_scores(model, len(data.names))

    # 5. Method: freeze everything, adapters over linears, the score is trained in full; or every weight is trained
    ratios: dict[str, float] = {}
    if config.lora is not None:
        add_adapters(model, with_score(config.lora))
        ratios = learning_rate_ratios(model, config.lora)
    elif config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print("warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32.")
    if tokens := data.tokenizer.new_tokens:
        from litmini.methods.trainable_tokens import add_tokens

        add_tokens(model, tokens.ids, tokens.known)

    def save_weights(directory: Path | None) -> None:
        save_classifier(model, directory, config, data, data.problem_type)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed
    setup = make_setup(directory, fabric, data, model, save_weights, ratios, objective.names)

    # 7. Fit, and what needs no model beside it
    measure_baselines(setup, data, config.classes.weights == "balanced")
    measure_start(setup, objective)
    measure_classifier(setup, data, "before")
    fit(setup, objective)

    # 8. Save and measure
    measure_classifier(setup, data, "after")
    base = f" --checkpoint_dir {config.base} --adapter_dir" if config.lora else " --checkpoint_dir"
    usage = f"Measure it on other texts:\n  python scripts/evaluate.py{base} {config.out_dir}/final --classify LABELLED.jsonl"
    fabric.print(
        finish(setup, objective, usage=usage, more_charts=report_charts(setup, data), more_tables=report_tables(setup))
    )
    fabric.print(describe_classifier(setup, data))


if __name__ == "__main__":
    command(main, FinetuneClassifierConfig, __doc__)
