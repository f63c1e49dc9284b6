"""Download of checkpoints from the Hugging Face hub, through its own client.

The client reads HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME, resumes and verifies; no token passes through here.
"""

import contextlib
import fnmatch
import glob
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from litmini.checkpoints.hf import missing_files
from litmini.checkpoints.safetensors_io import shards
from litmini.errors import UserError
from litmini.files import write_atomically, write_json
from litmini.hub_errors import hub_reason, is_unreachable
from litmini.side_files import SIDE_FILES
from litmini.staging import is_own_directory
from litmini.system import check_disk_space, is_disk_full
from litmini.templates.template import PROCESSOR_TEMPLATE

INDEX = "model.safetensors.index.json"
FILES = ["*.safetensors", INDEX, "config.json", PROCESSOR_TEMPLATE, *SIDE_FILES]
DUPLICATES = ["*/*", "consolidated*"]  # the same weights once more, in the layout of other programs
SPARE = 100 * 2**20  # bytes of disk to leave alone


def from_hub(repo: str, target: Path, revision: str | None) -> Path:
    """Fetch a checkpoint of the hub into `target`, whole or not at all; what was fetched before an interruption is kept.

    Raises:
        UserError: there is no such repository, or it cannot be reached, may not be read, is of no use here, is too large
            for the disk, or its checksums are wrong.
    """
    page = f"https://huggingface.co/{repo}"
    print(f"{target}: from the Hugging Face hub, {page} ({revision or 'main'})", flush=True)
    incomplete = None
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        wanted = _wanted(info.siblings or [], page)
        incomplete = target.with_name(f".{target.name}.{str(info.sha)[:12]}.incomplete")  # two commits never mix
        if os.path.lexists(incomplete) and not is_own_directory(incomplete):
            raise UserError(
                f"{incomplete} is no directory of yours, and the download would be written there; remove it."
            )
        _check_disk(wanted, incomplete)
        snapshot_download(
            repo, revision=info.sha, local_dir=incomplete, allow_patterns=FILES, ignore_patterns=DUPLICATES
        )
        _check_content(repo, info.sha, incomplete, page)
        if missing := [file.name for file in shards(incomplete) if not file.is_file()]:
            raise UserError(f"{page} lacks {', '.join(missing)}, which its {INDEX} names.")
    except UserError:
        raise
    except Exception as error:  # the hub's client and its transports raise many kinds
        if is_disk_full(error):
            raise
        if is_unreachable(error) and (cached := _cached(repo, revision)):
            return _from_cache(cached, target, repo, revision)
        kept = " What was fetched is kept: the same command resumes." if incomplete and incomplete.exists() else ""
        raise UserError(hub_reason(error, repo, revision) + kept) from error
    with write_atomically(target) as fresh:
        for file in incomplete.iterdir():
            if file.is_file():
                _link(file, fresh / file.name)
        write_json(fresh / "source.json", {"source": repo, "revision": revision or "main", "commit": info.sha})
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}.incomplete"):
        if is_own_directory(leftover):  # nothing is deleted through a link
            shutil.rmtree(leftover)
    return target


def _wanted(siblings: list[Any], page: str) -> list[Any]:
    """Return the files to fetch, of all that the hub lists."""
    names = {file.rfilename for file in siblings}
    for name in sorted(names):
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise UserError(f"{page} lists a file outside its directory: {name!r}. Nothing was downloaded.")
    if missing := [name for name in ("config.json", "tokenizer.json") if name not in names]:
        raise UserError(f"{page} has no {' and no '.join(missing)}; litmini needs both. Choose another model.")
    if not names & {"model.safetensors", INDEX}:
        bins = "; its .bin files can be converted: fetch them, then scripts/convert_to_litmini.py" * any(
            name.endswith(".bin") for name in names
        )
        raise UserError(f"{page} has no model.safetensors{bins}. Or choose another model.")
    return [
        file
        for file in siblings
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in FILES)
        and not any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in DUPLICATES)
    ]


def _check_disk(wanted: list[Any], incomplete: Path) -> None:
    """Check before anything is fetched that the disk holds the rest."""
    fetched = sum(file.stat().st_size for file in incomplete.rglob("*") if file.is_file())
    needed = sum(file.size or 0 for file in wanted) - fetched
    check_disk_space(incomplete, needed, SPARE)


def _check_content(repo: str, revision: str | None, directory: Path, page: str) -> None:
    """Compare checksums with the hub's; a damaged file is removed, so that the next run fetches it again."""
    mismatches = HfApi().verify_repo_checksums(repo, revision=revision, local_dir=directory).mismatches
    for file in mismatches:
        (directory / file["path"]).unlink()
        for leftover in (directory / ".cache").rglob(f"{file['path']}.*"):
            leftover.unlink()
    if wrong := [f"{f['path']} has checksum {f['actual'][:12]}, the hub says {f['expected'][:12]}" for f in mismatches]:
        raise UserError(f"{page} came damaged: {'; '.join(wrong)}. Those files were removed; run the command again.")


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the directory of a repository in the cache of the hub's client, if it is complete."""
    with contextlib.suppress(Exception):
        directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return None if missing_files(directory) else directory
    return None


def _from_cache(cached: Path, target: Path, repo: str, revision: str | None) -> Path:
    print(f"the hub cannot be reached; {cached} has it, from an earlier download", flush=True)
    names = [file.name for file in cached.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in FILES)]
    with write_atomically(target) as fresh:
        for name in names:
            shutil.copyfile(cached / name, fresh / name)
        source = {"source": repo, "revision": revision or "main", "commit": cached.name, "from_cache": True}
        write_json(fresh / "source.json", source)
    return target


def _link(file: Path, name: Path) -> None:
    """Give `file` a second name, so that an interruption before the end loses no download."""
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        file.rename(name)
