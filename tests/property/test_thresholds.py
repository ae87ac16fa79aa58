"""Neurons below thresholds rest where that is asked for: one answer at every budget, and without
the mode that of the whole FFN, whatever the activation."""

import json
import subprocess
import sys

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer

import edgemem
from edgemem import converters
from edgemem.calibration import calibrate
from edgemem.converters import calibrated
from edgemem.errors import CorruptError, UnsupportedError
from edgemem.perplexity import perplexity
from edgemem.spec import ACTIVATIONS, ModelSpec
from edgemem.store import Store
from edgemem.thresholds import SHARES, choose_thresholds

CASES = [
    *(("llama", activation) for activation in ACTIVATIONS),
    *((kind, activation) for kind in ("opt", "falcon") for activation in ACTIVATIONS[:-1]),
    ("qwen2_moe", "silu"),
]


def loaded(path, **options) -> bytes:
    with edgemem.load(path, **options) as engine:
        return answer(engine)


def apart(folder, kind: str, seed: int, activation: str, dtype: str):
    """Stores of a tiny random model with FFNs as a whole, and taken apart."""
    layers = {"n_layers": 2, "windows": (0, 0), "routed": (True, False)}  # some have experts
    facts = {"activation": activation, "intermediate": 150}
    tiny.write(folder / "model", kind, seed, **facts | (layers if kind == "qwen2_moe" else {}))
    made = folder / "whole.edgemem", folder / "apart.edgemem"
    for path, neurons in zip(made, (False, True), strict=True):
        converters.convert(folder / "model", path, dtype=dtype, neurons=neurons)
    return made


def with_thresholds(path, target, threshold: float):
    """The same store with one threshold for all layers whose FFNs are taken apart."""
    with Store.open(path) as store:
        thresholds = [0.0 if routed else threshold for routed in store.spec.routed]
        calibrated.write_thresholds(store, target, thresholds, {"used": 0.5})
    return target


def taken(engine) -> int:
    """Rows that were demanded so far."""
    counted = engine._streamer.rows.statistics()
    return counted["hits"] + counted["misses"]


@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_any_activation_comes_apart_and_its_neurons_may_rest(kind, activation, tmp_path, seed_base):
    case = ACTIVATIONS.index(activation)
    dtype = ("keep", "f16")[case % 2]
    whole, path = apart(tmp_path, kind, seed_base + 9100 + case, activation, dtype)
    out = with_thresholds(path, tmp_path / "sparse.edgemem", 0.1)
    exact, expected = loaded(whole), loaded(out, sparse=True)
    assert loaded(path) == loaded(out) == exact != expected
    for i, share in enumerate((0.0, 0.3, 0.8)):
        options = {"threads": 1 + i, "io_engine": "threads", "lookahead": i % 2 == 0}
        chunk = (1, 5, None)[(i + case) % 3]
        with streaming.opened(out, share, chunk, sparse=True, **options) as engine:
            assert len(engine._plan.apart) > 0
            assert answer(engine) == expected, share
            fewer = taken(engine)
        with streaming.opened(out, share, chunk, **options) as engine:
            assert answer(engine) == exact, share
            assert fewer < taken(engine)


@pytest.fixture(scope="module", params=("stories260k", "tiny-relu"))
def chosen(request, shared, tmp_path_factory):
    """A trained model with thresholds, the same without, what was said, and the text."""
    folder = tmp_path_factory.mktemp("thresholds")
    path, out = folder / "exact.edgemem", folder / "sparse.edgemem"
    converters.convert(shared / "models" / request.param, path, neurons=True)
    text = (shared / "text" / "wikitext-2-valid.txt").read_text()[:200_000]
    return path, out, choose_thresholds(path, text, out, cost=0.02, limit=2048), text


def test_what_was_chosen_costs_no_more_than_was_asked(chosen):
    _, out, report, text = chosen
    assert report.cost <= 0.02
    assert report.sparsity.used < report.sparsity.active - 0.05
    assert report.sparsity.lost in SHARES
    with edgemem.load(out, sparse=True, context=256) as engine:
        ids = engine.tokenizer.encode(text, special=False)
        unseen = ids[report.tokens :][: report.judged_tokens]
        found = perplexity(engine, unseen, 256).perplexity
    assert found == pytest.approx(report.sparsity.sparse_perplexity, rel=1e-9)


def test_tokens_use_as_many_neurons_as_is_said(chosen):
    _, out, report, text = chosen
    for sparse, said in ((True, report.sparsity.used), (False, report.sparsity.active)):
        with streaming.opened(out, 0.5, 1, sparse=sparse, context=256) as engine:
            ids = engine.tokenizer.encode(text, special=False)
            unseen = ids[report.tokens :][:256]
            with engine.session() as session:
                session.feed(unseen)
            neurons = len(unseen) * engine.spec.n_layers * engine.spec.intermediate
            assert taken(engine) / neurons == pytest.approx(said, rel=0.1)


def test_a_trained_model_gives_one_answer(chosen):
    path, out, _, _ = chosen
    exact, expected = loaded(path), loaded(out, sparse=True)
    assert loaded(out) == exact != expected
    for i, share in enumerate((0.0, 0.1, 0.5, 0.97)):
        with streaming.opened(out, share, (7, None, 1)[i % 3], threads=1 + i % 3,
                              sparse=i < 3) as engine:  # fmt: skip
            assert answer(engine) == (expected if i < 3 else exact), share


def test_the_store_says_what_thresholds_cost(chosen):
    _, out, report, _ = chosen
    with Store.open(out) as store:
        said, thresholds = store.recipe["sparse"], store.spec.thresholds
        assert store.verify().ok
    assert said["sparse_perplexity"] / said["perplexity"] - 1 == pytest.approx(report.cost)
    assert (said["used"], said["active"]) == (report.sparsity.used, report.sparsity.active)
    assert list(thresholds) == [one.threshold for one in report.layers]
    for one in report.layers:
        assert one.used < one.active <= 1


def test_a_higher_cost_lets_more_rest(chosen, tmp_path):
    path, _, report, text = chosen
    more = choose_thresholds(path, text, tmp_path / "more.edgemem", cost=0.2, limit=2048)
    assert more.sparsity.used < report.sparsity.used and report.cost < more.cost <= 0.2


def test_thresholds_and_predictors_live_in_one_store(shared, tmp_path):
    path, ids = tmp_path / "both.edgemem", np.arange(5, 405)
    converters.convert(shared / "models" / "tiny-relu", path, neurons=True)
    exact = loaded(path)
    choose_thresholds(path, ids, cost=0.5, limit=400)
    sparse = loaded(path, sparse=True)
    calibrate(path, ids, recall=0.8, limit=300)
    assert loaded(path) == exact and loaded(path, sparse=True) == sparse
    choose_thresholds(path, ids, cost=0.5, limit=400)
    assert loaded(path) == exact and loaded(path, sparse=True) == sparse
    assert loaded(path, predict=True) not in (exact, sparse)
    with Store.open(path) as store:
        assert {"sparse", "predictor"} <= set(store.recipe)
    with pytest.raises(ValueError, match="choose one"):
        edgemem.load(path, predict=True, sparse=True)


def test_what_cannot_be_done_is_refused(chosen, tiny_moe_store, tmp_path):
    path, out, _, _ = chosen
    before, ids = path.read_bytes(), list(range(200))
    with pytest.raises(UnsupportedError, match="not taken apart"):
        choose_thresholds(tiny_moe_store, ids, tmp_path / "x.edgemem")
    with pytest.raises(UnsupportedError, match="calibrate --cost"):
        edgemem.load(path, sparse=True)
    for options, words in (
        ({"cost": 0}, "cost"), ({"cost": -1}, "cost"), ({"cost": float("nan")}, "cost"),
        ({"cost": float("inf")}, "cost"), ({"limit": 5}, "limit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            choose_thresholds(path, ids, **options)
    with pytest.raises(ValueError, match="30 tokens"):
        choose_thresholds(path, ids[:30], tmp_path / "x.edgemem")
    with pytest.raises(edgemem.StoreError, match="exists"):
        choose_thresholds(path, ids, out)
    assert path.read_bytes() == before and not list(tmp_path.iterdir())


def test_predictors_are_for_relu(shared, tmp_path):
    converters.convert(shared / "models" / "stories260k", tmp_path / "a", neurons=True)
    with pytest.raises(UnsupportedError, match="--cost"):
        calibrate(tmp_path / "a", list(range(200)))


@pytest.mark.parametrize(
    "change",
    ({"thresholds": ()}, {"thresholds": (0.1,)}, {"thresholds": (0.1, -0.1)},
     {"thresholds": (0.1, 1e31)}, {"neurons": False}, {"thresholds": (0.1, "0.1")},
     {"thresholds": (0.1, True)}, {"routed": (False, True)}),
)  # fmt: skip
def test_thresholds_that_do_not_fit_their_model_are_refused(change, tmp_path):
    model = tiny.write(tmp_path / "m", "qwen2_moe", 3, activation="silu", n_layers=2,
                       windows=(0, 0), routed=(False, False), intermediate=20)  # fmt: skip
    spec = model.spec.to_dict() | {"neurons": True, "thresholds": (0.1, 0.2)}
    assert ModelSpec.from_dict(spec).thresholds == (0.1, 0.2)
    with pytest.raises(CorruptError):
        ModelSpec.from_dict(spec | change)


def edgemem_cli(*arguments) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "edgemem", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True)


def test_the_command_line_says_what_it_costs(shared, tmp_path):
    path, text = tmp_path / "a.edgemem", tmp_path / "text.txt"
    done = edgemem_cli("convert", shared / "models" / "stories260k", "-o", path, "--neurons")
    assert "with silu no neuron rests" in done.stderr and "--cost" in done.stderr
    text.write_text((shared / "text" / "wikitext-2-valid.txt").read_text()[:20_000])
    done = edgemem_cli("run", path, "--sparse", "-p", "One day", "-n", 4)
    assert done.returncode == 1 and "edgemem calibrate --cost" in done.stderr
    done = edgemem_cli("calibrate", path, "-f", text, "--cost", 0.05, "--recall", 0.9)
    assert done.returncode == 2 and "choose one" in done.stderr
    done = edgemem_cli("calibrate", path, "-f", text, "--cost", 0.05, "--limit", 512)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| layer | threshold |") and "instead of 100.0 %" in done.stdout
    said = done.stdout.splitlines()[-1]
    done = edgemem_cli("run", path, "--sparse", "-p", "One day", "-n", 4, "--json")
    assert json.loads(done.stdout)["sparse"] is True and said in done.stderr
    done = edgemem_cli("run", path, "-p", "One day", "-n", 4)
    assert "changes the answer" not in done.stderr
