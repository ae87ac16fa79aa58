"""How routers choose, natively, against its meaning in reference.py, on every ISA."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tiny_config import Draw, draw_spec

from edgemem._native import ffi, isa_names, lib
from edgemem.kernels import SCORING_CODES, Core, reference
from edgemem.spec import ModelSpec

U = 2.0**-24
TOKENS = (1, 2, 5, 17)


@pytest.fixture(scope="module")
def cores() -> list[Core]:
    """One core per instruction set; all must give the first one's bytes."""
    made = [Core(1, isa) for isa in isa_names()]
    for core in made:
        core.reserve(1 << 20)
    return made


def spec_of(n_experts: int, top_k: int, **rules) -> ModelSpec:
    """A spec with these experts, which choose by these rules."""
    plain = draw_spec(Draw(1), "olmoe", 300)
    return replace(plain, n_experts=n_experts, top_k=top_k, **rules)


def run(core: Core, spec: ModelSpec, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The weights that experts get, as a table [tokens, experts]: NaN where not picked."""
    n, n_experts = logits.shape
    pairs = n * spec.top_k
    experts, first = np.zeros(n_experts, np.uint32), np.zeros(n_experts + 1, np.int32)
    tokens, weights = np.zeros(pairs, np.int32), np.zeros(pairs, np.float32)
    router = ffi.new("em_router *", {
        "n_experts": n_experts, "top_k": spec.top_k, "normalize": spec.normalize_top_k,
        "scoring": SCORING_CODES[spec.scoring], "n_groups": spec.n_groups,
        "top_groups": spec.top_groups, "scale": spec.routed_scale, "jitter": spec.router_jitter,
        "bias": ffi.NULL if bias is None else _pointer(bias),
    })  # fmt: skip
    count = lib.em_route(
        core.handle, router, _pointer(logits), n, _pointer(experts, "uint32_t *"),
        _pointer(first, "int32_t *"), _pointer(tokens, "int32_t *"), _pointer(weights),
    )  # fmt: skip
    assert 0 < count <= n_experts
    assert (np.diff(experts[:count].astype(int)) > 0).all(), "experts come in ascending order"
    assert first[0] == 0 and first[count] == pairs
    table = np.full((n, n_experts), np.nan, np.float32)
    for b in range(count):
        span = slice(first[b], first[b + 1])
        assert (np.diff(tokens[span]) > 0).all(), "tokens of an expert come in ascending order"
        table[tokens[span], experts[b]] = weights[span]
    return table


def check(cores, spec: ModelSpec, logits: np.ndarray, bias: np.ndarray | None = None) -> None:
    """All cores give one table, which is the reference's."""
    found = [run(core, spec, logits, bias) for core in cores]
    assert len({table.tobytes() for table in found}) == 1
    ids, weights = reference.choose(spec, logits.astype(np.float64), bias)
    expected = np.full(logits.shape, np.nan)
    np.put_along_axis(expected, ids, weights, axis=1)
    picked = ~np.isnan(expected)
    assert np.array_equal(~np.isnan(found[0]), picked), (spec.n_experts, spec.top_k)
    bound = (spec.n_experts + 24) * U * np.abs(expected[picked])
    assert (np.abs(found[0][picked] - expected[picked]) <= bound).all()


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("ties", (False, True))
def test_by_softmax(normalize, ties, cores, rng):
    for n_experts, tokens in itertools.product((1, 2, 15, 16, 17, 60, 251), TOKENS):
        top_k = min(n_experts, 1 + int(rng.integers(8)))
        logits = rng.normal(0, 3, (tokens, n_experts)).astype(np.float32)
        logits = np.round(logits) if ties else logits
        check(cores, spec_of(n_experts, top_k, normalize_top_k=normalize), logits)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("n_groups, top_groups", [(0, 0), (1, 1), (4, 1), (4, 3), (8, 8)])
def test_by_sigmoid(normalize, biased, n_groups, top_groups, cores, rng):
    rules = {"scoring": "sigmoid", "normalize_top_k": normalize, "router_bias": biased}
    rules |= {"n_groups": n_groups, "top_groups": top_groups, "routed_scale": 2.5}
    for n_experts, tokens in itertools.product((16, 24, 64), TOKENS):
        top_k = 1 + int(rng.integers(min(n_experts // max(n_groups, 1) * max(top_groups, 1), 8)))
        logits = rng.normal(0, 3, (tokens, n_experts)).astype(np.float32)
        bias = rng.normal(0, 0.5, n_experts).astype(np.float32) if biased else None
        check(cores, spec_of(n_experts, top_k, **rules), logits, bias)


@pytest.mark.parametrize("jitter", (0.0, 0.01, 0.3))
def test_sparsely_mixed(jitter, cores, rng):
    rules = {"scoring": "sparsemixer", "router_jitter": jitter}
    for n_experts, tokens in itertools.product((2, 16, 17), TOKENS):
        logits = rng.normal(0, 3, (tokens, n_experts)).astype(np.float32)
        check(cores, spec_of(n_experts, 2, **rules), logits)


def _pointer(array: np.ndarray, ctype: str = "float *"):
    assert array.flags.c_contiguous
    return ffi.cast(ctype, array.ctypes.data)
