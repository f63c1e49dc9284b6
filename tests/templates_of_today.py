"""Published chat templates that render an assistant's turn differently when more follows, or that know tools, from TRL."""

from pathlib import Path

import trl

PUBLISHED = Path(trl.__file__).parent / "chat_templates"


def published(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text()


QWEN3, QWEN3_5 = published("qwen3"), published("qwen3_5_think")
DEEPSEEK = published("deepseek_r1_distill").replace("<｜end▁of▁sentence｜>", "<|im_end|>")  # which test tokenizers have
HERMES = published("qwen2_5")
"""Tools, and no reasoning."""
