"""FFNs taken apart: the answer is that of the whole FFN, at every budget, whatever reads do."""

import re
import subprocess
import sys

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer

import edgemem
from edgemem import converters
from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import Kind
from edgemem.kernels.reference import Forward, StoreWeights, linear
from edgemem.store import Store

ENGINES = ("threads", "io_uring")
KINDS = ("llama", "opt", "falcon")
CASES = 24


def relu(folder, kind: str, seed: int, **facts):
    """A tiny checkpoint whose FFNs have ReLU, or every third its square."""
    activation = "relu2" if seed % 3 == 0 and kind == "llama" else "relu"
    facts = {"activation": activation, "intermediate": 150} | facts
    return tiny.write(folder, kind, seed, **facts)


def both(folder, target, dtype: str) -> tuple[str, str]:
    """Stores of a checkpoint with FFNs as a whole, and taken apart."""
    made = []
    for apart in (False, True):
        made.append(f"{target}-{dtype}-{apart}.edgemem")
        converters.convert(folder, made[-1], dtype=dtype, neurons=apart)
    return made[0], made[1]


def loaded(path, **options) -> bytes:
    with edgemem.load(path, **options) as engine:
        return answer(engine)


@pytest.mark.parametrize("case", range(CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_floats_give_the_bytes_of_the_whole(kind, case, tmp_path, seed_base):
    relu(tmp_path / "model", kind, seed_base + 8000 + case)
    dtype = ("keep", "f16")[case % 2]
    whole, apart = both(tmp_path / "model", tmp_path / "store", dtype)
    with Store.open(apart) as store:
        assert store.spec.neurons and len(store.find(Kind.NEURONS, 0)) == 1
    expected = loaded(whole)
    assert loaded(apart, threads=1 + case % 3) == expected
    with streaming.opened(apart, (0.0, 0.4, 0.9)[case % 3], chunk=(1, 5, None)[case % 3]) as engine:
        assert streaming.streams(engine) and len(engine._plan.apart) > 0
        assert answer(engine) == expected


@pytest.fixture(scope="module", params=("keep", "q8_0", "q4_0"))
def trained(request, shared, tmp_path_factory) -> str:
    """The trained model, whose neurons rest as those of real ones do."""
    source = shared / "models" / "tiny-relu"
    target = tmp_path_factory.mktemp("neurons") / request.param
    return both(source, target, request.param)[1]


@pytest.mark.parametrize("io_engine", ENGINES)
def test_every_budget_gives_one_answer(trained, io_engine):
    expected = loaded(trained)
    for i, share in enumerate((0.0, 0.1, 0.3, 0.6, 0.97)):
        options = {"io_engine": io_engine, "threads": 1 + i % 3, "lookahead": i % 2 == 0}
        try:
            with streaming.opened(trained, share, (7, None, 1)[i % 3], **options) as engine:
                assert len(engine._plan.apart) > 0
                assert answer(engine) == expected, share
        except UnsupportedError as error:
            pytest.skip(f"no {io_engine} here: {error}")


@pytest.mark.parametrize("share", (0.01, 0.1, 0.25))
def test_turns_that_want_more_than_there_is_room_for_find_some(trained, share):
    """What is there stays for the next token; ascending rounds would throw all of it out."""
    with streaming.opened(trained, share) as engine:
        rows, ids = engine._streamer.rows, list(range(5, 45))
        with engine.session() as session:
            for i in ids:
                session.feed([i])
        found = rows.statistics()
    active = (found["hits"] + found["misses"]) / len(ids) / engine.spec.n_layers
    room = rows.rooms[0]
    assert room < active
    assert found["hits"] / (found["hits"] + found["misses"]) > 0.3 * room / active


def test_ffns_of_one_neuron_stream(tmp_path):
    relu(tmp_path / "model", "llama", 5, intermediate=1)
    _, apart = both(tmp_path / "model", tmp_path / "store", "keep")
    expected = loaded(apart)
    with streaming.opened(apart, 0.0) as engine:
        assert len(engine._plan.apart) > 0 and answer(engine) == expected


RUN = """
import sys, edgemem
with edgemem.load(sys.argv[1], sys.argv[2], context=64) as engine:
    print(len(engine._plan.apart), engine.budget.limit)
    engine.generate("Once upon a time", max_tokens=8)
from edgemem.budget import peak_bytes
print(peak_bytes())
"""


def test_what_is_advised_runs_and_what_runs_keeps_its_budget(trained):
    """The floor is honest: no size is refused with an advice that does not run, nor breaks."""

    def run(mebibytes: int) -> tuple[str, str]:
        argv = [sys.executable, "-c", RUN, trained, f"{mebibytes}M"]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0 or "does not fit" in done.stderr, done.stderr
        return done.stdout, done.stderr

    _, refused = run(45)
    advised = int(re.search(r"--memory (\d+)M", refused)[1])
    ran = 0
    for more in (0, 2, 5, 9):
        out, _ = run(advised + more)
        if out:
            ran += 1
            (_, limit), peak = out.split("\n")[0].split(), int(out.split("\n")[1])
            assert peak <= int(limit)
    assert ran >= 3, "an advice may be too small by what a process starts with, not by more"


def test_a_trace_of_its_bundles_can_be_replayed(trained, tmp_path):
    from bench.replay_traces import read

    with streaming.opened(trained, 0.4, trace=tmp_path / "a.trace") as engine:
        answer(engine)
    found = read(tmp_path / "a.trace")
    assert len(found.slots) == len(set(found.class_of.tolist()))


def test_room_that_comes_and_goes_changes_no_answer(trained, seed_base):
    random = np.random.default_rng(seed_base)
    expected = loaded(trained)
    with streaming.opened(trained, 0.9, 4) as engine:
        most, least = engine._slab_room(), engine._plan.least_bytes
        engine._slab_room = lambda: int(random.integers(least, most + 1))
        assert answer(engine) == expected
        engine.clear()
        assert answer(engine) == expected


def test_neurons_of_the_last_tokens_stay(trained):
    with streaming.opened(trained, 0.6) as engine:
        ids = list(range(5, 45))
        with engine.session() as session:
            session.feed(ids[:1])
            before = engine._statistics()
            for i in ids[1:]:
                session.feed([i])
            after = engine._statistics()
        hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
        assert hits > misses, "most of a token's neurons were used by those before it"
        engine.clear()
        with engine.session() as session:
            session.feed(ids[:1])
        assert engine._statistics()["misses"] > after["misses"]


def test_only_active_neurons_are_read_and_multiplied(trained):
    """As many as the reference finds, but for ones that rounding decides."""
    ids, active = list(range(5, 25)), 0
    with streaming.opened(trained, 0.97) as engine:
        weights = StoreWeights(engine.store)

        def count(layer: int, name: str, h: np.ndarray) -> None:
            nonlocal active
            if name == "ffn_norm":
                active += int((linear(h, weights.ffn(layer)["gate"]) > 0).sum())

        Forward(engine.spec, weights, watch=count).feed(ids)
        with engine.session() as session:
            for i in ids:
                session.feed([i])
        taken = engine._streamer.rows.statistics()
    neurons = len(ids) * engine.spec.n_layers * engine.spec.intermediate
    assert taken["hits"] + taken["misses"] == pytest.approx(active, rel=0.02)
    assert active < 0.6 * neurons


def test_what_cannot_be_taken_apart_is_refused(shared, tmp_path):
    routed = shared / "models" / "tiny-moe"
    with pytest.raises(UnsupportedError, match="all layers have experts"):
        converters.convert(routed, tmp_path / "a.edgemem", neurons=True)
    odd = tiny.write(
        tmp_path / "odd", "llama", 5, activation="relu", hidden=40, n_heads=2, n_kv_heads=1,
        head_dim=8,
    ).folder  # fmt: skip
    with pytest.raises(UnsupportedError, match="rows of 40"):
        converters.convert(odd, tmp_path / "b.edgemem", dtype="q8_0", neurons=True)
    assert not (tmp_path / "a.edgemem").exists() and not (tmp_path / "b.edgemem").exists()


def test_a_missing_matrix_is_named_once(tmp_path):
    model = relu(tmp_path / "model", "opt", 4)
    tensors = {n: t for n, t in model.tensors.items() if not n.endswith("0.fc2.weight")}
    for file in model.folder.glob("*.safetensors*"):
        file.unlink()
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="fc2.weight") as error:
        converters.convert(model.folder, tmp_path / "a.edgemem", neurons=True)
    assert str(error.value).count("0.fc2.weight") == 1


def test_blocks_of_256_columns_are_refused(tmp_path, seed_base):
    model = relu(tmp_path / "model", KINDS[0], seed_base, hidden=256, n_heads=4, n_kv_heads=4,
                 head_dim=64)  # fmt: skip
    with pytest.raises(UnsupportedError, match="row by row, which q4_k is not made for; choose"):
        converters.convert(model.folder, tmp_path / "a", dtype="q4_k", neurons=True)


@pytest.mark.parametrize("dtype", ("keep", "q8_0", "q4_0"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_arrives(kind, dtype, tmp_path, seed_base):
    model = relu(tmp_path / "model", kind, seed_base + 9, hidden=64, n_heads=4, n_kv_heads=4,
                 head_dim=16)  # fmt: skip
    report = converters.convert(model.folder, tmp_path / "a", dtype=dtype, neurons=True)
    step = {"keep": 0, "q8_0": 1 / 200, "q4_0": 1 / 7.5}[dtype]
    with Store.open(tmp_path / "a") as store:
        assert store.verify().ok and report.bundles == len(store.entries)
        weights = StoreWeights(store)
        for layer in range(store.spec.n_layers):
            found = weights.ffn(layer)
            expected = model.weights.ffn(layer)
            assert set(found) == set(expected)
            for name, value in expected.items():
                tolerance = 0 if value.ndim == 1 else step * np.abs(value).max()
                assert np.abs(found[name].reshape(value.shape) - value).max() <= tolerance, name
