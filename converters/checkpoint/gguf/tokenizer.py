"""A tokenizer.json from GGUF metadata, which gives the ids that the original tokenizer gives.

Three kinds, told apart by `tokenizer.ggml.model`. "gpt2": BPE with merges in the file, mostly of
bytes, whose splitting of text into words goes by a name, `tokenizer.ggml.pre` (see `words`).
"gemma4": the same with one way of splitting. "llama": SentencePiece's BPE, which has scores instead
of merges: it joins, again and again, the neighbours whose union has the highest score, the leftmost
first. That is BPE with the merges of each piece into two pieces, ranked by the score of the whole,
and it is how transformers' convert_slow_tokenizer.py reads such models (`generate_merges`).
"""

from __future__ import annotations

import json
import re
from functools import cached_property

import numpy as np

from edgemem.errors import CheckpointError

from .metadata import Metadata
from .words import BY_NAME, BYTES, Words

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPECIAL = (_UNKNOWN, _CONTROL)
_NORMAL = 1
_PADDING = re.compile(r"\[PAD([0-9]+)\]")
"""What converters write for ids that have no token; the id stands in the name."""
_UNNAMED = ("", "[")
"""How texts of such ids begin."""
_MAX_PIECE = 256
_SPACE = "\u2581"
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_UNESCAPE = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]

_KINDS = ("gpt2", "llama", "gemma4")
_SENTENCE_PIECE_ROLES = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of the kind "llama" where the file names none, as in llama.cpp's llama-vocab.cpp."""

_ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>",
    "<|flush|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "</s>",
    "<eos>", "<turn|>", "<|tool_response>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip
"""Control tokens that end a turn or a text wherever they are in a vocabulary, as in llama.cpp's
llama-vocab.cpp: the file names only one of them."""
_NO_ENDS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
"""Where a vocabulary has all of these, that one ends nothing."""


def words_of(metadata: Metadata) -> Words | None:
    """How the tokenizer makes words of a text; None for the kind that makes none.

    Raises UnsupportedError for a kind of tokenizer or of words that is not known here.
    """
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise metadata.unsupported("tokenizer.ggml.model", ", ".join(_KINDS))
    if kind == "llama":
        return None
    name = kind if kind == "gemma4" else metadata.text("tokenizer.ggml.pre", None)
    if name not in BY_NAME:
        raise metadata.unsupported("tokenizer.ggml.pre", ", ".join(sorted(BY_NAME)))
    return BY_NAME[name]


class Vocabulary:
    """What a file says about text: tokens and their types; ids that only pad have no token.

    Tokens are read at once, what is made of them when it is asked for: `tokenizer_json` is the
    bytes of a tokenizer.json, `config` what a tokenizer_config.json would say. Raises
    CheckpointError, and `tokenizer_json` as `words_of` does.
    """

    def __init__(self, metadata: Metadata):
        self._metadata = metadata
        self.texts = metadata.texts("tokenizer.ggml.tokens")
        count = len(self.texts)
        if "tokenizer.ggml.token_type" in metadata:
            self.types = metadata.numbers("tokenizer.ggml.token_type", "iu", count).tolist()
        else:
            self.types = [_NORMAL] * count
        self.ids = dict(zip(self.texts, range(count)))
        unnamed = [
            i for i, text in enumerate(self.texts) if text[:1] in _UNNAMED and _pads(text, i)
        ]
        for id in unnamed:
            self.ids.pop(self.texts[id], None)
        if len(self.ids) < count - len(unnamed):
            raise CheckpointError(
                f"reading {metadata.path}: tokenizer.ggml.tokens has a token twice"
            )

    @cached_property
    def tokenizer_json(self) -> bytes:
        metadata, words = self._metadata, words_of(self._metadata)
        data = _merged(metadata, self, words) if words else _sentence_piece(metadata, self)
        data |= {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added(),
            "post_processor": _ends_of_text(metadata, self, words),
        }
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()

    @property
    def config(self) -> dict:
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{short}_token": self.special(name) for short, name in roles.items()}
        return {key: self.texts[id] for key, id in ids.items() if id is not None}

    @property
    def bos_id(self) -> int | None:
        return self.special("bos")

    def special(self, name: str) -> int | None:
        """The id that the file gives a role to."""
        kind = self._metadata.text("tokenizer.ggml.model")
        default = _SENTENCE_PIECE_ROLES.get(name) if kind == "llama" else None
        id = self._metadata.token_id(name, len(self.texts), default)
        return id if id is not None and self.texts[id] in self.ids else None

    @property
    def size(self) -> int:
        """1 more than the highest id of a token."""
        return 1 + max(self.ids.values(), default=-1)

    def added(self) -> list[dict]:
        """The tokens that are found in a text before anything else is."""
        return [
            {
                "id": id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": self._swallows(text, id),
                "normalized": False,
                "special": self.types[id] in _SPECIAL,
            }
            for text, id in self.ids.items()
            if self.types[id] in (*_SPECIAL, _USER_DEFINED)
        ]

    def _swallows(self, text: str, id: int) -> bool:
        """Whether what separates a token from the word after it belongs to it. No key says so:
        Phi-3's do, but for three (llama.cpp goes by the model's name too)."""
        phi = self._metadata.architecture in ("phi3", "phimoe")
        sentencepiece = self._metadata.text("tokenizer.ggml.model") == "llama"
        return phi and sentencepiece and text not in ("<unk>", "<s>", "<|endoftext|>")

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a text."""
        no_ends = {text for others, text in _NO_ENDS if others <= self.ids.keys()}
        named = [self.ids[text] for text in _ENDS - no_ends if text in self.ids]
        found = {self.special(name) for name in ("eos", "eot", "eom")} - {None}
        return sorted(found | {id for id in named if self.types[id] == _CONTROL})


def _pads(text: str, id: int) -> bool:
    padding = _PADDING.fullmatch(text)
    return not text or (padding is not None and padding[1] == str(id))


def _model(vocab: dict[str, int], merges: list, **settings) -> dict:
    fixed = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    fixed |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    fixed |= {"byte_fallback": False, "ignore_merges": False}
    return fixed | settings | {"vocab": vocab, "merges": merges}


# ---- BPE with merges -----------------------------------------------------------------------------


def _merged(metadata: Metadata, tokens: Vocabulary, words: Words) -> dict:
    merges = [_pair(metadata, merge) for merge in metadata.texts("tokenizer.ggml.merges")]
    data = {
        "normalizer": {"type": "NFC"} if words.composed else None,
        "pre_tokenizer": words.steps(),
        "decoder": BYTES,
        "model": _model(tokens.ids, merges, ignore_merges=words.whole),
    }
    if words.spaced:
        data |= {"normalizer": _ESCAPE, "decoder": {"type": "Sequence", "decoders": _UNESCAPE}}
        data["model"] |= _fallback(tokens)
    return data


def _pair(metadata: Metadata, merge: str) -> tuple[str, str]:
    space = merge.find(" ", 1)
    if space < 0 or space == len(merge) - 1:
        raise CheckpointError(
            f"reading {metadata.path}: tokenizer.ggml.merges has {merge!r:.80}, which is no pair"
        )
    return merge[:space], merge[space + 1 :]


# ---- SentencePiece BPE ---------------------------------------------------------------------------


def _sentence_piece(metadata: Metadata, tokens: Vocabulary) -> dict:
    scores = metadata.numbers("tokenizer.ggml.scores", "f", len(tokens.texts))
    if not np.isfinite(scores).all():
        raise CheckpointError(f"reading {metadata.path}: tokenizer.ggml.scores has no finite ones")
    prefixed = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    merges = _merges(metadata, tokens, scores.tolist())
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _ESCAPE]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*_UNESCAPE, *strip]},
        "model": _model(tokens.ids, merges, **_fallback(tokens)),
    }


def _fallback(tokens: Vocabulary) -> dict:
    """What becomes of characters that no token has: bytes, else one token for all of them."""
    unknown = tokens.special("unknown")
    if unknown is None and _UNKNOWN in tokens.types:
        unknown = tokens.types.index(_UNKNOWN)
    text = None if unknown is None else tokens.texts[unknown]
    return {"unk_token": text, "fuse_unk": True, "byte_fallback": True}


def _merges(metadata: Metadata, tokens: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best score first, then the longer left half: of two ways
    to make one piece that overlap in a run of equal characters, the left one has it."""
    ids, found = tokens.ids, []
    for whole, id in ids.items():
        if tokens.types[id] in _SPECIAL:
            continue
        if len(whole) > _MAX_PIECE:
            raise CheckpointError(
                f"reading {metadata.path}: token {id} has {len(whole)} characters: out of range"
            )
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                found.append((-scores[id], -cut, id, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


# ---- what comes before and after a text ----------------------------------------------------------


def _ends_of_text(metadata: Metadata, tokens: Vocabulary, words: Words | None) -> dict | None:
    """The template that adds BOS and EOS where the file asks for them, or its words always do."""
    first = metadata.flag("tokenizer.ggml.add_bos_token", words.bos if words else True)
    first |= bool(words and words.spaced and words.bos)  # Gemma's first files said no
    last = metadata.flag("tokenizer.ggml.add_eos_token", False)
    bos = tokens.special("bos") if first else None
    eos = tokens.special("eos") if last else None
    if bos is None and eos is None:
        return None

    def special(id: int | None, sequence: int) -> list[dict]:
        item = {"id": tokens.texts[id], "type_id": sequence} if id is not None else None
        return [{"SpecialToken": item}] if item else []

    def text(name: str, sequence: int) -> list[dict]:
        body = [{"Sequence": {"id": name, "type_id": sequence}}]
        return special(bos, sequence) + body + special(eos, sequence)

    texts = {tokens.texts[id]: id for id in (bos, eos) if id is not None}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in texts.items()},
    }
