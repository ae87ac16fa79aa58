"""Stores of every version of the format open, verify, and hold what they were made of."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make

from edgemem._native import crc32c
from edgemem.dtypes import U32
from edgemem.format import NO_LAYER, Kind
from edgemem.kernels.reference import unpack
from edgemem.store import Store

golden_stores = pytest.mark.parametrize("golden", make.GOLDEN, ids=lambda g: g.path.stem)


def test_none_is_forgotten():
    assert {g.path for g in make.GOLDEN} == set(make.FOLDER.glob("*.edgemem"))


def segments(store: Store, bundle_id: int) -> dict[str, np.ndarray]:
    layout = store.layout_of(bundle_id)
    data = np.empty(layout.payload_bytes, np.uint8)
    store.read(bundle_id, data)
    found = {
        s.name: unpack(data[s.offset : s.end], s.dtype, s.rows, s.cols, s.lanes)
        for s in layout.segments
        if s.dtype is not U32
    }
    if "neurons" in found:
        found["neurons"] = found["neurons"][places(store, bundle_id)]
    return found


def places(store: Store, bundle_id: int) -> np.ndarray:
    """Where each row of neurons is."""
    found = store.places(bundle_id)
    return np.arange(store.layout_of(bundle_id)["neurons"].rows) if found is None else found


@golden_stores
def test_opens_and_decodes_to_what_was_painted(golden):
    with Store.open(golden.path) as store:
        assert store.verify().ok
        for (kind, layer, index), expected in make.weights(golden).items():
            if kind in (Kind.EMBED, Kind.HEAD):
                parts = [segments(store, i)["rows"] for i in store.find(kind, NO_LAYER)]
                found = {"rows": np.concatenate(parts)}
            else:
                found = segments(store, int(store.find(kind, layer)[index]))
            assert list(found) == list(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=f"{kind} {layer} {name}")


@golden_stores
def test_says_what_it_said(golden):
    with Store.open(golden.path) as store:
        expected = replace(golden.spec, eos_ids=(1, 2))
        assert store.spec == expected and store.page_size == 4096
        assert store.chat_template == "{{ messages[0].content }}"
        assert store.generation == {"top_k": 20} and store.recipe["dtype"] == golden.dtype
        assert b'"<s>"' in store.tokenizer_json and store.tokenizer_config["eos_token"] == "</s>"


@golden_stores
def test_the_converter_still_writes_the_same_bundles(golden, tmp_path):
    """Stores made by different versions are interchangeable, byte for byte of their payloads."""
    make.write_checkpoint(golden, tmp_path / "painted")
    golden.convert(tmp_path / "painted", tmp_path / "a")
    with Store.open(golden.path) as old, Store.open(tmp_path / "a") as new:
        np.testing.assert_array_equal(new.entries, old.entries)
        assert new.layouts == old.layouts


@pytest.mark.parametrize("golden", [g for g in make.GOLDEN if g.neurons], ids=lambda g: g.path.stem)
def test_rows_of_neurons_have_their_checksums(golden):
    with Store.open(golden.path) as store:
        for bundle_id in (
            i for n in range(store.spec.n_layers) for i in store.find(Kind.NEURONS, n).tolist()
        ):
            layout = store.layout_of(bundle_id)
            rows, sums = (
                store.read_segment(bundle_id, layout[s]) for s in ("neurons", "checksums")
            )
            each = len(rows) // layout["neurons"].rows
            starts = places(store, bundle_id) * each
            found = [crc32c(rows[i : i + each]) for i in starts.tolist()]
            assert np.frombuffer(sums, "<u4")[: len(found)].tolist() == found
