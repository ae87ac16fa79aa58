"""What streaming is compared with: slower ways to load give the same answers, and read what they
say."""

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer

import edgemem
from edgemem import converters
from edgemem.errors import UnsupportedError
from edgemem.format import Kind


def made(folder, kind: str, seed: int) -> str:
    tiny.write(folder / "model", kind, seed, activation="relu", intermediate=150)
    path = str(folder / "store.edgemem")
    converters.convert(folder / "model", path, neurons=True)
    return path


@pytest.mark.parametrize("loading", ("hybrid", "naive"))
@pytest.mark.parametrize("name", ("tiny_relu_store", "tiny_moe_store"))
def test_loading_changes_no_answer(name, loading, request):
    path = request.getfixturevalue(name)
    with edgemem.load(path) as engine:
        expected = answer(engine)
    for share in (0.0, 0.5):
        with streaming.opened(path, share, 5, loading=loading) as engine:
            assert streaming.streams(engine)
            assert answer(engine) == expected
    with edgemem.load(path, loading=loading) as engine:
        assert answer(engine) == expected


@pytest.mark.parametrize("options", ({"windowing": False}, {"bundling": False}))
@pytest.mark.parametrize("kind", ("llama", "opt"))
def test_neurons_come_in_other_ways(kind, options, tmp_path, seed_base):
    path = made(tmp_path, kind, seed_base + 62)
    with edgemem.load(path) as engine:
        expected = answer(engine)
    for share in (0.0, 0.5):
        with streaming.opened(path, share, 5, **options) as engine:
            assert len(engine._plan.apart) and answer(engine) == expected


def counted(path, share: float, **options) -> tuple[np.ndarray, int]:
    """Bytes read in each step of one token after the first, and of all bundles that it takes."""
    with streaming.opened(path, share, **options) as engine:
        residency, read = engine._streamer._residency, []
        taken = int(residency.sizes[residency.resident].sum())
        taken += int(residency.sizes[residency.streamed][residency.kinds != Kind.EMBED].sum())
        with engine.session() as session:
            for i in range(5, 15):
                session.feed([i])
                read.append(engine._statistics()["read_bytes"])
    return np.diff(read), taken


def test_naive_loading_reads_all_weights_in_each_step(tiny_relu_store):
    read, taken = counted(tiny_relu_store, 0.9, loading="naive")
    assert (read >= taken).all()
    less, _ = counted(tiny_relu_store, 0.9, loading="hybrid")
    assert (less < taken / 2).all() and less.sum() > 0


def test_without_windows_nothing_stays_and_without_bundles_reads_are_more(tmp_path, seed_base):
    path = made(tmp_path, "llama", seed_base + 64)
    found = {}
    for name, options in (
        ("whole", {}), ("windowless", {"windowing": False}), ("in parts", {"bundling": False}),
    ):  # fmt: skip
        with streaming.opened(path, 0.9, **options) as engine:
            with engine.session() as session:
                for i in range(5, 25):
                    session.feed([i])
            found[name] = engine._streamer.rows.statistics()
    assert found["windowless"]["hits"] == 0 < found["whole"]["hits"]
    assert found["windowless"]["misses"] > found["whole"]["misses"]
    assert found["in parts"]["hits"] == found["whole"]["hits"]
    assert found["in parts"]["reads"] > found["whole"]["reads"]


def test_baselines_are_not_made_weak(tmp_path, seed_base):
    path = made(tmp_path, "llama", seed_base + 65)
    for loading in ("hybrid", "naive"):
        with pytest.raises(UnsupportedError, match="without --neurons"):
            edgemem.load(path, loading=loading)
    with pytest.raises(ValueError, match="stream, hybrid, naive"):
        edgemem.load(path, loading="eager")


def test_what_is_of_neurons_is_refused_without_them(tiny_relu_store):
    for options in ({"windowing": False}, {"bundling": False}):
        with pytest.raises(UnsupportedError, match="--neurons"):
            edgemem.load(tiny_relu_store, **options)
