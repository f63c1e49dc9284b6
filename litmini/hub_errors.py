"""Errors of the Hugging Face hub's client in words: the cause, and what to do about it."""

import contextlib
import difflib

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def is_unreachable(error: Exception) -> bool:
    """Return whether `error` says that there is no network, rather than what the hub answered."""
    kinds = (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    return isinstance(error, kinds) and not isinstance(error, HfHubHTTPError)


def hub_reason(error: Exception, repo: str, revision: str | None = None) -> str:
    """Return the cause of `error` and what to do about it, in one line."""
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then {log_in}."
    if isinstance(error, RepositoryNotFoundError):
        near = [] if repo.startswith("datasets/") else _nearest(repo)
        hint = f" Near it: {', '.join(near)}." if near else ""
        return (
            f"{repo} is not on the Hugging Face hub, or private: check the spelling; if it is private, {log_in}.{hint}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo} has no revision '{revision}'; see https://huggingface.co/{repo}/tree/main for the existing ones."
        )
    detail = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            return f"the Hugging Face hub does not accept the token that is set: {log_in} again."
        if status == 403:
            return f"the Hugging Face hub refuses {repo}: the token may not do this. Check its rights, or {log_in}."
        if status == 429:
            wait = error.response.headers.get("Retry-After")
            after = f" in {wait} seconds" if wait else " in a few minutes"
            return f"the Hugging Face hub is asked too often (429): try again{after}; {log_in} for a higher limit."
        return f"the Hugging Face hub did not give {repo}: {detail}"
    if is_unreachable(error):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no network, or a proxy is needed: {detail}"
        return f"the Hugging Face hub cannot be reached ({cause})."
    return f"{repo}: {type(error).__name__}: {detail}."


def _nearest(repo: str) -> list[str]:
    """Return the names on the hub that are most like `repo`."""
    author, name = repo.split("/")
    names: list[str] = []
    with contextlib.suppress(Exception):  # a hint only
        names += [model.id for model in HfApi().list_models(author=author, limit=200)]
        names += [model.id for model in HfApi().list_models(search=name, limit=50)]
    return difflib.get_close_matches(repo, dict.fromkeys(names), n=3, cutoff=0.5)
