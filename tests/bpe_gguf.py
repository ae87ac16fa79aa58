"""Vocabularies as GGUF files without weights, made for tests of tokenizers."""

from pathlib import Path

import gguf
import pytest
import tiny
from edgemem.converters.checkpoint.gguf.metadata import Metadata
from edgemem.converters.checkpoint.gguf.tensors import GgufFile
from edgemem.converters.checkpoint.gguf.tokenizer import Vocabulary
from gguf import TokenType

from edgemem.tokenizer import Tokenizer

LETTERS = dict(enumerate(tiny.byte_letters()))
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def lettered(text: str) -> str:
    """A text as tokens of byte-level BPE have it: a letter for each byte."""
    return "".join(LETTERS[byte] for byte in text.encode())


def unlettered(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for."""
    return bytes(BYTES[letter] for letter in token)


def write(
    path: Path, tokens: list[str], merges=None, kind: str = "gpt2", pre: str | None = None,
    types: dict | None = None, scores=None, **keys,
) -> Path:  # fmt: skip
    """Write a vocabulary; `types` by token, `keys` are of tokenizer.ggml. Returns the path."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([(types or {}).get(token, TokenType.NORMAL) for token in tokens])
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def glue(text: str) -> tuple[list[str], list[str]]:
    """Tokens and merges with which every word of a text becomes one token, however it is split."""
    text = lettered(text)
    stops = range(2, len(text) + 1)
    merges = {
        f"{text[i:j]} {text[j:k]}": text[i:k]
        for size in stops
        for i, k in ((i, i + size) for i in range(len(text) - size + 1))
        for j in range(i + 1, k)
    }
    return list(dict.fromkeys([*LETTERS.values(), *merges.values()])), list(merges)


def made(path: Path) -> Tokenizer:
    """The tokenizer that is made of a file's vocabulary."""
    file = GgufFile(path)
    vocabulary = Vocabulary(Metadata(path, file.metadata))
    file.close()
    return Tokenizer(vocabulary.tokenizer_json, vocabulary.config)


def llama_cpp():
    """load(path) → llama.cpp's encode(text, special) → ids; skips where it is not installed."""
    try:
        import llama_cpp as library
    except ImportError:
        pytest.skip("llama-cpp-python is not installed: ids were not compared with llama.cpp's")

    def load(path: Path):
        model = library.Llama(str(path), vocab_only=True, verbose=False)
        return lambda text, special: model.tokenize(text.encode(), add_bos=special, special=True)

    return load
