"""The bytes of single tokens: a character may be spread over several, and a word's token begins with its space."""

import re

from litmini.tokenizer import Tokenizer, byte_letters


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that a token id stands for; none for an id beyond the tokenizer's vocabulary."""
    written = tokenizer.fast.id_to_token(token)
    if written is None:
        return b""
    decoder = b"" if tokenizer.fast.decoder is None else tokenizer.fast.decoder.__getstate__()
    letters = {letter: byte for byte, letter in enumerate(byte_letters())} if b'"ByteLevel"' in decoder else {}
    if token not in tokenizer.added_ids and written and all(letter in letters for letter in written):
        return bytes(letters[letter] for letter in written)
    if b'"ByteFallback"' in decoder and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", written)):
        return bytes([int(byte[1], 16)])
    return (written if letters else written.replace("\u2581", " ")).encode()  # SentencePiece's space


def token_text(content: bytes) -> str:
    r"""Return the text of a token's bytes; for part of a character its bytes as OpenAI writes them, such as `\xf0\x9f`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)
