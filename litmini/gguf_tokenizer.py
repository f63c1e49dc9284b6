"""The tokenizer, chat template and stop tokens of a GGUF file, as the files of a Hugging Face directory.

What each value of `tokenizer.ggml.pre` means: llama.cpp's `src/llama-vocab.cpp`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from litmini.config import UserError
from litmini.files import write_json

if TYPE_CHECKING:
    from litmini.gguf_import import Metadata


class Words(NamedTuple):
    """How text is cut into words before byte-level BPE, and what llama.cpp assumes where a file does not say."""

    split: Any
    ignore_merges: bool = False
    add_bos: bool = False


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # tokenizer.ggml.pre; no row for "default", which is llama.cpp's word for not knowing
    "gpt-2": Words(_GPT2),
    "smollm": Words(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    "llama-bpe": Words(pre_tokenizers.Sequence([pre_tokenizers.Split(_LLAMA3, "isolated"), _BYTES]), True, True),
}
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's names -> Hugging Face's
STOPS = ("eos", "eot", "eom")
SPECIAL, ADDED = 3, 4  # tokenizer.ggml.token_type


def write_tokenizer(metadata: Metadata, directory: Path, max_length: int) -> dict[str, Any]:
    """Write the tokenizer, chat template and generation settings; returns the ids that `config.json` shall name."""
    file, kind, pre = metadata.file, metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(f"{file}: tokenizer model '{kind}' is not supported; there is: gpt2 (byte-level BPE).")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{file}: pre-tokenizer '{pre}' is not supported; there are: {', '.join(PRE_TOKENIZERS)}.")
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise UserError(f"{file}: tokenizer.ggml.add_space_prefix = True is not supported.")
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in (*ROLES, *STOPS)}
    ids = {role: number for role, number in ids.items() if number is not None}
    if (
        len(set(tokens)) != len(tokens)
        or len(types) != len(tokens)
        or not all(0 <= i < len(tokens) for i in ids.values())
    ):
        raise UserError(
            f"{file}: its {len(tokens)} tokens, {len(types)} token types and special ids {ids} do not agree."
        )
    tokenizer = _build_tokenizer(metadata, tokens, types, ids)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    special = {f"{name}_token": tokens[ids[role]] for role, name in ROLES.items() if role in ids}
    write_json(directory / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False, **special})
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    stops = list(dict.fromkeys(ids[role] for role in STOPS if role in ids))
    generation = {"bos_token_id": ids.get("bos"), "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    generation["pad_token_id"] = ids.get("padding")
    write_json(directory / "generation_config.json", generation)
    return generation


def _build_tokenizer(metadata: Metadata, tokens: list[str], types: list[int], ids: dict[str, int]) -> Tokenizer:
    file, words = metadata.file, PRE_TOKENIZERS[metadata.get("tokenizer.ggml.pre")]
    merges = [tuple(merge.split(" ")) for merge in metadata.need("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words.ignore_merges))
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{file}: its tokens and merges make no tokenizer ({error}).") from None
    tokenizer.pre_tokenizer, tokenizer.decoder = words.split, decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type == SPECIAL, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (SPECIAL, ADDED)
        ]
    )
    ends: dict[str, list[str]] = {}
    for role, default in (("bos", words.add_bos), ("eos", False)):
        added = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
        if added and role not in ids:
            raise UserError(f"{file}: {role} is to be added to every text, but metadata has no id for it.")
        ends[role] = [tokens[ids[role]]] if added else []
    if ends["bos"] or ends["eos"]:
        single = [*ends["bos"], "$A", *ends["eos"]]
        pair = [*single, *(f"{piece}:1" for piece in (*ends["bos"], "$B", *ends["eos"]))]
        added = [(token, vocab[token]) for token in dict.fromkeys(ends["bos"] + ends["eos"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=added)
    return tokenizer
