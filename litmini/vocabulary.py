"""Tokenizers from bare vocabularies: tokens and their types, as GGUF files and SentencePiece models hold them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, SPECIAL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types, as SentencePiece numbers them
SPACE = "\u2581"


def sentencepiece_like(
    tokens: list[str], types: list[int], unknown: int, space_prefix: bool
) -> tuple[Tokenizer, list[str]]:
    """A BPE over characters with bytes for what it lacks, as in Llama 1 and 2 and in Gemma.

    Its merges are not stored anywhere: each token is what joining two others gives, and earlier tokens are joined first.
    Scores say the same, but converters overwrite those of added tokens, so the order is taken.

    Args:
        space_prefix: whether a text begins with a space that it does not have (Llama), or as it is (Gemma).

    Returns:
        the tokenizer, and the tokens with spaces as it writes them.
    """
    tokens = [t.replace(" ", SPACE) if kind == ADDED else t for t, kind in zip(tokens, types, strict=True)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"of {len(tokens)} tokens only {len(vocab)} differ")
    merges = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (NORMAL, ADDED):
            halves = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += sorted(
                (p for p in halves if p[0] in vocab and p[1] in vocab), key=lambda p: [vocab[h] for h in p]
            )
    bpe = models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
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


def add_ends(tokenizer: Tokenizer, bos: str | None = None, eos: str | None = None) -> None:
    """Let `tokenizer` put these tokens before and after every text."""
    before, after = [bos] if bos else [], [eos] if eos else []
    if before or after:
        single = [*before, "$A", *after]
        pair = [*single, *(f"{piece}:1" for piece in (*before, "$B", *after))]
        added = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=added)
