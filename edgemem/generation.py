"""One generation: the loop that turns logits into text, with its stops, counts and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from .sampler import Sampler
from .sequence import TokenSequence
from .tokenizer import Detokenizer

FINISH_REASONS = ("eos", "stop", "length", "context")
"""An EOS token, a stop string, `max_tokens` tokens, a full context."""


@dataclass
class Phase:
    """Tokens that went through the model in prefill or in decode, and the seconds that took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Generation:
    """An iterator over pieces of text, each given as soon as it is certain; then, what happened.

    Work starts with the first piece. `finish_reason` is None until the end. `token_ids` holds every
    generated token, also an EOS and the tokens of a stop string; `text` holds neither. The seconds
    in `prefill` and `decode` leave out what the caller does between two pieces. The first token
    comes from the prefill's logits, so `decode.tokens` is mostly one less than the generated ones.
    """

    def __init__(
        self, sequence: TokenSequence, detokenizer: Detokenizer, prompt: np.ndarray,
        sampler: Sampler, max_tokens: int, stops: Sequence[str], stop_ids: Mapping[int, str],
    ):  # fmt: skip
        self.prompt_tokens = len(prompt)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill = Phase()
        self.decode = Phase()
        self._sequence = sequence
        self._detokenizer = detokenizer
        self._prompt = prompt
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._stops = StopFilter(stops)
        self._stop_ids = stop_ids
        self._text: list[str] = []
        self._start = len(sequence.tokens)
        self._pieces = self._run()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End here; the session keeps what it has."""
        self._pieces.close()

    def _run(self) -> Iterator[str]:
        try:
            started = perf_counter()
            self._check_turn()
            if self.prompt_tokens:
                self._sequence.extend(self._prompt)
                self.prefill = Phase(self.prompt_tokens, perf_counter() - started)
            while self.finish_reason is None:
                started = perf_counter()
                self._check_turn(self.prompt_tokens + len(self.token_ids))
                piece = self._next_piece()
                self.decode.seconds += perf_counter() - started
                if piece:
                    self._text.append(piece)
                    yield piece
        finally:
            self._sequence = None  # its cache may be freed before the results are

    def _check_turn(self, added: int = 0) -> None:
        """A session goes on from its end: an older generation cannot resume after a newer one."""
        if self._sequence.closed:
            raise ValueError("the session was closed before this generation ended; start a new one")
        if len(self._sequence.tokens) != self._start + added:
            raise RuntimeError("the session has moved on since this generation; start a new one")

    def _next_piece(self) -> str:
        """Generate a token; return the text now certain. Sets `finish_reason` at the end."""
        sequence = self._sequence
        if len(self.token_ids) >= self._max_tokens:
            return self._finish("length")
        if sequence.room < 1:
            return self._finish("context")
        steps = self.prompt_tokens == 0 or len(self.token_ids) > 0
        token = self._sampler.choose(sequence.logits(), sequence.tokens)
        self.decode.tokens += steps
        sequence.append(token)
        self.token_ids.append(token)
        if token in self._stop_ids:
            return self._finish(self._stop_ids[token])
        piece = self._stops.push(self._detokenizer.push(token))
        if self._stops.hit:
            self.finish_reason = "stop"
        return piece

    def _finish(self, reason: str) -> str:
        """Give out what was held back, unless it holds a stop string."""
        piece = self._stops.push(self._detokenizer.flush()) if self.token_ids else ""
        if self._stops.hit:
            self.finish_reason = "stop"
            return piece
        self.finish_reason = reason
        return piece + self._stops.flush()


class StopFilter:
    """Passes text on until a stop string, of which it never passes on any part.

    How the text is cut into pieces does not matter: the stop string that is complete first counts,
    and the longest of those that are complete at the same character.
    """

    def __init__(self, stops: Sequence[str]):
        self.hit = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take text; return what cannot belong to a stop string any more."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if found:
            self.hit = True
            self._held = ""
            return text[: min(found)[1]]
        safe = len(text) - self._partial(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """Return what is held back: the text ends, no stop string can follow."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
