"""Perplexity: its definition, against a plain computation from logits."""

import math

import numpy as np
import pytest

import edgemem
from edgemem.errors import BudgetError
from edgemem.perplexity import perplexity, text_bytes

TEXT = "Once upon a time there was a little dog. " * 12


@pytest.fixture(scope="module")
def engine(stories_store):
    with edgemem.load(stories_store) as engine:
        yield engine


def plain(engine, ids, window):
    """The definition, in float64 and a token at a time."""
    losses = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        logits = engine.logits(part).astype(np.float64)
        for row, target in zip(logits[:-1], part[1:], strict=True):
            losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window", [2, 7, 200, 256, 512])
def test_is_what_it_is_defined_to_be(engine, window):
    ids = engine.tokenizer.encode(TEXT, special=False)
    report = perplexity(engine, TEXT, window=window)
    expected, predicted = plain(engine, ids, window)
    assert report.perplexity == pytest.approx(expected, rel=1e-6)
    assert report.predicted_tokens == predicted
    assert report.tokens == len(ids) and report.windows == math.ceil(len(ids) / window)
    assert report.perplexity == pytest.approx(math.exp(report.mean_nll))
    assert 0 < report.standard_error < report.perplexity


def test_a_limit_takes_the_first_tokens(engine):
    ids = engine.tokenizer.encode(TEXT, special=False)
    report = perplexity(engine, TEXT, window=16, limit=33)  # the last window has one token
    expected, predicted = plain(engine, ids[:33], 16)
    assert report.perplexity == pytest.approx(expected, rel=1e-6)
    assert (report.tokens, report.predicted_tokens, report.windows) == (33, predicted, 3)
    assert perplexity(engine, ids[:33], window=16).mean_nll == report.mean_nll


def test_progress_reaches_the_end(engine):
    calls = []
    perplexity(engine, TEXT, 50, 120, lambda done, total: calls.append((done, total)))
    assert calls == [(50, 120), (100, 120), (120, 120)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"window": 1}, "window"),
        ({"window": 513}, "context"),
        ({"limit": 1}, "limit"),
        ({"text": ""}, "0 tokens"),
        ({"text": [1]}, "1 tokens"),
        ({"text": [9999, 1]}, "out of range"),
    ],
)
def test_refusals(engine, arguments, words):
    with pytest.raises(ValueError, match=words):
        perplexity(engine, **({"text": TEXT} | arguments))


def test_perplexity_of_a_trained_model_on_wikitext(tiny_moe_store, wikitext):
    with edgemem.load(tiny_moe_store, context=256) as engine:
        report = perplexity(engine, wikitext[:8000], limit=1000)
    assert 100 < report.perplexity < 400


def test_a_limit_encodes_only_what_it_could_need(engine, monkeypatch):
    ids = engine.tokenizer.encode(TEXT, special=False)[:20]
    encode, seen = engine.tokenizer.encode, []
    monkeypatch.setattr(
        engine.tokenizer, "encode", lambda text, **more: seen.append(text) or encode(text, **more)
    )
    text = TEXT + "é" * 5_000_000
    assert perplexity(engine, text, limit=20).mean_nll == perplexity(engine, ids).mean_nll
    most = text_bytes(engine.tokenizer, 20)
    assert len(seen[0].encode()) in (most, most - 1) and most < 5000


def test_a_text_beyond_the_budget_is_refused_before_it_is_encoded(stories_store):
    with edgemem.load(stories_store) as engine:
        engine.budget.limit = engine.budget.promised + (10 << 20)
        with pytest.raises(BudgetError, match="encoding 1.0 MiB of text does not fit") as refusal:
            perplexity(engine, "x" * (1 << 20))
        assert "--limit" in str(refusal.value) and "--memory" in str(refusal.value)
        assert perplexity(engine, "x" * (1 << 20), limit=100).tokens == 100
