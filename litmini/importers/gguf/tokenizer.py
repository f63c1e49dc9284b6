"""The tokenizer, chat template and stop tokens of a GGUF file, as the files of a Hugging Face directory.

What each value of `tokenizer.ggml.pre` means: llama.cpp's `src/llama-vocab.cpp`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from litmini.errors import UserError
from litmini.files import write_json
from litmini.importers.gguf.reader import Metadata
from litmini.importers.vocabulary import ADDED, SPECIAL, add_ends, byte_words, sentencepiece_like


class Words(NamedTuple):
    """How text is split into words before byte-level BPE, and the defaults of llama.cpp."""

    split: Any
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: Any = None


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {  # tokenizer.ggml.pre; no row for "default", which is llama.cpp's word for not knowing
    "gpt-2": Words(_GPT2),
    "smollm": Words(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    "llama-bpe": Words(byte_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": Words(byte_words(r"\p{N}"), normalizer=normalizers.NFC()),
}
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's names -> Hugging Face's
STOPS = ("eos", "eot", "eom")


def write_tokenizer(metadata: Metadata, directory: Path, max_length: int) -> dict[str, Any]:
    """Write the tokenizer, chat template and generation settings; return the ids for `config.json`.

    Raises:
        UserError: the file's tokenizer is of a kind that is not implemented, or contradicts itself.
    """
    file = metadata.file
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    types = metadata.optional("tokenizer.ggml.token_type", [1] * len(tokens))
    numbers = {role: metadata.optional(f"tokenizer.ggml.{role}_token_id", -1) for role in (*ROLES, *STOPS)}
    ids = {role: number for role, number in numbers.items() if f"tokenizer.ggml.{role}_token_id" in metadata.fields}
    if len(types) != len(tokens) or not all(0 <= i < len(tokens) for i in ids.values()):
        raise UserError(
            f"{file}: its {len(tokens)} tokens, {len(types)} token types and special ids {ids} do not agree."
        )
    try:
        tokenizer, tokens, add_bos = _build_tokenizer(metadata, tokens, types, ids)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{file}: its tokens and merges make no tokenizer ({error}).") from None
    ends: dict[str, str | None] = {}
    for role, default in (("bos", add_bos), ("eos", False)):
        added = metadata.optional(f"tokenizer.ggml.add_{role}_token", default)
        if added and role not in ids:
            raise UserError(f"{file}: {role} is to be added to every text, but metadata has no id for it.")
        ends[role] = tokens[ids[role]] if added else None
    add_ends(tokenizer, **ends)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    special = {f"{name}_token": tokens[ids[role]] for role, name in ROLES.items() if role in ids}
    write_json(directory / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False, **special})
    if template := metadata.optional("tokenizer.chat_template", ""):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    stops = list(dict.fromkeys(ids[role] for role in STOPS if role in ids))
    generation = {"bos_token_id": ids.get("bos"), "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    generation["pad_token_id"] = ids.get("padding")
    write_json(directory / "generation_config.json", generation)
    return generation


def _build_tokenizer(
    metadata: Metadata, tokens: list[str], types: list[int], ids: dict[str, int]
) -> tuple[Tokenizer, list[str], bool]:
    """Return the tokenizer, the names of its tokens, and whether BOS is added by default."""
    file, kind, pre = metadata.file, metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix")
    if prefix not in (None, True, False):
        raise UserError(f"{file}: tokenizer.ggml.add_space_prefix is {prefix!r}; expected true or false.")
    if kind == "llama":
        unknown = ids.get("unknown", 0)  # as llama.cpp has it
        tokenizer, tokens = sentencepiece_like(tokens, types, unknown, space_prefix=prefix is not False)
        return tokenizer, tokens, True
    if kind == "gemma4":  # the same with its merges, in which a space is no character
        stored = [
            (one[0] + a, b)
            for one in metadata.need("tokenizer.ggml.merges", list)
            for a, _, b in [one[1:].partition(" ")]
        ]
        tokenizer, tokens = sentencepiece_like(tokens, types, ids.get("unknown", 0), bool(prefix), merges=stored)
        return tokenizer, tokens, True
    if kind != "gpt2":
        raise UserError(
            f"{file}: tokenizer model '{kind}' is not supported; supported are: gpt2 (byte-level BPE), llama (like "
            f"SentencePiece) and gemma4."
        )
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{file}: pre-tokenizer '{pre}' is not supported; supported are: {', '.join(PRE_TOKENIZERS)}.")
    if prefix:
        raise UserError(f"{file}: tokenizer.ggml.add_space_prefix = True is not supported.")
    words = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in metadata.need("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{file}: its {len(tokens)} tokens are not all different: only {len(vocab)} are.")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words.ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = words.split, decoders.ByteLevel()
    if words.normalizer is not None:
        tokenizer.normalizer = words.normalizer
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type == SPECIAL, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (SPECIAL, ADDED)
        ]
    )
    return tokenizer, tokens, words.add_bos
