"""Engines of quantised stores compute what their stores' numbers mean.

The judge is the definition over the store's own unpacked weights, so what quantising costs is not
in question here, only that nothing else is lost: activations are rounded to 8 bits in each product,
which moves logits by about one per cent. Routed models would need routers without near ties at that
precision; `test_checkpoints` measures a trained one.
"""

import oracle
import pytest
import tiny
import tiny_gguf
from tiny_config import DENSE_TYPES

import edgemem
from edgemem import converters
from edgemem.kernels.reference import Forward, StoreWeights
from edgemem.store import Store

BOUND = 0.04


@pytest.mark.parametrize("dtype", ("q8_0", "q4_0"))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", DENSE_TYPES)
def test_the_engine_computes_what_the_store_means(
    kind, seed, dtype, tmp_path, convert_store, seed_base
):
    model = tiny.write(tmp_path / kind, kind, seed_base + 500 + seed)
    path = convert_store(model.folder, dtype)
    with Store.open(path) as store:
        expected = Forward(store.spec, StoreWeights(store), "f16").feed(model.ids)
        kinds = {segment.dtype.name for layout in store.layouts for segment in layout.segments}
    assert dtype in kinds
    with edgemem.load(path, context=tiny.IDS_COUNT, threads=1) as engine:
        assert oracle.relative_error(engine.logits(model.ids), expected) <= BOUND


@pytest.mark.parametrize("dtype", ("q6_k", "q4_k", "q2_k"))
@pytest.mark.parametrize("blocks", (0, 256))
def test_searched_blocks_are_computed_with(dtype, blocks, tmp_path, convert_store, seed_base):
    """Also what rows get that are not whole blocks: llamas that `tiny` draws have such rows."""
    facts = tiny_gguf.facts("llama", 0, blocks=256) if blocks else {}
    model = tiny.write(tmp_path / "model", "llama", seed_base + 520, **facts)
    path = convert_store(model.folder, dtype)
    with Store.open(path) as store:
        expected = Forward(store.spec, StoreWeights(store), "f16").feed(model.ids)
    with edgemem.load(path, context=tiny.IDS_COUNT, threads=1) as engine:
        assert oracle.relative_error(engine.logits(model.ids), expected) <= BOUND


KINDS = (*tiny_gguf.BLOCKS, tiny_gguf.q4_k_m, tiny_gguf.of_every_type)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: getattr(k, "name", None) or k.__name__)
def test_blocks_of_a_gguf_are_computed_with_as_they_are(kind, tmp_path, seed_base):
    facts = tiny_gguf.facts("qwen3", 0, blocks=256)
    model = tiny.write(tmp_path / "hf", "qwen3", seed_base, **facts)
    converters.convert(tiny_gguf.write(tmp_path / "m.gguf", model, kind), tmp_path / "m.edgemem")
    with Store.open(tmp_path / "m.edgemem") as store:
        expected = Forward(store.spec, StoreWeights(store), "f16").feed(model.ids)
    with edgemem.load(tmp_path / "m.edgemem", context=tiny.IDS_COUNT, threads=2) as engine:
        assert oracle.relative_error(engine.logits(model.ids), expected) <= BOUND
