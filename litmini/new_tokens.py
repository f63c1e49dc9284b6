"""New tokens of a vocabulary, in `tokenizer.json` and beside it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from litmini.errors import UserError


class NewTokens(NamedTuple):
    """Tokens that were added to a tokenizer."""

    ids: list[int]
    """Of all that were asked for; those below `known` were there before."""
    known: int
    """Number of ids before."""
    entries: list[dict[str, Any]]
    """What `tokenizer.json` says of those that it had not as added tokens."""


def new_tokens(file: str, tokens: Sequence[str], template: str) -> NewTokens:
    """Return the ids of `tokens` in a tokenizer that has them, too.

    Those that the chat template writes are special: text that looks like them is text. The others are tokens wherever they
    stand.

    Args:
        file: the content of tokenizer.json.

    Raises:
        UserError: a token is empty or occurs twice, or the vocabulary has a gap where they would stand.
    """
    if wrong := [repr(token) for token in tokens if not token.strip() or tokens.count(token) > 1]:
        raise UserError(f"new_tokens has {wrong[0]}, expected different tokens that are no white space.")
    fast = Tokenizer.from_str(file)
    before, added = set(fast.get_vocab().values()), fast.get_added_tokens_decoder()
    there = {token.content for token in added.values()}
    made = [AddedToken(token, normalized=False, special=token in template) for token in tokens if token not in there]
    old = {token.content: fast.token_to_id(token.content) for token in made}
    fast.add_tokens(made)
    vocabulary = fast.get_vocab()
    ids = {token: vocabulary[token] for token in tokens}
    if clash := [token for token in old if old[token] is None and ids[token] in before]:
        raise UserError(
            f"the token {clash[0]} would get the id {ids[clash[0]]}, which another token has: the vocabulary of this "
            f"tokenizer has gaps, and no token can be added to it."
        )
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    entries = [{"id": ids[token.content], **{key: getattr(token, key) for key in fields}} for token in made]
    return NewTokens([ids[token] for token in tokens], max(before) + 1, sorted(entries, key=lambda entry: entry["id"]))


def with_tokens(file: str, entries: list[dict[str, Any]]) -> str:
    """Return the content of tokenizer.json with more added tokens."""
    content = json.loads(file)
    content["added_tokens"] = sorted([*(content.get("added_tokens") or []), *entries], key=lambda entry: entry["id"])
    return json.dumps(content, ensure_ascii=False, indent=2)


def with_settings(settings: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokenizer_config.json with the tokens of `entries`, where it lists added tokens."""
    if "added_tokens_decoder" not in settings:
        return settings
    decoder = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
    return {**settings, "added_tokens_decoder": {**settings["added_tokens_decoder"], **decoder}}
