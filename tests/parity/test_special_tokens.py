"""Special and added tokens, byte fallback, what comes before and after a text: as llama.cpp."""

import itertools

import bpe_gguf
import numpy as np
import pytest
from gguf import TokenType
from mixed_texts import mixed_texts

TEXTS = 300
MARKS = ("<s>", "</s>", "<unk>", "[U]", "[UU]", "<unused>", "<0x41>", "  ", "\u2581")
TYPES = {
    "<s>": TokenType.CONTROL,
    "</s>": TokenType.CONTROL,
    "<unk>": TokenType.UNKNOWN,
    "[U]": TokenType.USER_DEFINED,
    "[UU]": TokenType.USER_DEFINED,
    "<unused>": TokenType.UNUSED,
}
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = (
    "\u2581",
    "a",
    "b",
    "ab",
    "\u2581a",
    "\u2581\u2581",
    "\u00e9",
    "\u2581the",
    "the",
    "th",
    "t",
    "h",
    "e",
)
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
SETS = [{name: flag} for name in FLAGS for flag in (False, True)]
SETS += [{}, dict.fromkeys(FLAGS, False), dict.fromkeys(FLAGS, True)]


def marked_texts(rng: np.random.Generator) -> list[str]:
    """Random texts with special tokens between their parts, at their ends, and alone."""
    texts = ["", *MARKS]
    for parts in zip(mixed_texts(rng, TEXTS), mixed_texts(rng, TEXTS)):
        marks = rng.choice(MARKS, 3).tolist()
        texts.append("".join(itertools.chain(*zip(marks, (*parts, "")))))
        texts.append(str(rng.choice([" the", "ab  ", "\u00e9a"])).join(marks))
    return texts


def compare(path, rng):
    """Ids of texts with and without what comes before and after them."""
    ours, theirs = bpe_gguf.made(path), bpe_gguf.llama_cpp()(path)
    for text, special in itertools.product(marked_texts(rng), (False, True)):
        assert ours.encode(text, special=special) == theirs(text, special), (ascii(text), special)


def test_sentence_piece(tmp_path, rng):
    types = TYPES | dict.fromkeys(FALLBACK, TokenType.BYTE)
    tokens = ["<unk>", "<s>", "</s>", *FALLBACK, "[U]", "[UU]", "<unused>", *PIECES]
    scores = [0.0] * 262 + [-float(id) for id, _ in enumerate(PIECES)]
    path = tmp_path / "m.gguf"
    for keys in SETS:
        compare(bpe_gguf.write(path, tokens, kind="llama", types=types, scores=scores, **keys), rng)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "starcoder", "gemma4"])
def test_merges(pre, tmp_path, rng):
    types, letters = TYPES, list(bpe_gguf.LETTERS.values())
    if pre == "gemma4":
        types, letters = TYPES | dict.fromkeys(FALLBACK, TokenType.BYTE), [*FALLBACK, *PIECES]
    tokens = ["<s>", "</s>", "<unk>", "[U]", "[UU]", "<unused>", *letters, "ab", "th", "the"]
    roles = {"bos_token_id": 0, "eos_token_id": 1, "unknown_token_id": 2}
    tokens, merges = list(dict.fromkeys(tokens)), ["a b", "t h", "th e"]
    for keys in SETS:
        path = tmp_path / "m.gguf"
        keys = keys | roles
        compare(bpe_gguf.write(path, tokens, merges, pre=pre, types=types, **keys), rng)
