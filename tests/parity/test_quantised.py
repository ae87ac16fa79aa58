"""Engines of q8_0 and q4_0 stores compute what their stores' numbers mean.

The judge is the definition over the store's own unpacked weights, so what quantising costs is not
in question here, only that nothing else is lost: activations are rounded to 8 bits in each product,
which moves logits by about one per cent. Routed models would need routers without near ties at that
precision; `test_checkpoints` measures a trained one.
"""

import oracle
import pytest
import tiny
from tiny_config import DENSE_TYPES

import edgemem
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
