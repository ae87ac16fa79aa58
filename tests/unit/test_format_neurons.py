"""The bytes of a store whose neurons stream one by one, and of what foretells them."""

import json
from dataclasses import replace

import painted
import pytest

from edgemem import dtypes
from edgemem.errors import CorruptError, UnsupportedError
from edgemem.format import Kind
from edgemem.store import Store


def test_a_store_of_neurons_is_read_back(tmp_path):
    path = painted.write(tmp_path / "a", painted.APART)
    with Store.open(path) as store:
        layout = store.layout_of(int(store.find(Kind.NEURONS, 0)[0]))
        assert store.spec == painted.APART and store.verify().ok
        assert [s.name for s in layout.segments] == ["neurons", "checksums"]
        assert (layout["neurons"].rows, layout["neurons"].cols) == (24, 64)


def test_a_store_of_what_is_foretold_is_read_back(tmp_path):
    path = painted.write(tmp_path / "a", painted.FORETOLD)
    with Store.open(path) as store:
        neurons, predictor = (
            store.layout_of(int(store.find(kind, 0)[0])) for kind in (Kind.NEURONS, Kind.PREDICTOR)
        )
        assert store.spec == painted.FORETOLD and store.verify().ok
        assert (neurons["neurons"].rows, neurons["neurons"].cols) == (24, 96)
        assert [s.name for s in predictor.segments] == ["reduce", "score", "score_bias"]
        assert (predictor["score"].rows, predictor["score"].cols) == (24, 32)


def _meta(change):
    def changed(data: bytes) -> bytes:
        found = json.loads(data)
        change(found)
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()

    return changed


def _segment(meta: dict, name: str) -> dict:
    return next(s for layout in meta["layouts"] for s in layout if s["name"] == name)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _segment(m, "neurons").update(dtype="u32"),
        lambda m: _segment(m, "checksums").update(dtype="f32"),
        lambda m: _segment(m, "checksums").update(cols=23),
        lambda m: _segment(m, "neurons").update(rows=23),
        lambda m: _segment(m, "neurons").update(lanes=16),
        lambda m: _segment(m, "gate").update(dtype="u32"),
        lambda m: _segment(m, "rows").update(dtype="u32"),
        lambda m: m["spec"].update(activation="silu"),
        lambda m: m["spec"].update(neurons=False),
        lambda m: m["spec"].update(gated=False),
    ],
)
def test_neurons_that_do_not_fit_their_model_are_refused(tmp_path, change):
    path = painted.write(tmp_path / "a", painted.APART, dtypes.F32)
    painted.rewrite(path, meta=_meta(change))
    with pytest.raises((CorruptError, UnsupportedError)):
        Store.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["spec"].update(ranks=[]),
        lambda m: m["spec"].update(ranks=[0]),
        lambda m: m["spec"].update(ranks=[31]),
        lambda m: m["spec"].update(ranks=[33]),
        lambda m: m["spec"].update(ranks=[32, 32]),
        lambda m: m["spec"].update(neurons=False),
        lambda m: _segment(m, "reduce").update(cols=31),
        lambda m: _segment(m, "score").update(dtype="u32"),
        lambda m: _segment(m, "score").update(dtype="f16"),
        lambda m: _segment(m, "score_bias").update(cols=23),
        lambda m: _segment(m, "neurons").update(cols=64),
    ],
)
def test_predictors_that_do_not_fit_their_model_are_refused(tmp_path, change):
    path = painted.write(tmp_path / "a", painted.FORETOLD, dtypes.F32)
    painted.rewrite(path, meta=_meta(change))
    with pytest.raises((CorruptError, UnsupportedError)):
        Store.open(path)


def test_neurons_are_whole_blocks(tmp_path):
    with pytest.raises(CorruptError, match="whole blocks"):
        painted.write(tmp_path / "a", replace(painted.APART, hidden=48, head_dim=24), dtypes.Q8_0)


def test_rows_of_neurons_are_in_formats_that_rows_have(tmp_path):
    spec = replace(painted.APART, hidden=256, head_dim=128)
    with pytest.raises(CorruptError, match="neurons of layer 0 are in q4_1"):
        painted.write(tmp_path / "a", spec, dtypes.Q4_1)
