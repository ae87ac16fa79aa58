"""Checkpoints whose experts are in MXFP4 give what they give in transformers, number for number."""

import numpy as np
import oracle
import pytest
import tiny
from tiny_families import gpt_oss

import edgemem
from edgemem import converters
from edgemem.kernels.reference import Forward, StoreWeights
from edgemem.store import Store

CONTEXT = tiny.IDS_COUNT + 2


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_kept_to_the_bit(seed, tmp_path, seed_base):
    """The same numbers as in transformers, which turns them into floats."""
    model = tiny.write(tmp_path / "hf", "gpt_oss", seed_base + seed, dtype="BF16", **gpt_oss.MXFP4)
    expected = oracle.Oracle(model.folder).logits(model.ids)
    found = Forward(model.spec, model.weights).feed(model.ids)
    assert oracle.relative_error(found, expected) <= 2e-5
    converters.convert(model.folder, tmp_path / "m.edgemem")
    with Store.open(tmp_path / "m.edgemem") as store:
        formats = {s.dtype.name for layout in store.layouts for s in layout.segments}
        assert formats == {"bf16", "f32", "mxfp4"}
        kept = StoreWeights(store)
        for (kind, layer, index), bundle in model.weights.bundles.items():
            if kind == "expert":
                for name, values in kept.expert(layer, index).items():
                    assert np.array_equal(values, np.atleast_2d(bundle[name])), (index, name)
    logits = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    # Activations have 8 bits here, which may turn a router's near tie.
    assert np.median(np.abs(logits - expected).max(axis=1)) <= 3e-2 * np.abs(expected).max()
