"""The manifest of a run and of its checkpoints: versions, code, base model, template, data and seed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litmini.config.training import RunConfig
from litmini.errors import UserError
from litmini.files import read_json
from litmini.system import cpu_count, cpu_name
from litmini.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PACKAGES = ("torch", "lightning-fabric", "safetensors", "tokenizers", "jinja2", "numpy")
SAMPLES, SAMPLE = 256, 1 << 18
"""Number and bytes of the pieces of a weight file that are hashed: all of it up to 64 MiB."""


def describe_run(config: RunConfig, fabric: Fabric, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest of a run without its data: all that is known before they are read."""
    source = Path(config.base) / "source.json"
    return {
        "litmini": version("litmini"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "method": config.method,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git": git_state(Path.cwd()),
        "hardware": {
            "device": str(fabric.device),
            "processes": fabric.world_size,
            "name": device_name(fabric.device),
            "cores": cpu_count(),
            "machine": platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "base": {
            "checkpoint_dir": config.base,
            "source": read_json(source) if source.is_file() else None,
            "weights_sha256": weights_hash(Path(config.base)),
        },
        "chat_template_sha256": text_hash(tokenizer.chat_template),
        "began": tokenizer.template.began.isoformat() if tokenizer.template.began else None,
        "seed": config.seed,
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU, that trains."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def check_same(before: dict[str, Any], now: dict[str, Any], checkpoint: Path | None) -> None:
    """Raise UserError if template, base weights or data changed since the run of `checkpoint` began.

    Args:
        before, now: manifests; entries that only one of them has are not compared.
    """
    what = {"the chat template": ("chat_template_sha256",), "the base model's weights": ("base", "weights_sha256")}
    what |= {name: ("data", name, "sha256") for name in before.get("data", {})}
    for name, keys in what.items():
        then, today = _value(before, keys), _value(now, keys)
        if keys[0] in now and then is not MISSING and today is not MISSING and then != today:
            was = "were" if name.endswith("s") and keys[0] == "base" else "was"
            raise UserError(f"cannot resume {checkpoint}: {name} {was} changed since the run began.")


MISSING = object()


def _value(manifest: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        manifest = manifest.get(key, MISSING) if isinstance(manifest, dict) else MISSING
    return manifest


def text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def weights_hash(directory: Path) -> str:
    """Return one sha256 of a checkpoint's weight files: names, sizes and content; of large files, `SAMPLES` pieces.

    The pieces are enough, as training changes all weights, and hashing them takes no noticeable time.
    """
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):  # the first piece begins with the header, the last one ends the file
                opened.seek(i * max(0, size - SAMPLE) // (SAMPLES - 1) if size > SAMPLES * SAMPLE else i * SAMPLE)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def git_state(directory: Path) -> dict[str, Any] | None:
    """Return the commit and whether files differ from it; None if `directory` is in no repository or git is missing."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=directory, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
