"""Which bytes a token stands for: half a character where the other half is another token's."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mizzen.runtime.engine.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_table(tokenizer: "Tokenizer") -> list[bytes] | None:
    """Return each token's bytes, or None when the vocabulary is not byte-level."""
    decoder = tokenizer.backend.decoder
    if decoder is None or "ByteLevel" not in repr(decoder):
        return None
    table = [b""] * tokenizer.vocab_size
    byte_of = {char: byte for byte, char in _byte_alphabet().items()}
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index in tokenizer.special_ids:
            continue
        try:
            table[index] = bytes(byte_of[char] for char in token)
        except KeyError:  # an added token in plain text
            table[index] = token.encode()
    return table


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte.

    Source: openai/gpt-2, `bytes_to_unicode` in src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a SentencePiece vocabulary's piece."""
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(found[1])
    return piece.replace("▁", " ").encode()
