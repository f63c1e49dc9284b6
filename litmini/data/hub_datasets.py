"""Data sets of the Hugging Face hub: which files of a repository are meant, and their copies on this disk."""

import re
from pathlib import PurePosixPath

from litmini.errors import UserError
from litmini.system import is_disk_full

PREFIX = "hub:"
NAME = re.compile(r"hub:(?P<repo>[^/@:]+/[^/@:]+)(/(?P<folder>[^@:]+))?(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")
KINDS = (".parquet", ".jsonl", ".csv", ".json")  # of a repository, the first kind that it has is read
SPLITS = ("train", "test", "valid", "val", "dev", "eval")  # beginnings of names of splits


def find_files(path: str) -> dict[str, str]:
    """Return the files of a data set, downloaded: the name of each in the manifest -> its path on this machine.

    Args:
        path: hub:ORG/NAME[/FOLDER][@REVISION][:SPLIT].

    Raises:
        UserError: the repository cannot be read, or it is not clear which of its files are meant.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from litmini.hub_errors import hub_reason

    if not (name := NAME.fullmatch(path)):
        raise UserError(f"{path}: expected hub:ORG/NAME[/FOLDER][@REVISION][:SPLIT]")
    repo, revision = name["repo"], name["revision"]
    try:
        info = HfApi().dataset_info(repo, revision=revision)
        existing = [file.rfilename for file in info.siblings or ()]
        chosen = choose_files(existing, name["folder"] or "", name["split"] or "train", path)
        return {
            f"{PREFIX}{repo}/{file}": hf_hub_download(repo, file, repo_type="dataset", revision=info.sha)
            for file in chosen
        }
    except UserError:
        raise
    except Exception as error:  # the hub's client and its transports raise many kinds
        if is_disk_full(error):
            raise
        raise UserError(hub_reason(error, f"datasets/{repo}", revision)) from error


def choose_files(existing: list[str], folder: str, split: str, what: str) -> list[str]:
    """Return those of a repository's files that hold a split, sorted.

    Raises:
        UserError: no file does, or they are of several data sets.
    """
    inside = [file for file in existing if not folder or file == folder or file.startswith(f"{folder}/")]
    kind = next((kind for kind in KINDS if any(file.endswith(kind) for file in inside)), None)
    files = sorted(file for file in inside if kind and file.endswith(kind))
    if not files:
        raise UserError(
            f"{what}: found no {', '.join(KINDS)} file, but {', '.join(sorted(existing)[:8]) or 'nothing'}. The hub itself "
            f"may have converted it to Parquet: {PREFIX}ORG/NAME@refs/convert/parquet"
        )
    splits = {word for file in files for word in _words(file) if word.startswith(SPLITS)}
    if splits or split != "train":
        if split not in splits:
            raise UserError(f"{what}: no split '{split}', found: {', '.join(sorted(splits)) or 'no splits'}.")
        files = [file for file in files if split in _words(file)]
    folders = sorted({str(PurePosixPath(file).parent) for file in files})
    if len(folders) > 1 and not folder:
        raise UserError(
            f"{what} holds several data sets: {', '.join(folders)}. Name one: {PREFIX}ORG/NAME/{folders[0]}"
        )
    return files


def _words(file: str) -> list[str]:
    return re.split(r"[^a-z0-9_]+", file.lower())
