"""Distill a teacher into a smaller student with the same vocabulary: offline, from the teacher's distributions on the data, or
on-policy, from its distributions on the student's own completions (GKD).

    python scripts/keep_layers.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --layers '[0, 6, 12, 18, 24, 29]' --out_dir checkpoints/mine/SmolLM2-6-layers
    python scripts/finetune_distill.py --config config_hub/quickstart_distill.yaml

The data are those of finetune_lora.py, and so is the validation loss: the cross entropy. The result in OUT_DIR/final is an
adapter in PEFT's format or, with --lora null, a checkpoint.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.distill import FinetuneDistillConfig


def main(config: FinetuneDistillConfig) -> None:
    from litmini.checkpoints.hf import save_trained
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import compute_dtype, load_device, make_fabric, weight_dtype
    from litmini.methods.adapters import add_adapters, learning_rate_ratios
    from litmini.methods.teacher_head import use_student_head
    from litmini.ops.rounding import dither
    from litmini.runs.directory import RunDirectory
    from litmini.tasks.distill import Distillation, TaughtSequences, prepare_data
    from litmini.tasks.distill_teacher import load_teacher, remember_teacher
    from litmini.tasks.measure import finish, measure_start
    from litmini.tasks.setup import make_setup
    from litmini.training.loop import fit

    # 1. Run directory, checked before anything is loaded
    directory = RunDirectory(config)

    # 2. Fabric
    fabric = make_fabric(config)

    # 3. Tokenizer and data; offline, what the teacher expects there, computed before the student is loaded
    data = prepare_data(fabric, config, directory.began)
    if isinstance(data.train, TaughtSequences):
        remember_teacher(fabric, data.train, config, data.vocab)

    # 4. Student
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)

    # 5. Method: adapters over linears, or every weight is trained; and the head that compares
    ratios: dict[str, float] = {}
    if config.lora is not None:
        add_adapters(model, config.lora)
        ratios = learning_rate_ratios(model, config.lora)
    elif config.precision == "bf16-true" and not config.optim.stochastic_rounding:
        fabric.print("warning: weights in bf16 lose small updates; --precision bf16-mixed keeps them in fp32.")
    use_student_head(model)
    objective = Distillation(config, model, data.vocab)

    def save_weights(directory: Path | None) -> None:
        if config.lora is None:
            save_trained(model, directory, base=config.base)
        else:
            save_adapter(model, directory, config.base, quantize=config.quantize)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model, objective)
    dither(model.parameters(), compute_dtype(config.precision), config.seed)

    # 6. Setup: shard, make the optimizer, restore what is resumed; on-policy, from here on there is a model that samples
    setup = make_setup(directory, fabric, data, model, save_weights, ratios, objective.names)
    if data.sampling is not None:
        objective.use_teacher(*load_teacher(config, fabric))
        data.sampling.begin(setup, objective)

    # 7. Fit
    measure_start(setup, objective)
    fit(setup, objective)

    # 8. Save and measure
    fabric.print(finish(setup, objective, adapter_of=config.base if config.lora else None))


if __name__ == "__main__":
    command(main, FinetuneDistillConfig, __doc__)
