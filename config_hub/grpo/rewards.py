"""The reward of config_hub/quickstart_grpo.yaml: the right city, and little else."""

import re
from typing import Any


def right_and_short(prompt: Any, completion: str, record: dict[str, Any]) -> float:
    """Return 0 without the right answer, else the share of the completion's words that it is: 1 if it stands alone."""
    words, answer = (re.findall(r"[\w'-]+", text.lower()) for text in (completion, record["answer"]))
    found = any(words[i : i + len(answer)] == answer for i in range(len(words)))
    return len(answer) / len(words) if found else 0.0
