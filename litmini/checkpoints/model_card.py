"""Publishes results: finds the checkpoint of a run, writes its model card, and uploads it to the hub on request."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from litmini.checkpoints.hf import check_checkpoint_dir
from litmini.checkpoints.peft import read_adapter
from litmini.errors import UserError
from litmini.files import read_json, write_atomically, write_json, write_text
from litmini.models.hf_config import towers_of
from litmini.tokenizer import Tokenizer

KEPT = ("litmini", "command", "method", "date", "versions", "hardware", "base", "data", "seed")
"""Keys of a run's manifest that a model card is made of."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Result(NamedTuple):
    """The result to write: a checkpoint, its adapter if there is one, and the run that made it."""

    checkpoint: Path
    adapter: Path | None
    run: Path | None
    """Directory with the manifest of its training."""


def resolve(path: str | Path, adapter: str | Path | None = None) -> Result:
    """Find the result at `path`: a checkpoint, a run's directory (its final/, else its last step-*), or an adapter.

    Raises:
        UserError: `path` is none of these, or the adapter's base does not exist.
    """
    found = Path(path)
    if (found / "config.yaml").is_file() and not (found / "config.json").is_file():
        steps = sorted((p for p in found.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        saved = [p for p in (found / "final", *reversed(steps)) if p.is_dir()]
        if not saved:
            raise UserError(f"the run in {found} has neither final/ nor step-*: nothing was saved yet.")
        found = saved[0]
    near = [
        Path(adapter or found).parent,
        found.parent,
        Path(adapter or found),
        found,
    ]  # an export has a manifest of its own
    run = next((d for d in near if (d / "manifest.json").is_file()), None)
    if adapter is None and (found / "adapter_config.json").is_file():
        base = Path(str(read_json(found / "adapter_config.json").get("base_model_name_or_path")))
        if not base.is_dir():
            raise UserError(
                f"{found} is an adapter, and its base {base} does not exist: give the base as the checkpoint, and "
                f"--adapter {found}."
            )
        return Result(base, found, run)
    return Result(found, Path(adapter) if adapter else None, run)


def export_adapter(checkpoint_dir: Path, adapter_dir: Path, out_dir: Path) -> Path:
    """Write an adapter alone, in PEFT's format, with its tokenizer and, if it is known, the base's name on the hub.

    Raises:
        UserError: `out_dir` exists, or the adapter is damaged.
    """
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; choose another --out_dir or remove it.")
    read_adapter(adapter_dir)
    settings = read_json(adapter_dir / "adapter_config.json")
    with write_atomically(out_dir, new=True) as aside:
        shutil.copyfile(adapter_dir / ADAPTER_FILES[1], aside / ADAPTER_FILES[1])
        write_json(aside / ADAPTER_FILES[0], settings | {"base_model_name_or_path": base_name(checkpoint_dir)})
        tokenized = adapter_dir if (adapter_dir / "tokenizer.json").is_file() else checkpoint_dir
        Tokenizer(tokenized).save(aside)
    return out_dir


def base_name(checkpoint_dir: Path) -> str:
    """Return the source of a checkpoint: its name on the hub, else its path."""
    file = checkpoint_dir / "source.json"
    source = str(read_json(file).get("source", "")) if file.is_file() else ""
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "pypi:"))
    return source if on_hub else str(checkpoint_dir)


def write_card(result: Result, out_dir: Path, name: str, adapter_kept: bool) -> None:
    """Write README.md into an export, and the part of the manifest that it is made of: an export of that one has it, too.

    The manifest's prompts and completions stay behind, since they are data.
    """
    manifest = read_json(result.run / "manifest.json") if result.run else {}
    write_text(out_dir / "README.md", model_card(result, name, adapter_kept))
    if manifest:
        kept = {key: manifest[key] for key in KEPT if key in manifest}
        kept["results"] = _figures(manifest.get("results", {}))
        kept["merged"] = manifest.get("merged", False) or (result.adapter is not None and not adapter_kept)
        write_json(out_dir / "manifest.json", kept)


def model_card(result: Result, name: str, adapter_kept: bool) -> str:
    """Return the README.md of a result: its base, training and measurements, from the run's manifest."""
    manifest: dict[str, Any] = read_json(result.run / "manifest.json") if result.run else {}
    base = base_name(Path(manifest.get("base", {}).get("checkpoint_dir") or result.checkpoint))
    takes = "image-text-to-text" if towers_of(read_json(result.checkpoint / "config.json")) else "text-generation"
    front = [f"library_name: {'peft' if adapter_kept else 'transformers'}", f"pipeline_tag: {takes}"]
    front += [f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() else []
    lines = ["---", *front, "tags:", "- litmini", "---", "", f"# {name}", ""]
    kind = "An adapter (PEFT's format) for" if adapter_kept else "A checkpoint made from"
    merged = (result.adapter and not adapter_kept) or manifest.get("merged")
    lines += [f"{kind} `{base}`" + (", with its adapter merged in." if merged else "."), ""]
    if not manifest:
        return "\n".join(lines)
    lines += ["## Training", "", f"    {shlex.join(manifest.get('command', []))}", ""]
    lines += [f"Method: {manifest['method']}.", ""] if manifest.get("method") else []
    lines += [f"Date: {manifest['date'][:10]}.", ""] if manifest.get("date") else []
    lines += ["| data | sha256 |", "|---|---|"]
    lines += [f"| `{Path(file).name}` | `{facts['sha256']}` |" for file, facts in manifest.get("data", {}).items()]
    lines += ["", f"Seed {manifest.get('seed')}. The chat template is that of training.", ""]
    if results := _figures(manifest.get("results", {})):
        when = ", before the adapter was merged" if merged else ""
        lines += [f"## Measured in training{when}", "", "| what | value |", "|---|---|"]
        lines += [f"| {key} | {_number(value)} |" for key, value in results.items()]
        lines += [""]
    versions = ", ".join(f"{key} {value}" for key, value in manifest.get("versions", {}).items())
    lines += [f"litmini {manifest.get('litmini')}; {versions}; {json.dumps(manifest.get('hardware', {}))}", ""]
    return "\n".join(lines)


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if not isinstance(value, (list, dict))}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def push(directory: Path, repo: str, private: bool) -> str:
    """Upload a directory to the hub as one commit, and return its URL. The hub's client finds the user's token.

    Raises:
        UserError: the hub cannot be reached, or refuses the upload.
    """
    from huggingface_hub import HfApi

    from litmini.hub_errors import hub_reason

    if not (directory / ADAPTER_FILES[0]).is_file():
        check_checkpoint_dir(directory)
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=directory, commit_message=f"{directory.name}, by litmini")
    except Exception as error:  # the hub's client and its transports raise many types
        raise UserError(f"{directory} is written, but not on the hub: {hub_reason(error, repo)}") from error
    return str(done.commit_url)
