"""How well a model predicts a text.

The text is encoded whole, without special tokens, and cut into windows of `window` tokens that do
not overlap; the last may be shorter. Each window starts afresh at position 0, and every token of it
but the first is predicted from those before it in the window. The perplexity is e to the mean
negative log likelihood (natural logarithm) of all predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedError
from .sequence import TokenSequence
from .session import check_ids
from .tokenizer import Tokenizer, byte_count, check_unicode

if TYPE_CHECKING:
    from .engine import Engine

DEFAULT_WINDOW = 256

_SPARE_TOKENS = 64
"""Beyond a limit, so many more of the longest tokens are encoded."""

_LARGEST_NLL = 700.0
"""e to the power of this is near the end of float64."""


@dataclass(frozen=True)
class PerplexityReport:
    """`mean_nll` is per predicted token, in nats; `standard_error` is that of the perplexity."""

    perplexity: float
    mean_nll: float
    standard_error: float
    tokens: int
    predicted_tokens: int
    windows: int
    window_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def perplexity(
    engine: Engine, text: str | Sequence[int], window: int = DEFAULT_WINDOW,
    limit: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> PerplexityReport:  # fmt: skip
    """Measure the perplexity of `text` (or token ids), of its first `limit` tokens if given.

    Of a text with a `limit` only the first `text_bytes(tokenizer, limit)` bytes are encoded. What
    encoding needs is taken from the budget: BudgetError where it does not fit.

    `progress(done_tokens, total_tokens)` is called after each window. Raises ValueError for a
    window below 2 or above the engine's context, and for a text of fewer than two tokens, before
    any work.
    """
    ids = check(engine, text, window, limit)
    started = perf_counter()
    losses = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        losses += _window_losses(engine, part)
        if progress is not None:
            progress(start + len(part), len(ids))
    return _report(np.concatenate(losses), len(ids), window, perf_counter() - started)


def check(engine: Engine, text: str | Sequence[int], window: int, limit: int | None) -> np.ndarray:
    """The ids that `perplexity` would run, or what is wrong with its arguments; needs no weights.

    All that the measurement takes from the budget is promised here.
    """
    if not 2 <= window <= engine.context:
        raise ValueError(
            f"window must be from 2 to the context of {engine.context} tokens, not {window}"
        )
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 tokens, not {limit}")
    engine.promise_all_logits()
    ids = encode_start(engine, text, limit) if isinstance(text, str) else text
    ids = check_ids(ids, engine.spec.vocab_size)[:limit]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
    return ids


def text_bytes(tokenizer: Tokenizer, limit: int | None) -> int | None:
    """The bytes of a text that are encoded for its first `limit` tokens; None for all of them.

    They hold more tokens than that, so that where the text is cut does not touch the limit.
    """
    longest = None if limit is None else tokenizer.longest_token
    return None if longest is None else (limit + _SPARE_TOKENS) * longest


def encode_start(engine: Engine, text: str, limit: int | None) -> list[int]:
    """Ids of a text, at least its first `limit`; encoding is put into the budget."""
    most = text_bytes(engine.tokenizer, limit)
    if most is not None and len(text) > most // 4:
        text = text[:most]
        check_unicode(text)
        text = text.encode()[:most].decode(errors="ignore")
    engine.promise_text(byte_count(text))
    return engine.tokenizer.encode(text, special=False)


def _window_losses(engine: Engine, ids: np.ndarray) -> list[np.ndarray]:
    """The losses of all ids but the first, chunk by chunk, with one chunk of logits at a time."""
    losses, targets = [], ids[1:]
    for rows in TokenSequence(engine).each_logits(ids):
        count = min(len(rows), len(targets))
        losses.append(_losses(rows[:count], targets[:count]))
        targets = targets[count:]
    return losses


def _losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each target, float64 [n]. Overwrites `logits` [n, vocab]."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    highest = logits.max(axis=1)
    logits -= highest[:, None]
    np.exp(logits, out=logits)
    return np.log(logits.sum(axis=1, dtype=np.float64)) + highest - chosen


def _report(losses: np.ndarray, tokens: int, window: int, seconds: float) -> PerplexityReport:
    mean = float(losses.mean())
    if not mean < _LARGEST_NLL:
        raise UnsupportedError(
            "measuring perplexity: the model's logits are not finite; its numbers overflow in this "
            "format, try another --dtype when converting"
        )
    value = math.exp(mean)
    spread = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
    return PerplexityReport(
        perplexity=value, mean_nll=mean, standard_error=value * spread / math.sqrt(len(losses)),
        tokens=tokens, predicted_tokens=len(losses), windows=-(-tokens // window),
        window_tokens=window, seconds=seconds,
    )  # fmt: skip
