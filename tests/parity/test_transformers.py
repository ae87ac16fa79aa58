"""Random tiny models of every type give the logits that transformers gives.

24 configurations a type (`tiny`; 20 of those in `tiny_families`), each judged four ways: the
definition (reference.Forward at float64) against transformers, which shows that the definition is
right; the converter's spec and weights against what was drawn; and the engine's logits against
transformers, at once and in pieces. The bound is 1e-3 of the largest logit; keys and values in f16
take about half of it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import oracle
import pytest
import tiny
from tiny import MODEL_TYPES
from tiny_families import FAMILIES

import edgemem
from edgemem.kernels.reference import Forward, StoreWeights
from edgemem.store import Store

CONFIGURATIONS, OF_FAMILIES = 24, 20
DEFINITION_BOUND = 2e-5
ENGINE_BOUND = 1e-3
CONTEXT = tiny.IDS_COUNT + 2
CLEAR_GAP = 0.004
"""Routers must decide by this much (see `tiny.routing_gaps`) where ids are fed in pieces: dynamic
rope makes the pieces matter, so what `tiny` settled for one feed need not hold for several."""


@dataclass
class Case:
    """One random checkpoint with its judge and its store."""

    model: tiny.Tiny
    store_path: object

    @cached_property
    def judge(self) -> oracle.Oracle:
        return oracle.Oracle(self.model.folder)

    @cached_property
    def expected(self) -> np.ndarray:
        return self.judge.logits(self.model.ids)

    def pieces(self) -> list[list[int]]:
        """The ids as a prompt, three single tokens and the rest, cut where all routing is clear."""
        ids, spec = self.model.ids, self.model.spec
        cuts = np.roll(np.arange(5, len(ids) - 4), spec.hidden)
        matters = spec.rope.type == "dynamic" and any(spec.routed)
        for cut in cuts.tolist():
            parts = [ids[:cut], *([i] for i in ids[cut : cut + 3]), ids[cut + 3 :]]
            if not matters or self._gap(parts) >= CLEAR_GAP:
                return parts
        raise AssertionError("no cut of the ids has clear routing")

    def _gap(self, parts: list[list[int]]) -> float:
        """The closest that any routing decision is, when the ids are fed in these parts."""
        spec, gaps = self.model.spec, [np.inf]

        def watch(layer: int, name: str, value: np.ndarray) -> None:
            if name == "router":
                dense = self.model.weights.dense(layer)
                gaps.append(tiny.routing_gaps(spec, value, dense).min())

        forward = Forward(spec, self.model.weights, watch=watch)
        for part in parts:
            forward.feed(part)
        return min(gaps)


@pytest.fixture(
    scope="module",
    params=[
        (kind, seed)
        for kind in MODEL_TYPES
        for seed in range(OF_FAMILIES if kind in FAMILIES else CONFIGURATIONS)
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def case(request, tmp_path_factory, seed_base) -> Case:
    from edgemem import converters

    kind, seed = request.param
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.write(folder / "checkpoint", kind, seed_base + seed)
    converters.convert(model.folder, folder / "model.edgemem")
    return Case(model, folder / "model.edgemem")


@pytest.fixture(scope="module")
def engine(case):
    return edgemem.load(case.store_path, context=CONTEXT, threads=1)


def test_the_definition_agrees(case):
    found = Forward(case.model.spec, case.model.weights).feed(case.model.ids)
    assert oracle.relative_error(found, case.expected) <= DEFINITION_BOUND


def test_the_converter_finds_the_spec(case):
    with Store.open(case.store_path) as store:
        found, drawn = store.spec.to_dict(), case.model.spec.to_dict()
    if all(drawn["routed"]):  # then nothing is that wide
        found["intermediate"] = drawn["intermediate"]
    if not any(drawn["routed"]):
        found["normalize_top_k"] = drawn["normalize_top_k"]
    for name in drawn["rope"].keys() - ROPE_FIELDS[drawn["rope"]["type"]] - ALWAYS:
        found["rope"][name] = drawn["rope"][name]
    assert found["rope"].pop("attention_factor") == pytest.approx(
        drawn["rope"].pop("attention_factor")
    )
    assert found == drawn


ROPE_FIELDS = {
    "default": {"type", "theta", "attention_factor"},
    "linear": {"type", "theta", "attention_factor", "factor"},
    "dynamic": {"type", "theta", "attention_factor", "factor"},
    "llama3": {
        "type", "theta", "attention_factor", "factor", "original_positions", "low_freq_factor",
        "high_freq_factor",
    },
    "yarn": {
        "type", "theta", "attention_factor", "factor", "original_positions", "beta_fast",
        "beta_slow", "truncate",
    },
    "longrope": {"type", "theta", "attention_factor", "original_positions"},
}  # fmt: skip
ALWAYS = {"dims", "short_factors", "long_factors", "long_attention_factor"}
"""What each type of rope reads; the rest means nothing to it."""


def test_the_store_holds_the_weights(case):
    spec, drawn = case.model.spec, case.model.weights
    with Store.open(case.store_path) as store:
        weights = StoreWeights(store)
        assert np.array_equal(weights.table(), drawn.table())
        assert np.array_equal(weights.head(), drawn.head())
        for (kind, layer, index), bundle in drawn.bundles.items():
            found = getattr(weights, kind)(layer, *([index] if kind == "expert" else []))
            assert found.keys() == bundle.keys(), (kind, layer, index)
            for name, values in bundle.items():
                same = np.array_equal(found[name], np.atleast_2d(values))
                assert same, f"{kind} {index} of layer {layer}: {name} ({spec.model_type})"


def test_the_engine_agrees(case, engine):
    found = engine.logits(case.model.ids)
    assert found.dtype == np.float32
    assert found.shape == case.expected.shape
    assert oracle.relative_error(found, case.expected) <= ENGINE_BOUND


def test_the_engine_agrees_in_pieces(case, engine):
    case.judge.reset()
    expected, found, rope = [], [], engine.spec.rope
    with engine.session() as session:
        for part in case.pieces():
            start, text = session.position, part
            if rope.is_long(start + len(part)) != rope.is_long(start):
                case.judge.reset()  # all keys have longrope's other factors from here on
                text = case.model.ids[: start + len(part)]
            expected.append(case.judge.feed(text)[-1])
            found.append(session.feed(part))
        assert session.position == len(case.model.ids)
    assert oracle.relative_error(np.array(found), np.array(expected)) <= ENGINE_BOUND
