"""Finetune a classifier: a score for each class, at the last token of a text, in place of the language model head.

    python scripts/finetune_classifier.py --checkpoint_dir checkpoints/ORG/NAME --out_dir out/classifier \\
        --data.path labelled.jsonl --data.val_fraction 0.1

A line of labelled.jsonl is {"text": ..., "label": ...}. The result in OUT_DIR/final is an adapter in PEFT's format
(task_type SEQ_CLS) or, with --lora null, a Hugging Face ...ForSequenceClassification.
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
    from litmini.tasks.classify import Classification, measure_accuracy, prepare_data, save_classifier, with_score
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data
    data = prepare_data(fabric, config)

    # 4. Base model, with a score for each class in place of its head
    model = load_quantized(config.checkpoint_dir, config.quantize, weight_dtype(config.precision), load_device(fabric))
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
        save_classifier(model, directory, config, data)

    objective = Classification()
    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed
    setup = make_setup(directory, fabric, data, model, save_weights, ratios)

    # 7. Fit
    measure_start(setup, objective)
    measure_accuracy(setup, "before")
    fit(setup, objective)

    # 8. Save and measure
    measure_accuracy(setup, "after")
    if config.lora is None:
        usage = "It loads as AutoModelForSequenceClassification of transformers."
    else:
        usage = "It is an adapter (SEQ_CLS): PEFT puts it over AutoModelForSequenceClassification of transformers."
    fabric.print(finish(setup, objective, usage=usage))


if __name__ == "__main__":
    command(main, FinetuneClassifierConfig, __doc__)
