"""A growing sequence of tokens and the model's state for it, kept in step with each other.

The token list is the truth. The KV cache may lag behind it (the token sampled last has not run yet)
or lead it (an interrupt fell between a step and its bookkeeping); every run starts by bringing it
level. So whatever is interrupted, at whatever point, the sequence is as it was before or as it was
to be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import ContextError

if TYPE_CHECKING:
    from .engine import Engine


def check_room(engine: Engine, used: int, count: int, at_least: bool = False) -> None:
    """Raises ContextError if `count` (or more) tokens do not fit a context with `used` tokens."""
    if count <= engine.context - used:
        return
    limit, about = engine.context_limit, "at least " if at_least else ""
    taken = f", {used} of them used" if used else ""
    larger = f" or load with a larger one (up to {limit})" if limit > engine.context else ""
    raise ContextError(
        f"{about}{count} tokens do not fit the context of {engine.context} tokens{taken}; "
        f"shorten the text{larger}"
    )


class TokenSequence:
    """Tokens, their KV cache and the logits after the last of them. Not for two threads at once."""

    def __init__(self, engine: Engine):
        self.tokens: list[int] = []
        self.context = engine.context
        self._engine = engine
        self._kv = engine.new_kv()
        self._free = weakref.finalize(self, engine.free_kv)
        self._free.atexit = False
        self._logits = np.empty(engine.spec.vocab_size, np.float32)
        self._logits_at = 0
        """Number of tokens after which `_logits` are; 0 for none."""
        self._long: list[bool] = []
        """Of each rope, whether the keys in the cache have longrope's long factors."""

    @property
    def closed(self) -> bool:
        """Whether its cache was given up; a closed sequence cannot run."""
        return self._kv is None

    def close(self) -> None:
        """Give up the cache; a step that another thread is in still ends well."""
        self._kv = None
        self._free()

    @property
    def room(self) -> int:
        """How many more tokens fit the context."""
        return self.context - len(self.tokens)

    def check_room(self, count: int) -> None:
        """Raises ContextError if `count` more tokens do not fit."""
        check_room(self._engine, len(self.tokens), count)

    def append(self, token: int) -> None:
        """Add a token, to be run with whatever runs next."""
        self.tokens.append(token)

    def extend(self, ids: np.ndarray) -> None:
        """Run `ids`, int32 [n], and add them: all, or none if that fails or is interrupted."""
        lagging = self._level()
        if lagging:
            ids = np.concatenate([np.array(lagging, np.int32), ids])
        self._run(ids, "prefill")
        self.tokens += ids[len(lagging) :].tolist()

    def each_logits(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Like `extend`; yields the logits after each of `ids`, chunk by chunk: float32 [n, vocab].

        A chunk's array is used again for the next. The ids are added with the last chunk.
        """
        self._engine.promise_all_logits()
        self._run(np.array(self._level(), np.int32), "decode")
        chunk_tokens = self._engine.logits_tokens
        rows = np.empty((min(len(ids), chunk_tokens), len(self._logits)), np.float32)
        self._step(self._again(len(ids)), "prefill")
        for start in range(0, len(ids), chunk_tokens):
            chunk = ids[start : start + chunk_tokens]
            self._engine.step(chunk, self._kv, "prefill", rows[: len(chunk)])
            if start + len(chunk) == len(ids):
                self.tokens += ids.tolist()
            yield rows[: len(chunk)]

    def logits(self) -> np.ndarray:
        """Logits after the last token, float32 [vocab], good until the next run. Needs a token."""
        lagging = self._level()
        if not lagging and self._logits_at != len(self.tokens):
            self._kv.truncate(len(self.tokens) - 1)  # they were lost: run the last token again
            lagging = self.tokens[-1:]
        self._run(np.array(lagging, np.int32), "decode")
        return self._logits

    def _level(self) -> list[int]:
        """Cut what the cache has too much; return the tokens that it lacks."""
        if self._kv.position > len(self.tokens):
            self._kv.truncate(len(self.tokens))
            self._logits_at = 0
        return self.tokens[self._kv.position :]

    def _run(self, ids: np.ndarray, phase: str) -> None:
        """Run `ids` on the cache as it is, chunk by chunk; `_logits` takes the last one's."""
        if not len(ids):
            return
        end = self._kv.position + len(ids)
        self._logits_at = 0
        self._step(self._again(len(ids)), "prefill")
        self._step(ids, phase, self._logits)
        self._logits_at = end

    def _again(self, count: int) -> np.ndarray:
        """What has to run again before `count` more tokens, int32: the whole text, where with them
        it becomes one whose keys have longrope's other factors; else nothing."""
        end = self._kv.position + count
        long = [rope.is_long(end) for rope in self._engine.spec.ropes]
        again = self.tokens[: self._kv.position] if long != self._long else []
        if again:
            self._kv.truncate(0)
        self._long, self._kv.rope_length = long, end
        return np.array(again, np.int32)

    def _step(self, ids: np.ndarray, phase: str, logits: np.ndarray | None = None) -> None:
        """Run `ids` chunk by chunk; `logits` takes the last one's."""
        for start in range(0, len(ids), self._engine.chunk_tokens):
            chunk = ids[start : start + self._engine.chunk_tokens]
            is_last = start + len(chunk) == len(ids)
            self._engine.step(chunk, self._kv, phase, logits if is_last else None)
