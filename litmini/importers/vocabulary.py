"""Tokenizers from bare vocabularies: those of GGUF files, of SentencePiece models and of Meta's Llama 3.

The `tokenizers` package converts neither of the last two, and `tiktoken` only reads the two columns of a file of Llama 3.
"""

import base64
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from litmini.errors import UserError
from litmini.files import check_no_pointer, read_json, write_json
from litmini.tokenizer import byte_letters

NORMAL, UNKNOWN, SPECIAL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types, as SentencePiece numbers them
SPACE = "\u2581"


def byte_words(digits: str) -> Any:
    """Return the pre-tokenizer of Llama 3 and Qwen 2, which differ in how many `digits` make a word, for byte-level BPE."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r""
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])


def sentencepiece_like(
    tokens: list[str],
    types: list[int],
    unknown: int,
    space_prefix: bool,
    scheme: str | None = None,
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
    merges: list[tuple[str, str]] | None = None,
) -> tuple[Tokenizer, list[str]]:
    """Return a BPE over characters with byte fallback, as in Llama 1 and 2 and in Gemma.

    Where its merges are not stored: each token is what joining two others gives, and earlier tokens are joined first.
    Scores say the same, but converters overwrite those of added tokens, so the order decides.

    Args:
        space_prefix: whether a space is put before a text (Llama), or not (Gemma).
        scheme: of transformers 5: "first", or after each special token, too ("always"), but before no space; None: that of
            SentencePiece, which knows no special tokens in a text.
        before, after: normalizers of a text before its spaces are replaced, and of what has them replaced.

    Returns:
        the tokenizer, and the tokens with spaces as it writes them.
    """
    tokens = [t.replace(" ", SPACE) if kind == ADDED else t for t, kind in zip(tokens, types, strict=True)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"of {len(tokens)} tokens only {len(vocab)} differ")
    if merges is None:
        merges = _merges(vocab, [t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, ADDED)])
    bpe = models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix and scheme is not None:
        tokenizer.normalizer = normalizers.Sequence([*before, *after]) if before or after else None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        back.append(decoders.Strip(" ", 1, 0))
    elif space_prefix:
        prefix = normalizers.Prepend(SPACE)  # before characters are dropped, but after spaces are
        first = [*before, prefix] if after else [prefix, *before]
        tokenizer.normalizer = normalizers.Sequence([*first, replace, *after])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Sequence([*before, replace, *after]) if before or after else replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != ADDED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, SPECIAL, ADDED)
        ]
    )
    return tokenizer, tokens


def _merges(ranks: dict[Any, int], joined: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs that BPE joins into each of `joined`, in their order; of one token, pairs of lower ranks first."""
    merges = []
    for token in joined:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted((p for p in halves if p[0] in ranks and p[1] in ranks), key=lambda p: [ranks[h] for h in p])
    return merges


def add_ends(tokenizer: Tokenizer, bos: str | None = None, eos: str | None = None) -> None:
    """Make `tokenizer` put these tokens before and after every text."""
    before, after = [bos] if bos else [], [eos] if eos else []
    if before or after:
        single = [*before, "$A", *after]
        pair = [*single, *(f"{piece}:1" for piece in (*before, "$B", *after))]
        added = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=added)


def read_sentencepiece(file: Path, settings: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model, as in Llama 1 and 2, Mistral 7B and Gemma (the `convert` extra).

    Args:
        settings: of tokenizer_config.json; its `legacy` and `add_prefix_space` say where a space is put, as in transformers 5.

    Raises:
        UserError: it is damaged, or no BPE; or a package is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError:
        raise UserError(f'reading {file} needs sentencepiece and protobuf: pip install -e ".[convert]"') from None
    model: Any = ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
        tokens, types = [piece.piece for piece in model.pieces], [piece.type for piece in model.pieces]
        if model.trainer_spec.model_type != model.trainer_spec.BPE or UNKNOWN not in types:
            raise UserError(f"{file} is a SentencePiece model, but no BPE, the only supported kind.")
        rule = model.normalizer_spec
        before, after = _normalizers(rule)
        shape = (tokens, types, types.index(UNKNOWN))
        plain = sentencepiece_like(*shape, rule.add_dummy_prefix, None, before, after)[0]
        theirs = SentencePieceProcessor(model_proto=model.SerializeToString())
        if wrong := [text for text in HARD if plain.encode(text, add_special_tokens=False).ids != theirs.encode(text)]:
            raise UserError(
                f"{file} cannot be converted exactly: {wrong[0]!r} gets other tokens than from SentencePiece. Its rule for "
                f"normalization is {rule.name}."
            )
        if not settings:
            return plain
        prefix = rule.add_dummy_prefix and settings.get("add_prefix_space") is not False
        scheme = "always" if settings.get("legacy") else "first"
        return sentencepiece_like(*shape, prefix, scheme, before, after)[0]
    except (DecodeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} is no SentencePiece model, or damaged ({error}).") from None


def _normalizers(rule: Any) -> tuple[list[Any], list[Any]]:
    """Return what a SentencePiece model does to a text before its spaces are replaced, and after: characters and white space.

    Its table of characters (`precompiled_charsmap`) is known by name: `tokenizers` takes the shortest sequence in such a table
    where SentencePiece takes the longest.
    """
    before: list[Any] = []
    if rule.name == "nmt_nfkc":
        before = [normalizers.Replace(Regex(f"[{NMT_SPACE}]"), " "), normalizers.Replace(Regex(f"[{NMT_NOTHING}]"), "")]
        before += [normalizers.Replace("\uff5e", "\ufdd0"), normalizers.NFKC(), normalizers.Replace("\ufdd0", "\uff5e")]
    elif rule.name == "nfkc":
        before = [normalizers.NFKC()]
    if not rule.remove_extra_whitespaces:
        return before, []
    before += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return before, [normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), "")]


NMT_SPACE = "\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\ufeff\ufffd\u2581"
NMT_NOTHING = "\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f"
"""What the rule nmt_nfkc makes a space, or nothing, before NFKC; it keeps U+FF5E."""
HARD = (
    *(
        "",
        " ",
        "hello world",
        " hello",
        "hello  ",
        "  a   b ",
        "a\tb\nc\r\nd \n",
        "\u3000x\u00a0y",
        f"{SPACE}under {SPACE}",
    ),
    *(
        "\ufb01ne \uff11\uff12 \uff21 \uff5e",
        "\u00c5 A\u030a e\u0301 \u1e69 s\u0323\u0307",
        "\u00bd \u00b2 \u2122 \u2460",
    ),
    *("a\u200bb\u00adc\ufeff", "a\x01b\x7f", "stra\u00dfe \u0130 \u01c5", "\U0001f642 \U0001f469\u200d\U0001f467"),
    *(
        "\u65e5\u672c\u8a9e \uff76\uff9e",
        "\ud55c\uad6d \u1112\u1161\u11ab",
        "\u0915\u094d\u0937\u093f \u0e19\u0e49\u0e33",
    ),
)
"""Texts on which a converted tokenizer is compared with SentencePiece."""


def read_tiktoken(file: Path) -> Tokenizer:
    """Return the tokenizer of Meta's Llama 3 files: a line with base64 and rank for each token, and 256 special ones.

    Raises:
        UserError: it is something else.
    """
    try:
        lines = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        check_no_pointer(file)
        raise UserError(f"{file} is no tokenizer of Llama 3, or damaged ({error}).") from None
    letters = byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spell[a], spell[b]) for a, b in _merges(ranks, sorted(ranks, key=ranks.__getitem__))]
    tokenizer = Tokenizer(models.BPE({spell[t]: rank for t, rank in ranks.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_words(r"\p{N}{1,3}"), decoders.ByteLevel()
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
    names += ["eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    return tokenizer


def ensure_tokenizer(source: Path, target: Path) -> None:
    """Write tokenizer.json into `target`: the one of `source`, or one made from its tokenizer.model.

    Raises:
        UserError: there is neither.
    """
    here = [source, source.parent]  # Meta's Llama 2 keeps it above the directories of its sizes
    file = next((d / n for d in here for n in ("tokenizer.json", "tokenizer.model") if (d / n).is_file()), None)
    if file is None:
        raise UserError(f"{source} has neither tokenizer.json nor tokenizer.model; put one of them there.")
    for beside in (source / "tokenizer_config.json", source / "generation_config.json"):
        if beside.is_file():
            read_json(beside)  # refuses what is damaged
    if file.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            check_no_pointer(file)
            raise UserError(f"{file} is damaged: {error}") from None
        shutil.copyfile(file, target / file.name)
        return
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    for key in ("legacy", "add_prefix_space", "add_bos_token"):
        if settings.get(key) not in (None, True, False):
            raise UserError(f"{source / 'tokenizer_config.json'}: {key} = {settings[key]!r}, expected true or false.")
    if file.read_bytes()[:1] in (b"\n", b""):  # a protocol buffer that begins with a piece
        tokenizer, bos, ends = read_sentencepiece(file, settings), "<s>", ["</s>"]
    else:
        tokenizer, bos = read_tiktoken(file), "<|begin_of_text|>"
        ends = ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    if tokenizer.token_to_id(bos) is None:  # Gemma
        bos, ends = "<bos>", ["<eos>", "<end_of_turn>"]
    tokenizer = _add_tokens(tokenizer, source, settings)
    add_ends(tokenizer, bos if settings.get("add_bos_token", True) else None)
    tokenizer.save(str(target / "tokenizer.json"))
    if not settings:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": ends[0]}
        write_json(target / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    if not (source / "generation_config.json").is_file():
        stops = [i for i in map(tokenizer.token_to_id, ends) if i is not None]
        ids = {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": stops if len(stops) > 1 else stops[0]}
        write_json(target / "generation_config.json", ids)


def _add_tokens(tokenizer: Tokenizer, source: Path, settings: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer with the tokens of added_tokens.json and of tokenizer_config.json's added_tokens_decoder.

    They have the ids of these files, between which there may be gaps.

    Raises:
        UserError: an entry is damaged, or has the id of another token.
    """
    file = source / "added_tokens.json"
    found: dict[int, AddedToken] = {}
    try:
        if file.is_file():
            found = {int(i): AddedToken(token, special=True, normalized=False) for token, i in read_json(file).items()}
        file = source / "tokenizer_config.json"
        for i, entry in (settings.get("added_tokens_decoder") or {}).items():
            how = {key: entry.get(key, False) for key in ("special", "lstrip", "rstrip", "single_word")}
            found[int(i)] = AddedToken(entry["content"], normalized=False, **how)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{file}: its added tokens are damaged ({type(error).__name__}: {error}).") from None
    content = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = content["model"]["vocab"]
    tokens = {i: token for token, i in vocab.items()}
    for i, token in found.items():
        if tokens.get(i, token.content) != token.content or vocab.get(token.content, i) != i or i < 0:
            raise UserError(f"{source}: the added token {token.content!r} has id {i}, which is another token's.")
        vocab[token.content] = i
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([token for _, token in sorted(found.items())])
    return tokenizer
