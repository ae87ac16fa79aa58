"""The vocabulary of synthetic checkpoints: bytes, and padding up to the size of their tables."""

import json

_SPECIALS = ("<s>", "</s>")


def tokenizer_json() -> bytes:
    """A vocabulary of bytes: enough for a checkpoint that is fed token ids."""
    vocab = {token: i for i, token in enumerate(tokens())}
    special = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip
    return json.dumps({
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **special} for i, t in enumerate(_SPECIALS)],
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }).encode()  # fmt: skip


def tokens() -> list[str]:
    """The tokens that mean something; the rest of a vocabulary is padding."""
    return [*_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
