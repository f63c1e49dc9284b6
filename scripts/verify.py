"""Check that a checkpoint gives the expected results on this machine.

    python scripts/verify.py checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python scripts/verify.py checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --adapter_dir out/quickstart/final

Logits against transformers in fp32 and bf16 (needs `pip install transformers`; skipped without it), import and export
bit by bit, cached and uncached, packed and unpacked, merged and unmerged, accumulated and at once, resumed and not. Exit
status 1 if a check fails. Memory: 4 bytes per parameter, twice that while transformers rounds its model.

With an adapter, logits are compared with those of peft, and this adapter is merged; training is checked with random ones.
With 4 bits, transformers gets the dequantized weights. Of classifiers and reward models, scores are compared, packed and
unpacked, merged and unmerged.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litmini.cli import command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from litmini.evaluation.verify import Check


@dataclass
class VerifyConfig:
    """Settings of verify.py."""

    checkpoint: str
    """Checkpoint directory, or the final/ of a full finetuning run."""
    adapter_dir: str | None = None
    """Adapter over it, such as the final/ of a LoRA run."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    bits: Literal[4, 16] | None = None
    """Bits of the base's linears; none: those of the adapter's training, 16 without an adapter."""
    json: str | None = None
    """JSON file for the results."""
    device: str = "auto"
    """auto: a GPU if there is one, else the CPU."""


def main(config: VerifyConfig) -> None:
    import platform

    import torch

    import litmini
    from litmini.checkpoints.hf import check_checkpoint_dir
    from litmini.checkpoints.peft import read_adapter
    from litmini.checkpoints.scores import gives_scores
    from litmini.errors import UserError, counted
    from litmini.evaluation.verify import CHECKS, SCORE_CHECKS, check_bits, sequences
    from litmini.files import check_new_file, write_json
    from litmini.generation.generate import usable_device
    from litmini.methods.nf4 import NF4Linear, convert
    from litmini.models import use_model_file

    file = None if config.json is None else check_new_file(config.json, "--json")
    use_model_file(config.model_file)
    directory = check_checkpoint_dir(config.checkpoint)
    device = usable_device(config.device)
    trained = read_adapter(config.adapter_dir).quantize.bits if config.adapter_dir else 16
    bits: Literal[4, 16] = config.bits or (4 if trained == 4 else 16)
    model, tokenizer = litmini.load(directory, config.adapter_dir, "fp32", device, bits)
    tokens = sequences(tokenizer, model, device)
    scored = gives_scores(model)
    ours = outputs(model, tokens, scored)
    results = [check_bits(directory)]
    for check in SCORE_CHECKS if scored else CHECKS:
        results.append(check(model, tokens))
        with torch.no_grad():
            assert torch.equal(outputs(model, tokens, scored), ours), f"{check.__name__} left the model changed"
    whole: str = vars(model).get("in_whole_model", "model.")  # how names begin in a multimodal model
    packed = {
        re.sub(r"^model\.", whole, name): m.dequantize()
        for name, m in model.named_modules()
        if isinstance(m, NF4Linear)
    }
    convert(model, torch.bfloat16)
    rounded = outputs(model, tokens, scored).float()
    del model
    results = against_transformers(str(directory), config.adapter_dir, packed, tokens, ours, rounded, scored) + results
    for result in results:
        word = {True: "ok", False: "FAILED", None: "skipped"}[result.passed]
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in result.measured.items())
        print(f"{result.name:34} {word:8} {numbers}{'; ' * bool(numbers and result.note)}{result.note}")
    if file is not None:
        versions = {"litmini": litmini.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts: dict[str, Any] = {
            "checkpoint": str(directory),
            "adapter_dir": config.adapter_dir,
            "bits": bits,
            "device": device,
        }
        facts |= {"rows": list(tokens.shape), "versions": versions}
        write_json(check_new_file(str(file), "--json"), {**facts, "checks": [vars(result) for result in results]})
    if failed := [result.name for result in results if result.passed is False]:
        raise UserError(f"{directory}: {len(failed)} of {counted(len(results), 'check')} failed: {', '.join(failed)}.")


def outputs(model: "nn.Module", tokens: "Tensor", scored: bool) -> "Tensor":
    """Return the logits, or the scores at the last token of each sequence."""
    import torch

    labels = torch.full_like(tokens, -100)
    labels[:, -1] = 0
    with torch.no_grad():
        return model(tokens, labels=labels)[0] if scored else model(tokens)  # type: ignore[no-any-return]


def against_transformers(
    directory: str,
    adapter_dir: str | None,
    packed: "dict[str, Tensor]",
    tokens: "Tensor",
    ours: "Tensor",
    rounded: "Tensor",
    scored: bool,
) -> "list[Check]":
    """Compare logits in fp32 and bf16 with those of transformers. In bf16, the error to fp32 must be about the same.

    Args:
        packed: layer -> its dequantized weight, for layers in 4 bits.
        scored: it is a classifier or a reward model, whose scores at the last token are compared.
    """
    import torch

    from litmini.checkpoints.config import is_multimodal
    from litmini.evaluation.verify import Check, compare_logits
    from litmini.files import read_json

    library = "peft" if adapter_dir else "transformers"
    names = [f"{'scores' if scored else 'logits'} = {library}, {dtype}" for dtype in ("fp32", "bf16")]
    try:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoModelForSequenceClassification,
        )

        multimodal = is_multimodal(read_json(Path(directory) / "config.json"))
        text: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        kind: Any = AutoModelForSequenceClassification if scored else text
        settings = {"config": AutoConfig.from_pretrained(adapter_dir)} if scored and adapter_dir else {}
        theirs: Any = kind.from_pretrained(directory, dtype=torch.float32, **settings)
        for name, weight in packed.items():
            _put_weight(theirs, name.removesuffix(".base"), weight)
        if adapter_dir:
            from peft import PeftModel

            if not scored and ours.shape[-1] != theirs.config.get_text_config().vocab_size:  # it has new tokens
                theirs.resize_token_embeddings(ours.shape[-1], mean_resizing=False)
            theirs = PeftModel.from_pretrained(theirs, adapter_dir)
        theirs = theirs.to(tokens.device).eval()
    except ImportError as error:
        return [Check(name, None, note=f"{error.name} is not installed: pip install {error.name}") for name in names]
    except (ValueError, KeyError, OSError) as error:  # transformers does not have this family, or not yet
        note = f"{library} cannot load it: {str(error).splitlines()[0]}"
        return [Check(name, None, note=note) for name in names]
    with torch.no_grad():
        exact = theirs(tokens, use_cache=False).logits
        theirs_rounded = theirs.bfloat16()(tokens, use_cache=False).logits.float()
    checks = [compare_logits(names[0], ours, exact), compare_logits(names[1], rounded, theirs_rounded)]
    errors = [float((x - exact).square().mean().sqrt()) for x in (rounded, theirs_rounded)]
    checks[1].measured |= {"error_to_fp32": errors[0], "theirs": errors[1]}
    checks[1].passed = errors[0] <= 1.5 * errors[1] + 1e-6
    return checks


def _put_weight(model: "nn.Module", name: str, weight: "Tensor") -> None:
    """Replace the weight of a layer of transformers' model.

    Raises:
        ValueError: the layer has another layout.
    """
    parameter: Any = dict(model.named_parameters()).get(f"{name}.weight")
    if parameter is None or parameter.shape != weight.shape or type(model.get_submodule(name)).__name__ != "Linear":
        raise ValueError(f"in 4 bits, since it keeps {name} in another layout")
    parameter.data.copy_(weight)


if __name__ == "__main__":
    command(main, VerifyConfig, __doc__, positional=("checkpoint",))
