"""Sessions: the public face of one sequence on an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from .generation import Generation
from .sampler import Sampler, Sampling
from .sequence import TokenSequence, check_room
from .tokenizer import byte_count

if TYPE_CHECKING:
    from .engine import Engine

DEFAULT_TOKENS = 256
"""How many tokens `generate` makes at most, unless told."""


class Session:
    """One sequence of tokens with its own KV cache and position; made by `engine.session()`.

    Sessions of one engine may be used from different threads, one thread each at a time. After an
    interrupt (Ctrl-C) or an error a session is as it was before the call, plus the tokens
    generated.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._sequence: TokenSequence | None = TokenSequence(engine)

    @property
    def position(self) -> int:
        """Number of tokens so far, fed and generated."""
        return len(self._open().tokens)

    @property
    def tokens(self) -> list[int]:
        """The tokens so far, a copy."""
        return list(self._open().tokens)

    def feed(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append token ids; return the logits after the last, float32 [vocab].

        Raises ValueError for no ids or ids out of range and ContextError for too many, before any
        work.
        """
        sequence = self._open()
        ids = check_ids(ids, self._engine.spec.vocab_size)
        if not len(ids):
            raise ValueError("feeding a session: there are no ids")
        sequence.check_room(len(ids))
        sequence.extend(ids)
        return sequence.logits().copy()

    def generate(
        self, prompt: str | Sequence[int] | None = None, *, max_tokens: int = DEFAULT_TOKENS,
        stop: str | Iterable[str] | None = None, stream: bool = False, **sampling,
    ) -> str | Generation:  # fmt: skip
        """Append `prompt` (text, token ids, or None to go on as it is), then generate.

        Ends at an EOS token, before the first of the strings in `stop`, after `max_tokens` tokens
        or when the context is full. `sampling` are the fields of `Sampling`: temperature, top_k,
        top_p, min_p, repetition_penalty, seed; by default greedy. Returns the generated text; with
        `stream` a `Generation`, which yields it in pieces and knows counts, times and why it ended.

        Text starts with BOS (if the model has one) only at position 0. Every argument is checked
        before any work: ValueError, TypeError, or ContextError if the prompt does not fit.
        """
        sequence = self._open()
        ids, settings, stops, stop_ids = checked(
            self._engine, len(sequence.tokens), prompt, max_tokens, stop, sampling
        )
        detokenizer = self._engine.tokenizer.detokenizer()
        detokenizer.skip(sequence.tokens + ids.tolist(), whole=isinstance(prompt, str))
        generation = Generation(
            sequence, detokenizer, ids, Sampler(settings), int(max_tokens), stops, stop_ids
        )
        return generation if stream else "".join(generation)

    def close(self) -> None:
        """Free the KV cache; a stream that has not ended then fails. Closing twice is fine."""
        if self._sequence is not None:
            self._sequence.close()
        self._sequence = None

    def __enter__(self) -> Session:
        self._open()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _open(self) -> TokenSequence:
        if self._sequence is None:
            raise ValueError("the session is closed")
        return self._sequence


def checked(
    engine: Engine, position: int, prompt: str | Sequence[int] | None, max_tokens: int,
    stop: str | Iterable[str] | None, sampling: Mapping[str, object],
) -> tuple[np.ndarray, Sampling, list[str], dict[int, str]]:  # fmt: skip
    """The arguments of `Session.generate` at `position`, or what is wrong; needs no weights.

    Returns the prompt's ids, the settings, the stop strings, and why each id ends a generation.
    """
    settings = Sampling.of(sampling)
    stops, stop_ids = _stops(engine, stop)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral):
        raise TypeError(f"max_tokens must be an integer, not {max_tokens!r}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be zero or more, not {max_tokens}")
    ids = _prompt_ids(engine, position, prompt)
    check_room(engine, position, len(ids))
    return ids, settings, stops, stop_ids


def _prompt_ids(engine: Engine, position: int, prompt: str | Sequence[int] | None) -> np.ndarray:
    if isinstance(prompt, str):
        check_length(engine, position, prompt)
        engine.promise_text(byte_count(prompt))
        prompt = engine.tokenizer.encode(prompt, special=position == 0)
    ids = check_ids(() if prompt is None else prompt, engine.spec.vocab_size)
    if len(ids) or position:
        return ids
    if engine.bos_id is None:
        raise ValueError(
            "the prompt is empty and this model has no BOS token to start from; give it text"
        )
    return check_ids([engine.bos_id], engine.spec.vocab_size)


def check_length(engine: Engine, position: int, text: str) -> None:
    """Raises ContextError for a text that is too long however it is encoded, without encoding."""
    if len(text) <= engine.context - position:
        return  # it may fit, and the vocabulary need not be looked at
    longest = engine.tokenizer.longest_token
    if longest is not None:
        check_room(engine, position, -(-byte_count(text) // longest), at_least=True)


def _stops(engine: Engine, stop: str | Iterable[str] | None) -> tuple[list[str], dict[int, str]]:
    """Stop strings, and the reason for each id that ends a generation."""
    if not isinstance(stop, (str, Iterable, type(None))):
        raise TypeError(f"stop must be a str or several, not {stop!r}")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    ids = dict.fromkeys(engine.eos_ids, "eos")
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"a stop string must be a str, not {text!r}")
        if not text:
            raise ValueError("a stop string must not be empty")
        # A special token has no text in which its name could be found.
        special = engine.tokenizer.special_id(text)
        if special is not None:
            ids.setdefault(special, "stop")
    return stops, ids


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Token ids as int32 [n]; TypeError or ValueError unless all are ids of the vocabulary."""
    if isinstance(ids, (str, bytes)):
        raise TypeError("token ids must be integers; encode text with engine.tokenizer.encode")
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):  # ragged
        array = None
    if array is None or array.ndim != 1:
        raise TypeError(f"token ids must be a flat sequence of integers, not {ids!r:.40}")
    if not array.size:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        # Numpy makes something else of integers beyond 64 bits.
        if isinstance(ids, np.ndarray) or not all(map(_is_integer, ids)):
            raise TypeError(f"token ids must be integers, not {array.dtype.name}")
        array = np.array(list(map(int, ids)), object)
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(wrong):
        raise ValueError(
            f"token id {array[wrong[0]]} at place {wrong[0]} is out of range: "
            f"the vocabulary has ids 0 to {vocab_size - 1}"
        )
    return array.astype(np.int32)


def _is_integer(id) -> bool:
    return isinstance(id, Integral) and not isinstance(id, bool)
