"""Generate text, streamed to the terminal.

    python scripts/generate.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Who are you?"

Where the checkpoint has a chat template, the prompt is a user's turn.
"""

from dataclasses import dataclass
from typing import Literal

from litmini.cli import command
from litmini.config import UserError, check


@dataclass
class GenerateConfig:
    """Settings of generate.py."""

    checkpoint_dir: str
    """Model to use."""
    prompt: str
    """The user's turn; - reads it from standard input."""
    adapter_dir: str | None = None
    """Adapter in PEFT's format to put on it."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    system: str | None = None
    """System turn before the prompt."""
    chat_template: str = "auto"
    """auto: the checkpoint's own, if it has one; none: the prompt as raw text; or the path of a .jinja file."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Makes sampling repeatable."""
    ignore_eos: bool = False
    """Go on to max_new_tokens whatever comes."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        text = self.prompt + (self.system or "")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError("the prompt is not UTF-8 text.")
        check("", self, seed=self.seed is None or 0 <= self.seed < 2**63)


def main(config: GenerateConfig) -> None:
    import sys
    import time

    import torch

    import litmini
    from litmini.generate import stream
    from litmini.models import use_model_file
    from litmini.tokenizer import Message, Tokenizer

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    use_model_file(config.model_file)
    model, tokenizer = litmini.load(config.checkpoint_dir, config.adapter_dir, config.dtype, device)
    if config.chat_template != "auto":
        tokenizer = Tokenizer(tokenizer.directory, config.chat_template)
    prompt: str | list[Message] = sys.stdin.read() if config.prompt == "-" else config.prompt
    if config.system is not None:
        prompt = [{"role": "system", "content": config.system}, {"role": "user", "content": prompt}]
    started = time.perf_counter()
    for piece in stream(
        model,
        tokenizer,
        prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        **({"stop_ids": []} if config.ignore_eos else {}),
    ):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)
    print(f"[{seconds:.1f} s]", file=sys.stderr)


if __name__ == "__main__":
    command(main, GenerateConfig, __doc__)
