"""KV caches of every type: their bytes, in the budget and in memory, and what they change."""

import mmap

import numpy as np
import pytest

import edgemem
from edgemem import BudgetError
from edgemem._native import ffi, lib
from edgemem.budget import show_size
from edgemem.dtypes import KV_TYPES
from edgemem.kernels import Core
from edgemem.kvcache import KvCache, cache_bytes, token_bytes
from edgemem.spec import ModelSpec


@pytest.fixture(scope="module")
def spec(stories_store) -> ModelSpec:
    """Heads of 8: each is padded, to 16 or to 32."""
    with edgemem.load(stories_store) as engine:
        return engine.spec


def row(kv: str, head_dim: int) -> int:
    """Bytes of one head's keys, counted here once more."""
    if kv == "q8_0":
        return (head_dim + 31) // 32 * 34
    return (head_dim + 15) // 16 * 16 * {"f16": 2, "f32": 4}[kv]


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("context", (1, 7, 300))
def test_a_cache_has_the_bytes_that_are_said(spec, kv, context):
    rows = 2 * spec.n_layers * spec.n_kv_heads * ((context + 15) // 16 * 16)
    cache = KvCache(spec, context, kv)
    assert cache.bytes == cache_bytes(spec, context, kv) == rows * row(kv, spec.head_dim)
    assert token_bytes(spec, kv) * ((context + 15) // 16 * 16) == cache.bytes
    starts = [address(p) for layer in cache.layers for p in (layer.k_cache, layer.v_cache)]
    assert set(np.diff(starts)) == {cache.bytes // len(starts)}, "layers lie one after the other"


def address(pointer) -> int:
    return int(ffi.cast("uintptr_t", pointer))


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("tokens", (1, 17, 700, 2999, 3000))
def test_what_is_unused_was_not_touched(spec, kv, tokens):
    context, page = 3000, mmap.PAGESIZE
    cache, core = KvCache(spec, context, kv, huge=False), Core(1)
    core.reserve(lib.em_attention_scratch(1, spec.head_dim))
    assert cache.unused_bytes == cache.bytes
    cache.touch(tokens)
    widths = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads, 1)
    arrays = [np.ones((tokens, n * spec.head_dim), np.float32) for n in widths]
    q, k, v, angles = (ffi.cast("float *", a.ctypes.data) for a in arrays)
    for layer in cache.layers:
        status = lib.em_attention_store(core.handle, layer, q, k, v, angles, angles, 0, tokens)
        assert status == lib.EM_OK
    memory = np.frombuffer(cache._slab.view, np.uint8)
    written = (np.add.reduceat(memory != 0, np.arange(0, len(memory), page)) > 0).sum() * page
    assert 0 < written - page < cache.bytes - cache.unused_bytes
    empty = cache.bytes * (context - tokens) // context
    strips = 2 * spec.n_layers * spec.n_kv_heads
    assert empty - 3 * page * strips <= cache.unused_bytes <= empty


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_truncated_cache_goes_on_from_there(tiny_moe_store, kv):
    ids, other = np.arange(40, 80, dtype=np.int32), np.arange(7, 20, dtype=np.int32)
    with edgemem.load(tiny_moe_store, context=64, kv=kv) as engine:
        whole, last = engine.logits(ids), np.empty(engine.spec.vocab_size, np.float32)
        cache = engine.new_kv()
        for part in (ids[:33], other):
            engine.step(part, cache, "prefill", None)
        cache.truncate(33)
        engine.step(ids[33:], cache, "prefill", last)
        assert last.tobytes() == whole[-1].tobytes()
        with pytest.raises(ValueError, match="cannot truncate"):
            cache.truncate(len(ids) + 1)


def test_types_differ_by_little(tiny_moe_store, measured):
    logits = {}
    for kv in KV_TYPES:
        with edgemem.load(tiny_moe_store, context=64, kv=kv) as engine:
            assert engine.kv == kv
            logits[kv] = engine.logits(range(40, 104))
    largest = np.abs(logits["f32"]).max()
    errors = {kv: np.abs(logits[kv] - logits["f32"]).max() / largest for kv in ("f16", "q8_0")}
    measured(f"tiny-moe logits against a KV cache at f32: {errors}")
    assert 0 < errors["f16"] < 1e-3 and errors["f16"] < errors["q8_0"] < 3e-2


def test_f16_is_what_is_not_asked_for(stories_store):
    with edgemem.load(stories_store) as plain, edgemem.load(stories_store, kv="f16") as named:
        assert plain.kv == "f16"
        assert plain.logits([5, 6, 7]).tobytes() == named.logits([5, 6, 7]).tobytes()


@pytest.mark.parametrize("kv", ["q4_0", "bf16", "", None, 16])
def test_what_is_no_type_is_refused(stories_store, kv):
    with pytest.raises(ValueError, match="kv .*f16, q8_0, f32"):
        edgemem.load(stories_store, kv=kv)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_the_budget_counts_the_cache(tiny_moe_store, kv):
    with edgemem.load(tiny_moe_store, context=512, kv=kv) as engine:
        size = cache_bytes(engine.spec, 512, kv)
        items = [item for item in engine.budget._items if item.label.startswith("KV cache")]
        assert [item.bytes for item in items] == [size] and f"at {kv}" in items[0].label
        promised = engine.budget.promised
        first, second = engine.session(), engine.session()
        assert engine.budget.promised == promised + size + 4 * engine.spec.vocab_size
        assert {cache.bytes for cache in engine._caches} == {size}
        first.close()
        second.close()


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_refusal_names_the_smaller_cache_where_it_fits(tiny_moe_store, kv):
    with edgemem.load(tiny_moe_store, context=512, kv=kv) as engine:
        smaller = cache_bytes(engine.spec, 512, "q8_0")
        engine.budget.limit = engine.budget.promised + smaller - 1
        with pytest.raises(BudgetError) as refusal:
            engine.budget.take([engine._kv_item], engine._advise)
        assert "--kv q8_0" not in str(refusal.value)
        if kv != "q8_0":
            engine.budget.limit += 1
            with pytest.raises(BudgetError) as refusal:
                engine.budget.take([engine._kv_item], engine._advise)
            assert f"would fit: {show_size(smaller)} (--kv q8_0)" in str(refusal.value)
