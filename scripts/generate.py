"""Generate text: stream the completion of a prompt to the terminal, or complete a file of prompts.

    python scripts/generate.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Who are you?"
    python scripts/generate.py --checkpoint_dir ... --prompts questions.jsonl --out answers.jsonl --batch_size 16

With a chat template, a prompt is a user's turn. A line of the file is {"prompt": "..."} or {"messages": [...]}; a line of the
output is the same with "answer", "finish_reason" and "n_tokens", or with "error".
"""

from dataclasses import dataclass
from pathlib import Path

from litmini.cli import command
from litmini.config.generate import ModelConfig, SamplingConfig
from litmini.errors import UserError, by_cause, check, counted
from litmini.settings import Text


@dataclass(kw_only=True)
class GenerateConfig(SamplingConfig, ModelConfig):
    """Settings of generate.py."""

    prompt: Text | None = None
    """Prompt, as the user's turn; - reads it from standard input."""
    prompts: str | None = None
    """File of prompts, one JSON object per line, instead of one prompt."""
    out: str | None = None
    """File for their completions, in the same order."""
    batch_size: int = 16
    """Prompts of a file in one batch."""
    system: Text | None = None
    """System turn before the prompt."""
    prompt_lookup: int | None = None
    """Speculative decoding: draft this many tokens from earlier text. Faster if completions quote their prompt."""
    draft_dir: str | None = None
    """Speculative decoding with this smaller draft model and --draft_tokens. Faster, with the same completion."""
    draft_tokens: int = 5
    """Tokens that the draft model generates at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None) or (self.prompts is None) != (self.out is None):
            raise UserError("expected either --prompt TEXT, or --prompts FILE with --out FILE.")
        if self.prompts is not None and (self.prompt_lookup or self.draft_dir):
            raise UserError("speculative decoding needs one --prompt; a file of prompts is completed in batches.")
        if self.prompt_lookup is not None and self.draft_dir is not None:
            raise UserError("expected --prompt_lookup or --draft_dir, not both.")
        check(
            "",
            self,
            batch_size=self.batch_size > 0,
            draft_tokens=self.draft_tokens > 0,
            prompt_lookup=self.prompt_lookup is None or self.prompt_lookup > 0,
        )


def main(config: GenerateConfig) -> None:
    import sys
    import time

    from litmini.distributed.fabric import keep_memory
    from litmini.files import check_new_file
    from litmini.generation.generate import open_model, stream_text
    from litmini.generation.packed_linear import pack_linears
    from litmini.generation.prompts import check_text, describe
    from litmini.generation.request import Request
    from litmini.tokenizer import Message

    if config.out is not None:
        check_new_file(config.out, "--out")
    keep_memory()
    model, tokenizer = open_model(config)
    pack_linears(model)
    if config.prompts is not None:
        complete_file(config, model, tokenizer)
        return
    if config.prompt == "-" and sys.stdin is None:
        raise UserError("standard input is closed; expected the prompt there, or --prompt TEXT.")
    text = sys.stdin.read() if config.prompt == "-" else str(config.prompt)
    prompt: str | list[Message] = check_text(text)
    if config.system is not None:
        prompt = [{"role": "system", "content": check_text(config.system)}, {"role": "user", "content": prompt}]
    reply = Request(tokenizer.encode_prompt(prompt), config, tokenizer.stop_ids, tokenizer)
    started = time.perf_counter()
    for piece in stream_text(model, reply, make_draft(config, tokenizer)):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)
    for token in reply.logprobs:
        named = describe(token, tokenizer)
        others = " ".join(f"{top['token']!r} {top['logprob']:.3f}" for top in named["top_logprobs"])
        print(f"{named['token']!r:24} {named['logprob']:8.3f}  {others}", file=sys.stderr)
    print(f"[{counted(len(reply.ids), 'token')}, {seconds:.1f} s]", file=sys.stderr)


def make_draft(config: GenerateConfig, tokenizer):  # type: ignore[no-untyped-def]
    """Return the draft of speculative decoding, or None."""
    from dataclasses import replace

    from litmini.generation.generate import open_model
    from litmini.generation.packed_linear import pack_linears
    from litmini.generation.speculative import DraftModel, PromptLookup

    if config.prompt_lookup is not None:
        return PromptLookup(config.prompt_lookup)
    if config.draft_dir is not None:
        model, own = open_model(replace(config, checkpoint_dir=config.draft_dir, adapter_dir=None))
        pack_linears(model)
        ids = tokenizer.fast.get_vocab()
        if any(ids.get(token, i) != i for token, i in own.fast.get_vocab().items()):
            raise UserError(
                f"--draft_dir {config.draft_dir}: its tokens have other ids; expected the model's tokenizer."
            )
        return DraftModel(model, config.draft_tokens)
    return None


def complete_file(config: GenerateConfig, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Complete every prompt of a file; write errors in place of completions, and list them at the end."""
    import json

    from litmini.generation.prompts import complete_lines, read_prompts

    assert config.prompts is not None and config.out is not None, "checked when the settings were read"
    lines = read_prompts(config.prompts)
    wrong, total = [], 0
    # backslashreplace: half a character, as a JSON escape can hold, is written as that escape again
    with Path(config.out).open("x", encoding="utf-8", errors="backslashreplace") as file:
        for completed in complete_lines(model, tokenizer, lines, config, config.batch_size, config.system):
            file.write(json.dumps(completed, ensure_ascii=False) + "\n")
            file.flush()
            total += 1
            if "error" in completed:
                wrong.append(f"{config.prompts}:{completed['line']}: {completed['error']}")
    print(f"{total - len(wrong)} of {counted(total, 'prompt')} completed: {config.out}")
    if wrong:
        raise UserError(f"{config.prompts} has lines that could not be completed:\n  {by_cause(wrong, total)}")


if __name__ == "__main__":
    command(main, GenerateConfig, __doc__)
