"""Tokenizers built from GGUF metadata give the ids of the tokenizers that they came from.

The judges: the ids that llama.cpp's authors recorded from the original tokenizers for 47 texts,
SentencePiece's algorithm written down plainly, and llama.cpp itself where it is installed.
"""

import unicodedata
from itertools import pairwise
from pathlib import Path

import bpe_gguf
import numpy as np
import pytest
from edgemem.converters.checkpoint.gguf.metadata import Metadata
from edgemem.converters.checkpoint.gguf.tensors import GgufFile
from edgemem.converters.checkpoint.gguf.tokenizer import Vocabulary
from gguf import GGUFReader
from mixed_texts import mixed_texts

from edgemem.tokenizer import Tokenizer

NAMES = ("gpt-2", "llama-bpe", "llama-spm", "qwen2")
SEPARATOR = "\n__ggml_vocab_test__\n"
ALPHABETS = ("ab  \n\t", "the  quick'll 12 3456 ", "é漢字кот 😀‍🌫️", "=-_*.#▁ ", "\x00\u200d\ufeff~٣")
CHATS = {
    "llama-bpe": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "llama-spm": "<s>[INST] Hi [/INST]</s> x",
    "qwen2": "<|im_start|>user\nHi<|im_end|>\n",
}


@pytest.fixture(scope="module")
def tokenizers(shared):
    """tokenizers(name) → the path of a vocabulary and the tokenizer made of it, made once."""
    made = {}

    def tokenizer(name: str) -> tuple[Path, Tokenizer]:
        if name not in made:
            path = shared / "tokenizers" / f"ggml-vocab-{name}.gguf"
            file = GgufFile(path)
            vocabulary = Vocabulary(Metadata(path, file.metadata))
            file.close()
            made[name] = path, Tokenizer(vocabulary.tokenizer_json, vocabulary.config)
        return made[name]

    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_recorded_ids_are_exact(name, tokenizers):
    path, tokenizer = tokenizers(name)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split(SEPARATOR)
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        ids = [int(id) for id in line.split()]
        assert tokenizer.encode(text, special=False) == ids, text
        if name != "qwen2" or unicodedata.is_normalized("NFC", text):
            assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_texts_survive(name, tokenizers, rng):
    for text in random_texts(rng, 300):
        tokenizer = tokenizers(name)[1]
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_bos_comes_where_the_vocabulary_says(tokenizers):
    firsts = {name: tokenizers(name)[1].encode("Hi")[0] for name in NAMES}
    assert firsts["llama-bpe"] == 128000 and firsts["llama-spm"] == 1
    assert firsts["gpt-2"] == 17250 and firsts["qwen2"] == 13048


@pytest.mark.parametrize("name", CHATS)
def test_special_tokens_are_found_in_a_text(name, tokenizers):
    _, tokenizer = tokenizers(name)
    ids = tokenizer.encode(CHATS[name], special=False)
    marks = {"<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>"}
    for mark in marks:
        id = tokenizer.special_id(mark)
        assert (id in ids) == (id is not None and mark in CHATS[name]), mark


def random_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Texts of a few alphabets and runs of one character, in NFC, which qwen2 insists on."""
    texts = [character * n for character in " =-*.a▁" for n in (*range(1, 40), 100)]
    for _ in range(count):
        alphabet = list(ALPHABETS[int(rng.integers(len(ALPHABETS)))])
        repeats = rng.integers(1, 6, int(rng.integers(1, 25)))
        texts.append("".join(str(rng.choice(alphabet)) * int(n) for n in repeats))
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    return [text for text in texts if "▁" not in text]  # which SentencePiece takes for a space


# ---- SentencePiece -------------------------------------------------------------------------------


def sentence_piece(pieces: dict[str, tuple[int, float]], text: str) -> list[int]:
    """The algorithm of llama.cpp's llm_tokenizer_spm: join the neighbours of the best score."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [a + b for a, b in pairwise(symbols)]
        scored = [(-pieces[j][1], at) for at, j in enumerate(joined) if j in pieces]
        if not scored:
            break
        at = min(scored)[1]
        symbols[at : at + 2] = [joined[at]]
    ids = []
    for symbol in symbols:
        names = [symbol] if symbol in pieces else [f"<0x{b:02X}>" for b in symbol.encode()]
        ids += [pieces[name][0] for name in names]
    return ids


def test_sentence_piece_is_exact(tokenizers, rng, wikitext):
    path, tokenizer = tokenizers("llama-spm")
    fields = GGUFReader(path).fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    pieces = {text: (id, score) for id, (text, score) in enumerate(zip(texts, scores, strict=True))}
    prose = [wikitext[start : start + 120] for start in range(1000, 60_000, 1500)]
    for text in random_texts(rng, 400) + prose:
        if "<unk>" in text:  # a special token, which is found before anything is joined
            continue
        expected = sentence_piece(pieces, text)
        assert tokenizer.encode(text, special=False) == expected, text


# ---- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_gives_the_same_ids(name, tokenizers, rng, wikitext):
    path, tokenizer = tokenizers(name)
    judge = bpe_gguf.llama_cpp()(path)
    prose = [wikitext[start : start + 500] for start in range(1000, 200_000, 2500)]
    for text in random_texts(rng, 400) + mixed_texts(rng, 10_000) + prose + [CHATS.get(name, "")]:
        text = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        if "\x00" in text or "'\u017f" in text:  # the end in C; no s to llama.cpp
            continue
        assert tokenizer.encode(text, special=False) == judge(text, False), text
