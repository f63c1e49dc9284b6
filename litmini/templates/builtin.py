"""Chat templates by name, for base models that have none. The one that is used is saved with the result."""

import json
from pathlib import Path
from typing import NamedTuple

from litmini.errors import UserError

ROLES = (
    "{%- if m['role'] not in ROLES %}{{ raise_exception('no place for the role ' + m['role']) }}{% endif %}"
    "{%- if m['tool_calls'] %}{{ raise_exception('no place for tool_calls') }}{% endif %}"
)


class BuiltinTemplate(NamedTuple):
    """A template, and the texts in it that have to be tokens."""

    text: str
    tokens: tuple[str, ...] = ()


def _loop(roles: str, body: str) -> str:
    """Return a template that writes `body` for each message `m` of one of `roles`."""
    return "{%- for m in messages %}" + ROLES.replace("ROLES", str(roles.split())) + body + "{%- endfor %}"


BUILTIN = {
    "chatml": BuiltinTemplate(
        _loop("system user assistant tool", "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}")
        + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": BuiltinTemplate(
        _loop(
            "system user assistant tool",
            "{%- set role = 'ipython' if m['role'] == 'tool' else m['role'] %}"
            "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}",
        )
        + "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": BuiltinTemplate(  # the system's text stands in the user's turn, as in Gemma 3's
        "{%- set ns = namespace(system='') %}"
        + _loop(
            "system user assistant",
            "{%- if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] | trim + '\n\n' %}"
            "{%- elif m['role'] == 'user' %}"
            "{{ '<start_of_turn>user\n' + ns.system + m['content'] | trim + '<end_of_turn>\n' }}{% set ns.system = '' %}"
            "{%- else %}{{ '<start_of_turn>model\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}",
        )
        + "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "alpaca": BuiltinTemplate(
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}"
        "{%- endif %}"
        + _loop(
            "system user assistant",
            "{%- if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
            "{%- elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
            "{%- else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}",
        )
        + "{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "zephyr": BuiltinTemplate(
        _loop("system user assistant", "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}")
        + "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
}
BOS = "{{- bos_token }}"
"""What stands before a template where the tokenizer puts BOS before a text."""
NAMES = ", ".join(BUILTIN)


def check_builtin(choice: str, directory: Path, special: set[str], eos_token: str | None) -> None:
    """Raise a UserError if `choice` is a template by name, and the tokenizer of `directory` lacks tokens for it.

    Args:
        special: its special tokens.
    """
    if choice not in BUILTIN:
        return
    if lost := [token for token in BUILTIN[choice].tokens if token not in special]:
        raise UserError(
            f"the chat template {choice} needs the special tokens {', '.join(lost)}, which {directory} has not: add them with "
            f"--data.new_tokens '{json.dumps(lost)}', or choose alpaca or zephyr, which need none."
        )
    if not BUILTIN[choice].tokens and eos_token is None:
        raise UserError(f"the chat template {choice} ends turns with eos_token, which {directory} does not name.")
