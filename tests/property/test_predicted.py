"""Neurons that are foretold: one answer at every budget, which is the exact one where all are."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import streaming
import tiny
from streaming import answer

import edgemem
from edgemem import converters
from edgemem._native import lib
from edgemem.calibration import calibrate
from edgemem.cli import options
from edgemem.converters import calibrated
from edgemem.errors import UnsupportedError
from edgemem.perplexity import perplexity
from edgemem.predictors.low_rank import Predictor
from edgemem.store import Store

ENGINES = ("threads", "io_uring")
KINDS = ("llama", "opt", "falcon")


def loaded(path, **options) -> bytes:
    with edgemem.load(path, **options) as engine:
        return answer(engine)


def apart(folder, target, kind: str, seed: int, dtype: str):
    """A store of a tiny random model whose FFNs are taken apart, and some token ids."""
    activation = "relu2" if seed % 3 == 0 and kind == "llama" else "relu"
    tiny.write(folder, kind, seed, activation=activation, intermediate=150)
    converters.convert(folder, target, dtype=dtype, neurons=True)
    with Store.open(target) as store:
        vocab = store.spec.vocab_size
    return np.random.default_rng(seed).integers(0, vocab, 200)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_every_budget_gives_one_answer(kind, case, tmp_path, seed_base):
    path, out = tmp_path / "a.edgemem", tmp_path / "b.edgemem"
    dtype = ("keep", "f16")[case % 2]
    ids = apart(tmp_path / "model", path, kind, seed_base + 9000 + case, dtype)
    calibrate(path, ids, out, recall=0.7, limit=160)
    assert loaded(out) == loaded(path), "exact runs are what they were"
    expected = loaded(out, predict=True)
    for i, share in enumerate((0.0, 0.3, 0.8)):
        options = {"threads": 1 + i, "predict": True, "io_engine": "threads"}
        with streaming.opened(out, share, (1, 5, None)[(i + case) % 3], **options) as engine:
            assert len(engine._plan.apart) > 0
            assert answer(engine) == expected, share
    with streaming.opened(out, 0.3) as engine:
        assert answer(engine) == loaded(path)


def calibrated_relu(shared, folder, dtype: str):
    """The trained model with predictors, beside the same without, and what calibrating said."""
    path, out = folder / "exact.edgemem", folder / "predicted.edgemem"
    converters.convert(shared / "models" / "tiny-relu", path, dtype=dtype, neurons=True)
    text = (shared / "text" / "wikitext-2-valid.txt").read_text()
    return path, out, calibrate(path, text[:200_000], out, recall=0.95, limit=6144)


@pytest.fixture(scope="module", params=("q8_0", "q4_0"))
def formats(request, shared, tmp_path_factory):
    """In block formats."""
    return calibrated_relu(shared, tmp_path_factory.mktemp("predicted"), request.param)


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """As it was trained."""
    return calibrated_relu(shared, tmp_path_factory.mktemp("predicted"), "keep")


def naming_all(spec) -> list[Predictor]:
    """Predictors that name every neuron."""
    one = Predictor(
        np.zeros((32, spec.hidden), np.float32),
        np.zeros((spec.intermediate, 32), np.float32),
        np.ones(spec.intermediate, np.float32),
    )
    return [one] * spec.n_layers


def assert_told_by_few(report) -> None:
    assert report.quality.recall >= 0.94
    assert report.quality.predicted <= 0.2
    assert report.cost < 0.02
    assert report.quality.predicted < report.quality.active


def assert_one_answer(path, out, io_engine: str) -> None:
    exact, expected = loaded(path), loaded(out, predict=True)
    assert loaded(out) == exact != expected
    for i, share in enumerate((0.0, 0.1, 0.5, 0.97)):
        options = {"io_engine": io_engine, "threads": 1 + i % 3, "predict": i < 3}
        try:
            with streaming.opened(out, share, (7, None, 1)[i % 3], **options) as engine:
                assert answer(engine) == (expected if i < 3 else exact), share
        except UnsupportedError as error:
            pytest.skip(f"no {io_engine} here: {error}")


def test_a_trained_model_is_told_by_few_of_its_neurons(trained):
    assert_told_by_few(trained[2])


def test_it_is_so_in_block_formats(formats):
    assert_told_by_few(formats[2])


@pytest.mark.parametrize("io_engine", ENGINES)
def test_a_trained_model_gives_one_answer(trained, io_engine):
    assert_one_answer(*trained[:2], io_engine)


@pytest.mark.parametrize("io_engine", ENGINES)
def test_block_formats_give_one_answer(formats, io_engine):
    assert_one_answer(*formats[:2], io_engine)


def test_the_store_says_what_prediction_costs(trained, shared):
    _, out, report = trained
    with Store.open(out) as store:
        said = store.recipe["predictor"]
        assert store.verify().ok
    assert said == report.told
    text = (shared / "text" / "wikitext-2-valid.txt").read_text()[:200_000]
    with edgemem.load(out, predict=True, context=256) as engine:
        ids = engine.tokenizer.encode(text, special=False)
        unseen = ids[:6144][3072:][: report.judged_tokens]
        found = perplexity(engine, unseen, 256).perplexity
    assert found == pytest.approx(said["predicted_perplexity"], rel=1e-9)


def test_less_is_read_than_exactly(trained):
    _, out, report = trained
    taken = []
    for predict in (False, True):
        with streaming.opened(out, 0.5, predict=predict) as engine:
            answer(engine)
            counted = engine._streamer.rows.statistics()
            taken.append(counted["hits"] + counted["misses"])
    assert taken[1] < 0.95 * taken[0]


@pytest.mark.parametrize("kind", ("ERROR", "FLIP"))
def test_a_read_that_fails_is_told_and_the_next_step_is_right(kind, trained):
    _, out, _ = trained
    expected = loaded(out, predict=True)
    faults = {"kind": getattr(lib, f"EM_FAULT_{kind}"), "first": 300, "count": 20, "seed": 5}
    with streaming.opened(out, 0.1, predict=True, faults=faults) as engine:
        with pytest.raises(edgemem.EdgeMemError, match=r"neuron \d+ of neurons bundle"):
            for _ in range(3):
                answer(engine)
        for _ in range(faults["count"]):
            with contextlib.suppress(edgemem.EdgeMemError):
                answer(engine)
        assert answer(engine) == expected


def assert_all_are_the_exact(path, target) -> None:
    with Store.open(path) as store:
        spec = store.spec
        orders = [np.arange(spec.intermediate)[::-1]] * spec.n_layers
        calibrated.write(store, target, naming_all(spec), orders, lambda path: {})
    expected = loaded(path)
    assert loaded(target, predict=True) == expected
    with streaming.opened(target, 0.2, predict=True) as engine:
        assert answer(engine) == expected


def test_all_that_is_foretold_gives_the_bytes_of_the_exact(trained, tmp_path):
    assert_all_are_the_exact(trained[0], tmp_path / "all.edgemem")


def test_so_it_does_in_block_formats(formats, tmp_path):
    assert_all_are_the_exact(formats[0], tmp_path / "all.edgemem")


def test_a_store_is_calibrated_again_in_its_place(trained, tmp_path):
    """Its neurons lie in other places by then: the same text says the same of them."""
    path, out, report = trained
    copy = tmp_path / "again.edgemem"
    copy.write_bytes(out.read_bytes())
    ids = np.arange(5, 405)
    first = calibrate(path, ids, tmp_path / "first.edgemem", recall=0.8, limit=300)
    again = calibrate(copy, ids, recall=0.8, limit=300)
    assert again.told == first.told and again.target == str(copy)
    assert loaded(copy) == loaded(path)
    assert loaded(copy, predict=True) == loaded(tmp_path / "first.edgemem", predict=True)


def test_what_fails_leaves_the_store_as_it_was(trained, tmp_path):
    path, _, _ = trained
    copy = tmp_path / "kept.edgemem"
    copy.write_bytes(path.read_bytes())

    def fails(written):
        with edgemem.load(written, predict=True, context=64) as engine:
            answer(engine)
        raise RuntimeError("judged badly")

    with Store.open(copy) as store:
        spec = store.spec
        orders = [np.arange(spec.intermediate)] * spec.n_layers
        with pytest.raises(RuntimeError, match="badly"):
            calibrated.write(store, copy, naming_all(spec), orders, fails, force=True)
    assert copy.read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [copy]


def test_what_cannot_be_calibrated_is_refused(trained, tiny_moe_store, tmp_path):
    path, out, _ = trained
    before = path.read_bytes()
    with pytest.raises(UnsupportedError, match="not taken apart"):
        calibrate(tiny_moe_store, list(range(200)), tmp_path / "x.edgemem")
    with pytest.raises(UnsupportedError, match="edgemem calibrate"):
        edgemem.load(path, predict=True)
    for wrong, words in (
        ({"recall": 1.0}, "recall"), ({"recall": 0}, "recall"), ({"limit": 5}, "limit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            calibrate(path, list(range(200)), **wrong)
    with pytest.raises(ValueError, match="30 tokens"):
        calibrate(path, list(range(30)), tmp_path / "x.edgemem")
    with pytest.raises(edgemem.StoreError, match="exists"):
        calibrate(path, list(range(200)), out)
    assert path.read_bytes() == before and not list(tmp_path.iterdir())


def edgemem_cli(*arguments) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "edgemem", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True)


def test_the_command_line_says_what_it_costs(trained, shared, tmp_path):
    path, out, report = trained
    text = tmp_path / "text.txt"
    text.write_text((shared / "text" / "wikitext-2-valid.txt").read_text()[:20_000])
    done = edgemem_cli("calibrate", path, "-f", text, "-o", tmp_path / "o.edgemem", "--limit", 256)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| layer | rank |") and "% of the activation" in done.stdout
    done = edgemem_cli("run", out, "--predict", "-p", "The city", "-n", 4, "--json")
    assert json.loads(done.stdout)["predict"] is True
    assert f"{100 * report.cost:+.2f} %" in done.stderr
    done = edgemem_cli("run", out, "-p", "The city", "-n", 4)
    assert "changes the answer" not in done.stderr
    done = edgemem_cli("run", path, "--predict", "-p", "The city", "-n", 4)
    assert done.returncode == 1 and "edgemem calibrate" in done.stderr


def test_a_store_in_its_place_keeps_its_link_and_who_may_read_it(trained, tmp_path):
    path, out, _ = trained
    real, link = tmp_path / "real.edgemem", tmp_path / "link.edgemem"
    real.write_bytes(path.read_bytes())
    real.chmod(0o600)
    link.symlink_to(real)
    calibrate(link, np.arange(5, 205), recall=0.7, limit=200)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o600
    assert loaded(real) == loaded(path)


def test_a_small_budget_suffices_to_the_end(trained, tmp_path):
    """Training takes more: what runs before and after it keeps to the budget all the same."""
    path, _, _ = trained
    script = (
        "import sys, numpy as np; from edgemem.calibration import calibrate\n"
        "calibrate(sys.argv[1], np.arange(5, 4101), sys.argv[2], memory='110M', limit=4096)"
    )
    argv = [sys.executable, "-c", script, str(path), str(tmp_path / "o.edgemem")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert loaded(tmp_path / "o.edgemem") == loaded(path)


def test_no_room_for_what_is_recorded_is_told_before_any_work(trained, tmp_path, monkeypatch):
    path, _, _ = trained

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(edgemem.StoreError, match="No space left.*smaller limit"):
        calibrate(path, np.arange(5, 205), tmp_path / "o.edgemem", limit=200)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said", (None, [], "x", {}, {"recall": 10**400}, {"recall": "nan"}, {"predicted": [1]})
)
def test_what_a_store_says_of_its_cost_may_be_anything(said):
    whole = {"predicted": 0.1, "precision": 1, "recall": 1, "perplexity": 2}
    good = whole | {"predicted_perplexity": 3}
    assert "+50.00 %" in options.prediction_cost({"predictor": good})
    lie = good | said if isinstance(said, dict) and said else said
    assert "does not say" in options.prediction_cost({"predictor": lie})
