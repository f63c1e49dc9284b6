"""Finetune with IA3: train a factor for each output or input of some linears; all weights are frozen.

    python scripts/finetune_ia3.py --config config_hub/quickstart_ia3.yaml

The result in OUT_DIR/final is an adapter in PEFT's format.
"""

from pathlib import Path

from litmini.cli import command
from litmini.config.finetune import FinetuneIa3Config


def main(config: FinetuneIa3Config) -> None:
    from litmini.checkpoints.load import load_quantized
    from litmini.checkpoints.peft import save_adapter
    from litmini.distributed.fabric import load_device, make_fabric, weight_dtype
    from litmini.methods.ia3 import IA3Linear, add_ia3
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

    # 4. Base model, in 16 or 4 bits
    dtype = weight_dtype(config.precision)
    model = load_quantized(config.base, config.quantize, dtype, load_device(fabric), fabric.device)

    # 5. Method: freeze everything, factors over linears
    if config.continued:
        from litmini.checkpoints.continue_adapter import continue_adapter

        continue_adapter(model, config.continued, IA3Linear)
    else:
        add_ia3(model, config.ia3)
    ratios: dict[str, float] = {}

    def save_weights(directory: Path | None) -> None:
        save_adapter(model, directory, config.base, quantize=config.quantize)

    if config.dry_run or config.show_masks:
        from litmini.tasks.dry_run import preview

        return preview(data, config, model)

    # 6. Setup: shard, make the optimizer, restore what is resumed
    setup, objective = make_setup(directory, fabric, data, model, save_weights, ratios), LanguageModeling()

    # 7. Fit
    measure_start(setup, objective)
    fit(setup, objective)

    # 8. Save and measure
    fabric.print(finish(setup, objective, adapter_of=config.base))


if __name__ == "__main__":
    command(main, FinetuneIa3Config, __doc__)
