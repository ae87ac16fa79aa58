"""Tokenizer and Detokenizer: pieces add up to the whole, whatever the ids and the decoder."""

import json
import signal

import pytest
from fake_engine import byte_fallback, byte_level
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner

from edgemem.errors import UnsupportedError
from edgemem.tokenizer import REPLACEMENT, Tokenizer, byte_count


def metaspace(scheme):
    vocab = {"<unk>": 0, "▁": 1, "▁▁": 2, "a": 3, "▁b": 4, "c▁": 5}
    inner = Inner(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return Tokenizer(inner.to_str().encode())


def word_piece():
    vocab = {"[UNK]": 0, "un": 1, "##able": 2, ".": 3, "do": 4, "n't": 5, "'": 6, "##s": 7}
    inner = Inner(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return Tokenizer(inner.to_str().encode())


def plain():
    inner = Inner(models.WordLevel(vocab={"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    return Tokenizer(inner.to_str().encode())


DECODERS = {
    "byte level": byte_level(merges=[("h", "e"), ("Ã", "©")]),
    "byte fallback": byte_fallback(),
    "metaspace always": metaspace("always"),
    "metaspace never": metaspace("never"),
    "word pieces": word_piece(),
    "no decoder": plain(),
}


def decode_in_pieces(tokenizer, ids, context=0):
    detokenizer = tokenizer.detokenizer()
    detokenizer.skip(ids[:context])
    return [detokenizer.push(id) for id in ids[context:]] + [detokenizer.flush()]


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_pieces_add_up_to_decode(name, data):
    """Random ids, so also broken characters, special tokens, and ids beyond the vocabulary."""
    tokenizer = DECODERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    assert "".join(decode_in_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(text=st.text(alphabet="ab é€😀\n\ufffd", max_size=20), data=st.data())
def test_no_piece_ends_inside_a_character(name, text, data):
    tokenizer = DECODERS[name]
    ids = tokenizer.encode(text)
    context = data.draw(st.integers(0, len(ids)))
    pieces = decode_in_pieces(tokenizer, ids)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)
        # With some of the text known before, the pieces are the rest of it, to the character.
        rest = "".join(decode_in_pieces(tokenizer, ids, context))
        assert tokenizer.decode(ids[:context]).rstrip(REPLACEMENT) + rest == text or "\ufffd" in (
            tokenizer.decode(ids[:context])
        )


@given(first=st.text("ab é😀", max_size=60), second=st.text("ab é😀", max_size=30))
def test_text_after_a_prompt_continues_it(first, second):
    tokenizer = DECODERS["byte fallback"]
    before = tokenizer.encode(first)
    after = tokenizer.encode(second, special=False)
    pieces = decode_in_pieces(tokenizer, before + after, len(before))
    assert first + "".join(pieces) == tokenizer.decode(before + after)


def test_a_character_cut_by_the_end_of_the_known_ids_is_given_whole():
    tokenizer = DECODERS["byte level"]
    ids = tokenizer.encode("x😀y")
    detokenizer = tokenizer.detokenizer()
    detokenizer.skip(ids[:3], whole=False)
    assert "".join(map(detokenizer.push, ids[3:])) == "😀y"


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = DECODERS["byte level"]
    ids = tokenizer.encode("aè😀b")
    assert decode_in_pieces(tokenizer, ids) == ["a", "", "è", "", "", "", "😀", "b", ""]


def test_a_run_of_byte_tokens_is_decoded_as_one():
    """The decoder makes a run with one bad byte all bad, so no byte is certain before its end."""
    tokenizer = DECODERS["byte fallback"]
    good, bad = tokenizer.encode("€", special=False)[1:], 3 + 0xFF
    assert decode_in_pieces(tokenizer, good) == ["", "", "", "€"]
    assert "".join(decode_in_pieces(tokenizer, [*good, bad])) == REPLACEMENT * 4


def test_special_tokens_have_no_text_but_may_be_shown():
    tokenizer = DECODERS["byte level"]
    end = tokenizer.special_id("<|end|>")
    ids = [*tokenizer.encode("hi"), end]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "hi<|end|>"
    assert "".join(decode_in_pieces(tokenizer, ids)) == "hi"
    assert tokenizer.special_id("h") is None and tokenizer.special_id("absent") is None


def test_encode_adds_bos_where_the_checkpoint_says_so():
    with_bos = json.loads(byte_fallback()._inner.to_str())
    without = {**with_bos, "post_processor": None}

    def first_id(data, **config):
        tokenizer = Tokenizer(json.dumps(data).encode(), {"bos_token": "<s>", **config})
        assert 1 not in tokenizer.encode("a", special=False)
        return tokenizer.encode("a")[0]

    assert first_id(with_bos) == 1
    assert first_id(with_bos, add_bos_token=True) == 1
    assert first_id(with_bos, add_bos_token=False) != 1
    assert first_id(without) != 1
    assert first_id(without, add_bos_token=True) == 1
    assert first_id(without, add_bos_token=True, bos_token={"content": "<s>"}) == 1


def test_truncation_and_padding_of_training_are_switched_off():
    inner = Inner.from_str(byte_level()._inner.to_str())
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    assert len(Tokenizer(inner.to_str().encode()).encode("abcdefgh")) == 8


@given(text=st.text(alphabet="ab é€😀\n", max_size=60), name=st.sampled_from(sorted(DECODERS)))
def test_no_token_stands_for_more_than_the_longest(text, name):
    tokenizer = DECODERS[name]
    if tokenizer.longest_token is not None:
        ids = tokenizer.encode(text, special=False)
        assert byte_count(text) <= len(ids) * tokenizer.longest_token


@pytest.mark.parametrize(
    "change, longest",
    [
        ({}, 4),
        ({"normalizer": normalizers.NFC()}, 16),
        ({"normalizer": normalizers.Sequence([normalizers.Prepend("x"), normalizers.NFD()])}, 16),
        ({"normalizer": normalizers.Replace(" ", "▁")}, 4),
        ({"normalizer": normalizers.Replace("aa", "a")}, None),
        ({"normalizer": normalizers.Replace(Regex("a+"), "a")}, None),
        ({"normalizer": normalizers.Strip()}, None),
        ({"normalizer": normalizers.NFKC()}, None),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, None),
    ],
)
def test_the_longest_token_is_known_where_nothing_is_left_out(change, longest):
    inner = Inner.from_str(byte_level(merges=[("Ã", "©")], special=())._inner.to_str())
    for name, part in change.items():
        setattr(inner, name, part)
    assert Tokenizer(inner.to_str().encode()).longest_token == longest


def test_tokens_that_swallow_what_is_around_them_have_no_longest():
    inner = Inner.from_str(byte_level()._inner.to_str())
    inner.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(inner.to_str().encode()).longest_token is None
    assert DECODERS["word pieces"].longest_token is None


def test_a_long_text_lets_other_threads_run_and_has_the_same_ids():
    tokenizer, text = DECODERS["byte fallback"], "ab é😀 " * 20000
    assert tokenizer.encode(text) == tokenizer._inner.encode(text).ids


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_an_interrupt_ends_the_encoding_of_a_long_text():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            DECODERS["byte fallback"].encode("ab é😀 " * 200000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "ids, error",
    [([-1], ValueError), ([1 << 32], ValueError), ([1.5], TypeError), ([True], TypeError)],
)
def test_decoding_what_is_no_id(ids, error):
    with pytest.raises(error, match="token id"):
        DECODERS["byte level"].decode(ids)


def test_bad_text_and_bad_files_are_named():
    tokenizer = DECODERS["byte level"]
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"bytes")
    with pytest.raises(ValueError, match="not Unicode"):
        tokenizer.encode("\udcff")
    for data in (b"", b"{}", b'{"model": {"type": "Novel"}}', b"\xff\xfe"):
        with pytest.raises(UnsupportedError, match="tokenizer"):
            Tokenizer(data)


def test_pieces_of_a_trained_model_add_up(shared):
    data = (shared / "models" / "stories260k" / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(data)
    ids = tokenizer.encode("Once upon a time, a 🐶 said: “naïve café”.")
    assert "".join(decode_in_pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert ids[0] == 1
