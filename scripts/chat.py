"""Chat with a model in the terminal.

    python scripts/chat.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

/help lists the commands; Ctrl-C stops a completion, Ctrl-D ends the program.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litmini.cli import command
from litmini.config.generate import ModelConfig, SamplingConfig
from litmini.errors import UserError, counted
from litmini.settings import Text

HELP = {
    "/help": "list the commands",
    "/reset": "start a new conversation",
    "/save FILE": "write the conversation as one line of messages JSONL, which finetuning reads",
    "/quit": "end the program, as Ctrl-D does",
}
COMMANDS = ", ".join(HELP)


@dataclass(kw_only=True)
class ChatConfig(SamplingConfig, ModelConfig):
    """Settings of chat.py."""

    max_new_tokens: int = 1024
    """Longest completion in tokens."""
    system: Text | None = None
    """System turn before the conversation."""
    history: str | None = None
    """File of messages, as /save writes it, to continue from."""


def main(config: ChatConfig) -> None:
    import contextlib

    from litmini.distributed.fabric import keep_memory
    from litmini.generation.generate import open_model, stream_text
    from litmini.generation.packed_linear import pack_linears
    from litmini.generation.prompts import check_text
    from litmini.generation.request import Request
    from litmini.system import has_colors

    with contextlib.suppress(ImportError):  # arrow keys and earlier lines, on systems that have readline
        import readline  # noqa: F401
    if sys.stdin is None:
        raise UserError("standard input is closed; expected a terminal to read your turns from.")
    before = start(config)
    keep_memory()
    model, tokenizer = open_model(config)
    pack_linears(model)
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.directory} has no chat template; give one with --chat_template FILE.jinja")
    bold, plain = ("\033[1m", "\033[0m") if has_colors(sys.stderr) else ("", "")
    over = f" with {config.adapter_dir}" if config.adapter_dir else ""
    name = Path(config.checkpoint_dir).resolve().name
    print(f"{bold}{name}{over}{plain}: /help lists the commands; Ctrl-C stops a completion.", file=sys.stderr)
    # readline must not count what a terminal does not show
    prompt = "\001\033[32m\002> \001\033[0m\002" if has_colors(sys.stdout) and "readline" in sys.modules else "> "
    messages = list(before)
    while True:
        try:
            said = input(prompt).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt: an empty line, as in a shell
            print()
            continue
        if not said:
            continue
        try:
            if said.startswith("/"):
                if said == "/quit":
                    return
                messages = obey(said, messages, before)
                continue
            asked = [*messages, {"role": "user", "content": check_text(said)}]
            reply = Request(tokenizer.encode_prompt(asked), config, tokenizer.stop_ids, tokenizer)
            with contextlib.suppress(KeyboardInterrupt):
                for piece in stream_text(model, reply):
                    print(piece, end="", flush=True)
            print(flush=True)
            messages = [*asked, {"role": "assistant", "content": reply.text}]
        except UserError as error:  # the conversation continues without this turn
            print(f"error: {error}", file=sys.stderr)


def start(config: ChatConfig) -> list[dict[str, Any]]:
    """Return the messages before the first turn."""
    from litmini.generation.prompts import read_prompts

    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    if config.history is None:
        return system
    lines = list(read_prompts(config.history))
    if len(lines) != 1:
        raise UserError(
            f"{config.history} holds {counted(len(lines), 'conversation')}, expected one, as /save writes it."
        )
    if isinstance(lines[0].prompt, UserError):
        raise UserError(f"{config.history}: {lines[0].prompt}")
    messages = lines[0].prompt
    return system + ([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)


def obey(said: str, messages: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run a command, a line that begins with /; return the messages to continue with."""
    import json

    word, _, rest = said.partition(" ")
    if word == "/help":
        print("\n".join(f"{name:11} {what}" for name, what in HELP.items()), file=sys.stderr)
        return messages
    if word == "/reset":
        return list(before)
    if word == "/save" and rest:
        path = Path(rest.strip())
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{error.strerror}: {path}") from None
        print(f"{counted(len(messages), 'message')} in {path}", file=sys.stderr)
        return messages
    raise UserError(f"{word} is not a command; the commands are: {COMMANDS}.")


if __name__ == "__main__":
    command(main, ChatConfig, __doc__)
