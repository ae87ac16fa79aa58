"""Random texts in which characters that tokenizers tell apart are neighbours."""

import functools
import unicodedata

import numpy as np

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "0123456789",
    "'", "sStTmMdD", " ", " ", "\n", "\r\n\t\v\f \u00a0\u3000\u2028\u0085",
    "!?.,;:-_/\\\"()[]{}@#%&*",
    "$+<=>^`|~", "\u2026\u3002\uff0c\u3001\u201c\u201d\u2018\u2019\u2014\u00bf\u0964\u06d4\u060c",
    "\u00a9\u00b0\u20ac\u2200\u2603", "\u00b2\u00bd\u2167\u0663\u096b\U0001d7d9", "漢字語一龥ぁかカー々",
    "가힣ㄱㆎᄀㄅ", "ไทยລາວខ្មែរမြန်", "жЖщЩéÉßøØ", "αΑώΏ", "ǅʰª", "\u0301\u0308\u093f\u20dd",
    "😀🚀\u200d\ufe0f🏽", "\u200b\ufeff\ue000\U000e0001", "\x01\x1b\x1f\x7f",
    "\u1f7d\u1fd3\u2126\u212a",
)  # fmt: skip
CHUNKS = (
    "'ll", "'RE", "'ve", "'s", "'D", "    ", "  ", "\n\n", " \n", "12345", "1234567", "Ab", "aB",
    "<sentinel:12>", "IMGIMGABZ", "IMGIMG", "?!", "x's", "...\n", "/\n", " the", "été", "ÉCOLE",
)  # fmt: skip


@functools.cache
def assigned() -> list[str]:
    """Characters that every version of Unicode since 3.2 has, in one category."""
    old = unicodedata.ucd_3_2_0
    characters = map(chr, range(1, 0x110000))
    return [
        c for c in characters
        if old.category(c) == unicodedata.category(c) and old.category(c) not in ("Cn", "Cs")
    ]  # fmt: skip


def mixed_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Texts in which characters that rules tell apart are neighbours."""
    some = assigned()
    texts = []
    for _ in range(count):
        parts = []
        alphabets = rng.integers(len(ALPHABETS), size=4)
        for _ in range(int(rng.integers(1, 12))):
            kind = rng.random()
            if kind < 0.25:
                parts.append(CHUNKS[int(rng.integers(len(CHUNKS)))])
            elif kind < 0.3:
                parts.append(some[int(rng.integers(len(some)))])
            else:
                alphabet = ALPHABETS[int(rng.choice(alphabets))]
                picks = rng.integers(len(alphabet), size=int(rng.integers(1, 5)))
                parts.append("".join(alphabet[int(i)] for i in picks))
        texts.append("".join(parts))
    return texts
