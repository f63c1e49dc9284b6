"""Check on this machine that a checkpoint behaves here as it should.

    python scripts/verify.py checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Logits against transformers in fp32 and bf16 (needs `pip install transformers`; skipped without it), import and export
bit by bit, cached and uncached, packed and unpacked, merged and unmerged, accumulated and at once, resumed and not. Exit
status 1 if one of them fails. Memory: 4 bytes a parameter, twice for a moment where transformers rounds its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litmini.cli import command

if TYPE_CHECKING:
    from torch import Tensor

    from litmini.verify import Check


@dataclass
class VerifyConfig:
    """Settings of verify.py."""

    checkpoint: str
    """Checkpoint directory, or the final/ of a full finetuning run."""
    json: str | None = None
    """File to write the results to."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU."""


def main(config: VerifyConfig) -> None:
    import platform
    from pathlib import Path

    import torch

    import litmini
    from litmini.checkpoint import check_checkpoint_dir
    from litmini.config import UserError
    from litmini.files import write_json
    from litmini.verify import CHECKS, check_bits, rows

    directory = check_checkpoint_dir(config.checkpoint)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = litmini.load(directory, dtype="fp32", device=device)
    tokens = rows(tokenizer, model, device)
    with torch.no_grad():
        ours = model(tokens)
    results = [check_bits(directory)]
    for check in CHECKS:
        results.append(check(model, tokens))
        with torch.no_grad():
            assert torch.equal(model(tokens), ours), f"{check.__name__} left the model changed"
    with torch.no_grad():
        rounded = model.bfloat16()(tokens).float()
    del model
    results = against_transformers(str(directory), tokens, ours, rounded) + results
    for result in results:
        word = {True: "ok", False: "FAILED", None: "skipped"}[result.passed]
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in result.measured.items())
        print(f"{result.name:34} {word:8} {numbers}{'; ' * bool(numbers and result.note)}{result.note}")
    if config.json:
        versions = {"litmini": litmini.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts = {"checkpoint": str(directory), "device": device, "rows": list(tokens.shape), "versions": versions}
        write_json(Path(config.json), {**facts, "checks": [vars(result) for result in results]})
    if failed := [result.name for result in results if result.passed is False]:
        raise UserError(f"{directory}: {len(failed)} of {len(results)} checks failed: {', '.join(failed)}.")


def against_transformers(directory: str, tokens: "Tensor", ours: "Tensor", rounded: "Tensor") -> "list[Check]":
    """Logits in fp32 and bf16 against those of transformers. In bf16 both are rounded: ours may be as far from fp32."""
    import torch

    from litmini.verify import Check, compare_logits

    names = ("logits = transformers, fp32", "logits = transformers, bf16")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return [Check(name, None, note="transformers is not installed: pip install transformers") for name in names]
    try:
        theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        theirs = theirs.to(tokens.device).eval()
    except (ValueError, KeyError, OSError) as error:  # a family of ours alone, or one newer than that transformers
        note = f"transformers cannot load it: {str(error).splitlines()[0]}"
        return [Check(name, None, note=note) for name in names]
    with torch.no_grad():
        exact = theirs(tokens, use_cache=False).logits
        theirs_rounded = theirs.bfloat16()(tokens, use_cache=False).logits.float()
    checks = [compare_logits(names[0], ours, exact), compare_logits(names[1], rounded, theirs_rounded)]
    errors = [float((x - exact).square().mean().sqrt()) for x in (rounded, theirs_rounded)]
    checks[1].measured |= {"error_to_fp32": errors[0], "theirs": errors[1]}
    checks[1].passed = errors[0] <= 1.5 * errors[1] + 1e-6
    return checks


if __name__ == "__main__":
    command(main, VerifyConfig, __doc__, positional=("checkpoint",))
