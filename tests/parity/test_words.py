"""How texts are split into words, for every name that `tokenizer.ggml.pre` may have.

The judge is llama.cpp, where it is installed: its ids for random texts, with a vocabulary whose
merges do not respect any words. What it splits in another way than the tokenizer that a rule is
from does is listed in DIFFERENT. The words of a few texts are written down (`word_cuts`).
"""

import functools
import json
import re
import unicodedata

import bpe_gguf
import numpy as np
import pytest
import tokenizers
import word_cuts
from edgemem.converters.checkpoint.gguf.words import BY_NAME
from gguf import TokenType
from mixed_texts import CHUNKS, mixed_texts
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from edgemem.tokenizer import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
TEXTS = 10_000
FEWER = 500
"""How many texts are compared for each rule, and for each of its names."""

RULES = {words.names.split()[0]: words for words in BY_NAME.values()}

NOT_ASCII = r"[[\p{Lu}\p{Lt}\p{Ll}]--[A-Za-z]]"
CASED = rf"\p{{M}}|\p{{L}}{NOT_ASCII}|{NOT_ASCII}\p{{L}}"
CAMELS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}][\p{Lu}\p{Lt}]"
SPACES = r"[\s--[\x00-\xff]]"
DIGITS = r"[\p{N}--[0-9]]"
DIFFERENT = {
    "tekken gpt-4o granite-embed-multi-97m": (
        CASED,
        "it tells capitals from small letters in ASCII only, and cuts off marks",
    ),
    "youtu": (CAMELS, "it does not tell capitals from small letters"),
    "tiny_aya": (
        rf"{CAMELS}|\s\s\p{{N}}|\p{{N}}[\w--\p{{N}}]|{DIGITS}",
        "as youtu; what is before digits goes with the first of them; digits of other scripts are "
        "no \\d, and a letter after digits is no boundary",
    ),
    "kimi-k2": (
        rf"{CAMELS}|\p{{M}}|"
        r"[\p{Han}--[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]]",
        "as youtu; it cuts off marks, and has a shorter list of Chinese characters",
    ),
    "falcon": (
        rf" [0-9]|[0-9]{DIGITS}|{DIGITS}[0-9]",
        "it leaves digits with a space before them, and with those of other scripts",
    ),
    "deepseek-llm": (rf"\p{{N}}\p{{N}}|{SPACES}", "it takes digits together; as deepseek-coder"),
    "deepseek-coder": (SPACES, "to ranges of characters, all spaces beyond ASCII are one"),
    "afmoe": (
        r"\s\s\p{N}|[\ua000-\uabff\ud7b0-\uf8ff]",
        "as tiny_aya; its range of rare Chinese characters begins too early",
    ),
    "superbpe": (r"[\p{Nd}--[0-9]]", "digits of other scripts are no \\d"),
}
"""By first names of rules: texts of which llama.cpp makes other words than the tokenizers that the
rules are from, and why."""
OLD_S = "'\u017f"
"""llama.cpp does not take this letter for an s, as expressions do that ignore case."""
BYTE_DIGITS = "\u00b2\u00b3\u00b9\u00bc\u00bd\u00be"
"""Letters of bytes that are digits to Falcon's tokenizer, not to llama.cpp."""


@pytest.fixture(scope="module")
def vocabularies() -> dict[bool, tuple[list[str], list[str]]]:
    """Tokens and merges that were counted in texts as they are, so that they cross all words, and
    words that are tokens and nothing merges to; of bytes, and of characters without spaces."""
    texts = mixed_texts(np.random.default_rng(7), 8000)
    spaced = [text.replace(" ", "\u2581").replace("\n", "") for text in texts]
    of_bytes, of_characters = trained(texts, ByteLevel(False, use_regex=False)), trained(spaced)
    whole = [bpe_gguf.lettered(text) for text in CHUNKS + (" 123", "abc", "\n\n\n", " don", "ABC")]
    newlines = ["\n" * count for count in (1, 2, 4)]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        False: (["<s>", *dict.fromkeys(of_bytes[0] + whole)], of_bytes[1]),
        True: (
            ["<s>", *fallback, *dict.fromkeys(newlines + of_characters[0])],
            ["\n \n", "\n\n \n\n", *of_characters[1]],
        ),
    }


def trained(texts: list[str], splitting=None) -> tuple[list[str], list[str]]:
    """Tokens and merges of the commonest pairs in texts."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    if splitting:
        inner.pre_tokenizer = splitting
    trainer = BpeTrainer(
        vocab_size=1400,
        limit_alphabet=256,
        initial_alphabet=ByteLevel.alphabet() if splitting else [],
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    model = json.loads(inner.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def write(path, name: str, vocabularies, **keys):
    """The vocabulary for a name, with BOS and what bytes are written as."""
    tokens, merges = vocabularies[BY_NAME[name].spaced]
    types = {"<s>": TokenType.CONTROL}
    types |= {token: TokenType.BYTE for token in tokens if BYTE.fullmatch(token)}
    return bpe_gguf.write(path, tokens, merges, pre=name, types=types, bos_token_id=0, **keys)


@pytest.fixture(scope="module")
def llama():
    return bpe_gguf.llama_cpp()


def differs(name: str):
    """Whether llama.cpp may make other words of a text, as a function."""
    regex = pytest.importorskip("regex")
    name = BY_NAME[name].names.split()[0]
    found = [pattern for names, (pattern, _) in DIFFERENT.items() if name in names.split()]
    pattern = regex.compile("(?V1)" + "|".join([OLD_S, *found]))
    if name != "falcon":
        return pattern.search
    return lambda text: pattern.search(text) or set(BYTE_DIGITS) & set(bpe_gguf.lettered(text))


def compare(name: str, texts, ours: Tokenizer, theirs, special: bool = False) -> tuple[int, int]:
    """Compare ids of texts; returns how many were compared and left out."""
    known, compared, left_out = differs(name), 0, 0
    for text in texts:
        if BY_NAME[name].composed:
            text = unicodedata.normalize("NFC", text)
        if known(text):
            left_out += 1
            continue
        expected = theirs(text, special)
        assert ours.encode(text, special=special) == expected, (name, ascii(text))
        compared += 1
    return compared, left_out


@pytest.mark.parametrize("name", RULES)
def test_words_are_those_of_llama_cpp(name, llama, vocabularies, tmp_path, rng, measured):
    path = write(tmp_path / "m.gguf", name, vocabularies, add_bos_token=False)
    ours, theirs, compared, left_out = bpe_gguf.made(path), llama(path), 0, 0
    while compared < TEXTS:
        found = compare(name, mixed_texts(rng, TEXTS - compared), ours, theirs)
        compared, left_out = compared + found[0], left_out + found[1]
    measured(f"{name}: {compared} texts have llama.cpp's ids, {left_out} are known not to")


def test_names_add_bos_and_take_whole_words_as_llama_cpp(llama, vocabularies, tmp_path, rng):
    for name in BY_NAME:
        path = write(tmp_path / "m.gguf", name, vocabularies)
        ours, theirs = bpe_gguf.made(path), llama(path)
        compared, _ = compare(name, mixed_texts(rng, FEWER), ours, theirs, special=True)
        assert compared > FEWER // 4


@functools.cache
def glued(text: str) -> tuple[list[str], list[str]]:
    return bpe_gguf.glue(text)


def write_glued(path, name: str, text: str):
    """A vocabulary that makes one token of every word of a text, however it is split."""
    return bpe_gguf.write(path, *glued(text), pre=name, add_bos_token=False)


def cut(tokens: list[str], ids: list[int]) -> str:
    words = [bpe_gguf.unlettered(tokens[id]).decode() for id in ids]
    return word_cuts.CUT.join(words)


@pytest.mark.parametrize("name", word_cuts.EXPECTED)
def test_words_are_as_written_down(name, tmp_path):
    for expected in word_cuts.EXPECTED[name]:
        text = expected.replace(word_cuts.CUT, "")
        ours = bpe_gguf.made(write_glued(tmp_path / "m.gguf", name, text))
        assert cut(glued(text)[0], ours.encode(text, special=False)) == expected


def test_what_is_written_down_is_llama_cpps(llama, tmp_path):
    for name, expected in ((n, cuts) for n in word_cuts.EXPECTED for cuts in word_cuts.EXPECTED[n]):
        text = expected.replace(word_cuts.CUT, "")
        if not differs(name)(text):
            theirs = llama(write_glued(tmp_path / "m.gguf", name, text))
            ids = theirs(text, False)
            assert cut(glued(text)[0], ids) == expected


def test_every_rule_is_written_down():
    assert set(word_cuts.EXPECTED) == {n for n, words in RULES.items() if not words.spaced}
