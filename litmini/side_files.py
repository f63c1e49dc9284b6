"""The files beside the weights of a checkpoint that belong to them: tokenizer, template, generation settings, licence."""

import shutil
from pathlib import Path

from litmini.files import read_json, write_text
from litmini.templates.template import PROCESSOR_TEMPLATE

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
)


def copy_side_files(source: Path, target: Path, replace: bool = True) -> None:
    """Copy the files that belong to the weights: tokenizer, chat template, generation settings, licence."""
    for name in SIDE_FILES:
        if (source / name).is_file() and (replace or not (target / name).exists()):
            shutil.copyfile(source / name, target / name)
    template = target / "chat_template.jinja"
    if (source / PROCESSOR_TEMPLATE).is_file() and not template.exists():
        write_text(template, str(read_json(source / PROCESSOR_TEMPLATE).get("chat_template")))
