"""Text to token ids and back, by the `tokenizers` library and the store's tokenizer.json.

Decoding while tokens arrive is the delicate half: a token may end in the middle of a UTF-8
character, and a decoder may look at its neighbours (a leading space is stripped, a run of byte
tokens is decoded as one). `Detokenizer` hides all of that; its pieces always add up to what
`decode` says of the whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral

import numpy as np
import tokenizers

from .errors import UnsupportedError

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not (or not yet) a character."""

_CONTEXT_TOKENS = 32
"""Ids before the present one that may matter to its text, with a wide margin."""

ENCODING_BYTES = 512
"""Memory that encoding takes for each byte of text; measured up to 440, where each is a token."""

_LONG_TEXT = 1 << 16
"""Encoding more characters takes so long that an interrupt must not wait for its end."""

_SHRINKING = {"NFC": 4, "NFD": 4, "Prepend": 1, "ByteLevel": 1, "Replace": 1}
"""Normalizers known to shorten text at most by this factor (NFC: 3.5, for one Greek letter)."""

_KEEPING = ("ByteLevel", "Split", "Digits", "Metaspace")
"""Pre-tokenizers that leave nothing of a text out (Split: unless it says so)."""


class Tokenizer:
    """A checkpoint's own tokenizer.

    `data` is the bytes of its tokenizer.json, `config` its tokenizer_config.json as a dict; of the
    latter only `bos_token` and an explicit `add_bos_token` are read, with their meaning in
    transformers.
    """

    def __init__(self, data: bytes, config: dict | None = None):
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:
            raise UnsupportedError(
                f"reading the store's tokenizer: tokenizers {tokenizers.__version__} does not "
                f"understand it ({error}); try a newer version of that library"
            ) from error
        # A checkpoint may carry the truncation and padding that it was trained with.
        self._inner.no_truncation()
        self._inner.no_padding()
        added = self._inner.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._byte_ids = self._find_byte_ids()
        self._read_config(config or {})

    def _read_config(self, config: dict) -> None:
        bos = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        self.bos_id = self._inner.token_to_id(bos) if isinstance(bos, str) else None
        explicit = config.get("add_bos_token")
        self._adds_special = explicit is not False
        lacks_bos = self.bos_id is not None and self._inner.encode("").ids[:1] != [self.bos_id]
        self._prefix = [self.bos_id] if explicit is True and lacks_bos else []

    def _find_byte_ids(self) -> frozenset[int]:
        """Ids of tokens like <0x0A>, if this decoder joins them into characters."""
        decoder = self._inner.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        names = [f"<0x{byte:{case}}>" for byte in range(256) for case in ("02X", "02x")]
        return frozenset(map(self._inner.token_to_id, names)) - {None}

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text; a model's vocabulary may be padded to more."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, also what the model expects around it (mostly BOS)."""
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, not a str")
        check_unicode(text)
        ids = self._encode(text, special and self._adds_special)
        return self._prefix + ids if special else ids

    def _encode(self, text: str, special: bool) -> list[int]:
        """Encode a long text in a thread that can be left behind: Ctrl-C does not wait for it."""
        if len(text) < _LONG_TEXT:
            return self._inner.encode(text, add_special_tokens=special).ids
        results = []

        def work():
            try:  # unlike `encode`, this lets other threads run
                results.append(self._inner.encode_batch([text], add_special_tokens=special)[0].ids)
            except BaseException as error:
                results.append(error)

        thread = threading.Thread(target=work, name="edgemem-encode", daemon=True)
        thread.start()
        thread.join()
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    @cached_property
    def longest_token(self) -> int | None:
        """No token stands for more bytes of text than this; None where that cannot be known.

        Known are byte-pair tokenizers that leave out nothing and know every byte; there `n` bytes
        of text have at least `n / longest_token` tokens.
        """
        inner = self._inner
        added = inner.get_added_tokens_decoder().values()
        swallows = any(token.lstrip or token.rstrip for token in added)
        kinds = [*_kinds(inner.normalizer), *_kinds(inner.pre_tokenizer)]
        if swallows or not _knows_all_bytes(inner, kinds):
            return None
        shrinking = 1
        for part in _kinds(inner.normalizer):
            if not _keeps_length(part):
                return None
            shrinking *= _SHRINKING[part["type"]]
        for part in _kinds(inner.pre_tokenizer):
            if part["type"] not in _KEEPING or part.get("behavior") == "Removed":
                return None
        texts = map(inner.id_to_token, range(self.vocab_size))
        return shrinking * max(len(text.encode()) for text in texts if text is not None)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of `ids`. Ids that have no token (a padded vocabulary) have no text."""
        return self._inner.decode(list(map(_id, ids)), skip_special_tokens=skip_special)

    def special_id(self, text: str) -> int | None:
        """The id of the special token written as `text`, which never shows up in decoded text."""
        id = self._inner.token_to_id(text)
        return id if id in self._special else None

    def has_text(self, id: int) -> bool:
        """Whether `decode` makes anything of an id: not of special tokens, nor of unused ids."""
        return id not in self._special and self._inner.id_to_token(id) is not None

    def is_byte(self, id: int) -> bool:
        """Whether an id stands for one byte, which with its neighbours makes characters."""
        return id in self._byte_ids

    def detokenizer(self) -> Detokenizer:
        """A decoder for one growing sequence."""
        return Detokenizer(self)


def byte_count(text: str) -> int:
    """Bytes of a text in UTF-8; a str that is none has some, too."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def check_unicode(text: str) -> None:
    """Raises ValueError for a str that is no text: with halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not Unicode ({error.reason} at place {error.start}): it was decoded from "
            "bytes that are not of its encoding; read them as UTF-8"
        ) from None


def _id(id) -> int:
    if isinstance(id, (bool, np.bool_)) or not isinstance(id, Integral):
        raise TypeError(f"a token id must be an integer, not {id!r}")
    if not 0 <= id < 1 << 32:
        raise ValueError(f"token id {id} is out of range: ids are not negative and below 2^32")
    return int(id)


def _kinds(part) -> list[dict]:
    """What a normalizer or pre-tokenizer is made of, in order; nothing for None."""
    state = [] if part is None else [json.loads(part.__getstate__())]
    while any("normalizers" in s or "pretokenizers" in s for s in state):
        state = [x for s in state for x in s.get("normalizers") or s.get("pretokenizers") or [s]]
    return state


def _keeps_length(normalizer: dict) -> bool:
    """Whether a normalizer shortens no text by more than the factor of `_SHRINKING`."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return bool(pattern) and len(normalizer["content"].encode()) >= len(pattern.encode())
    return normalizer["type"] in _SHRINKING


def _knows_all_bytes(inner: tokenizers.Tokenizer, kinds: list[dict]) -> bool:
    """Whether each byte has a token, so that no token stands for a run of unknown characters."""
    if not isinstance(inner.model, tokenizers.models.BPE):
        return False
    names = [f"<0x{byte:02X}>" for byte in range(256)] if inner.model.byte_fallback else []
    if any(kind["type"] == "ByteLevel" for kind in kinds):
        names = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return bool(names) and None not in map(inner.token_to_id, names)


class Detokenizer:
    """Decodes a sequence token by token.

    The pieces that `push` and `flush` return add up to `decode` of all ids, and none of them ends
    inside a character. Only a window of the last few ids is kept: enough that decoding it with one
    more id says what that id adds. The window starts at a token that begins a character and has a
    text of its own, so nothing that a decoder does to the first token of a text (strip a space)
    reaches past it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._anchor = 0
        """Ids at the head of the window whose text was returned before."""
        self._sent = 0
        """Characters of the window's text that were returned."""

    def push(self, id: int) -> str:
        """Take one id; return the text that is now certain: mostly that of this id, maybe none."""
        if not self._tokenizer.has_text(id):
            return ""
        self._window.append(id)
        if self._tokenizer.is_byte(id):
            return ""  # what a byte becomes is known only at the end of its run
        text = self._text()
        if text.endswith(REPLACEMENT):
            return self._take(text, len(text) - 1)
        piece = self._take(text, len(text))
        self._forget()
        return piece

    def flush(self) -> str:
        """Return what is held back, complete or not: the text ends here."""
        text = self._text()
        return self._take(text, len(text))

    def skip(self, ids: Sequence[int], whole: bool = True) -> None:
        """Take ids whose text the caller has already (a prompt); what follows continues that text.

        With `whole` false the ids may end inside a character, which is then given once it is
        complete.
        """
        ids = [int(id) for id in ids if self._tokenizer.has_text(id)]
        start = max(0, len(ids) - _CONTEXT_TOKENS)
        while start > 0 and self._tokenizer.is_byte(ids[start]):
            start -= 1
        if start > 0:
            self._window = []
        self._window += ids[start:]
        self._anchor = 0
        text = self._text()
        self._sent = len(text if whole else text.rstrip(REPLACEMENT))

    def _text(self) -> str:
        return self._tokenizer.decode(self._window)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _forget(self) -> None:
        """Shorten the window to the ids since the last time, if they have a text of their own."""
        recent = self._window[self._anchor :]
        text = self._tokenizer.decode(recent)
        if text:
            self._window = recent
            self._sent = len(text)
        self._anchor = len(self._window)
