"""The measurement of kernels: what its table, its file and its comparison say. Nothing is timed."""

import copy
import json

import numpy as np
import pytest

from bench import kernel_cases, kernels
from bench.ggml import TYPES, Ggml, GgmlProduct, NoGgml
from bench.kernel_cases import ColdMemory, cases, prepare, weight_bytes
from bench.kernel_report import compare, row
from edgemem._native import isa_names, lib
from edgemem.dtypes import BY_NAME, MULTIPLIED
from edgemem.kernels import Core

MEMORY = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every shape in small, measurements as short as they get, and a machine that is quiet."""
    for name in kernel_cases.PRODUCTS:
        cols = 256 if name in kernel_cases.PRODUCTS_OF_ALL_BLOCKS else 72
        monkeypatch.setitem(kernel_cases.PRODUCTS, name, (40, cols))
    for name in kernel_cases.EXPERTS:
        monkeypatch.setitem(kernel_cases.EXPERTS, name, (1, 256, 256))
    for name in kernel_cases.ATTENTION:
        monkeypatch.setitem(kernel_cases.ATTENTION, name, (4, 2, 80))
    monkeypatch.setattr(kernels, "ROUND_SECONDS", 1e-5)
    monkeypatch.setattr(kernels, "busy_cores", lambda: 0.0)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def run(capsys, *options: str) -> tuple[int, list[list[str]]]:
    """Exit status and the rows of every table that was printed."""
    status = kernels.main(["--memory", "1M", "--rounds", "2", "--alone", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return status, [cells(line) for line in lines if not line.startswith("| op")]


@pytest.mark.parametrize(
    "case", list(cases()), ids=lambda c: f"{c.op}-{c.type}-{c.shape}-{c.tokens}"
)
def test_every_case_runs_more_calls_than_it_has_places(case):
    core, memory = Core(2), ColdMemory(MEMORY)
    core.reserve(kernel_cases.SCRATCH_BYTES)
    work = prepare(case, core, memory)
    work.run(2)
    work.run(MEMORY // max(weight_bytes(case), 1 << 14) + 3)
    assert work.bytes == weight_bytes(case) or work.cached
    assert (work.operations > 0) == (case.op in ("product", "ffn", "attention"))


def test_a_row_for_every_combination(capsys, tmp_path):
    isas = isa_names()
    status, rows = run(
        capsys, "--op", "product", "norm", "route", "--type", "q4_0", "f32", "--tokens", "1",
        "--shape", "head", "2048", "128-experts-8", "--threads", "1", "2",
        "--json", str(tmp_path / "new.json"),
    )  # fmt: skip
    named = {tuple(row[:6]) for row in rows}
    every = [
        ("product", "f32", "head"), ("product", "q4_0", "head"), ("norm", "f32", "2048"),
        ("route", "f32", "128-experts-8"),
    ]  # fmt: skip
    assert status == 0 and len(rows) == len(named)
    assert named == {(*case, "1", t, isa) for case in every for t in "12" for isa in isas}
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["host"] and len(written["records"]) == len(rows)
    for record in written["records"]:
        assert len(record["calls_per_s"]) == 2 and min(record["calls_per_s"]) > 0
        bound = {"product": 2, "norm": 2, "route": 0}[record["op"]]
        assert len(record["bound_calls_per_s"]) == bound
        assert record["llama_cpp"] is None


RECORD = {
    "op": "product", "type": "q4_0", "shape": "head", "tokens": 1, "threads": 2, "isa": "neon",
    "bytes": 10**9, "operations": 4 * 10**9, "calls_per_s": [20.0, 19.0, 22.0], "bound": "read",
    "bound_calls_per_s": [40.0, 40.0, 40.0],
    "llama_cpp": {"layout": "CPU_REPACK", "calls_per_s": [10.0, 10.0, 10.0]},
}  # fmt: skip


def test_a_row_says_how_near_the_bound_it_comes():
    assert cells(row(RECORD))[6:] == [
        "50000", "20.0 (19.0–22.0) GB/s", "read 40.0", "50%", "10.0 (10.0–10.0) CPU_REPACK", "2.00",
    ]  # fmt: skip
    assert cells(row(RECORD | {"bound": "peak", "llama_cpp": None}))[7:] == [
        "80.0 (76.0–88.0) GOP/s", "peak 160", "50%", "–", "–",
    ]  # fmt: skip
    unbound = RECORD | {"bound": None, "bound_calls_per_s": [], "llama_cpp": None}
    assert cells(row(unbound))[7:] == ["0.02 (0.02–0.02) k calls/s", "–", "–", "–", "–"]


def runs(**changes) -> tuple[dict, dict]:
    old = {"host": "a host", "records": [RECORD]}
    new = copy.deepcopy(old)
    new["records"][0] |= changes
    return old, new


def scaled(by: float, field: str = "calls_per_s") -> dict:
    return {field: [value * by for value in RECORD[field]]}


@pytest.mark.parametrize(("by", "mark"), [(0.5, "SLOWER"), (0.95, ""), (1, ""), (2, "FASTER")])
def test_what_is_outside_of_the_noise_is_marked(by, mark):
    lines, slower = compare(*runs(**scaled(by)))
    found = cells(next(line for line in lines if line.startswith("| product")))
    assert found[-1] == mark and slower == (mark == "SLOWER")
    assert found[6].startswith(f"{by:.2f} (")


def test_a_slower_machine_is_no_regression():
    lines, slower = compare(*runs(**scaled(0.5), **scaled(0.5, "bound_calls_per_s")))
    assert slower == 0 and "0 slower, 0 faster" in lines[-1]


def test_a_comparison_says_what_only_one_run_has():
    old, new = runs(tokens=4)
    new["host"] = "another"
    lines, slower = compare(old, new)
    assert lines[0].startswith("ANOTHER HOST") and slower == 0
    assert lines[-1].endswith("1 are new, 1 were not measured now")


def test_a_planted_regression_is_found(capsys, tmp_path):
    options = ["--op", "norm", "--isa", isa_names()[0], "--threads", "1", "--tokens", "1", "64"]
    old = tmp_path / "old.json"
    run(capsys, *options, "--json", str(old))
    facts = json.loads(old.read_text())
    for record, factor in zip(facts["records"], (1e6, 1e-6), strict=True):
        record["calls_per_s"] = [rate * factor for rate in record["calls_per_s"]]
    old.write_text(json.dumps(facts))
    status, rows = run(capsys, *options, "--compare", str(old))
    assert status == 1 and [found[-1] for found in rows[2:]] == ["SLOWER", "FASTER"]


def test_what_is_too_large_or_takes_too_long_is_named(capsys, monkeypatch):
    monkeypatch.setitem(kernel_cases.PRODUCTS, "head", (1 << 12, 1 << 10))
    monkeypatch.setattr(kernels, "LONGEST_SECONDS", 0.0)
    kernels.main(
        ["--memory", "1M", "--rounds", "1", "--alone", "--op", "product", "--type", "q8_0",
         "--shape", "head", "llama-3.1-8b/ffn-up", "--tokens", "4", "--threads", "1",
         "--isa", "scalar"]
    )  # fmt: skip
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* ")]
    assert "product q8_0 head 4: its 4.2 MiB are more than --memory" in notes[1]
    assert "llama-3.1-8b/ffn-up 4 1 scalar: one call would take" in notes[0]


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--threads", "0"], ["--tokens", "3"]])
def test_options_that_make_no_sense_are_refused(options, capsys):
    with pytest.raises(SystemExit) as refused:
        kernels.main([*options])
    assert refused.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("isa", isa_names())
def test_multiply_adds_are_counted_for_every_thread(isa):
    for dtype in (d.code for d in MULTIPLIED):
        one = lib.em_peak(Core(1, isa).handle, dtype, 1)
        assert one > 10_000 and lib.em_peak(Core(2, isa).handle, dtype, 3) == 3 * one
    assert lib.em_peak(Core(1, isa).handle, lib.EM_DTYPES, 1) == -1


@pytest.mark.parametrize("dtype", TYPES)
def test_llama_cpp_multiplies_what_it_is_given(dtype):
    try:
        ggml = Ggml()
    except NoGgml as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    cols = max(96, BY_NAME[dtype].block)
    weights = rng.standard_normal((64, cols), np.float32)
    x = rng.standard_normal((3, cols), np.float32)
    data = {"f32": weights, "f16": weights.astype(np.float16)}.get(dtype)
    if data is None:
        data = rng.integers(32, 60, weights.nbytes).astype(np.uint8)
    with pytest.raises(ValueError, match="whole blocks"):
        GgmlProduct(ggml, dtype, 64, 72, 3, places=2)
    product = GgmlProduct(ggml, dtype, 64, cols, 3, places=2)
    product.fill(data, x)
    product.run(3, threads=2)
    found = product.result()
    product.close()
    assert product.layout and np.isfinite(found).all() and found.any()
    if dtype in ("f32", "f16"):
        np.testing.assert_allclose(found, x @ weights.T, rtol=0.02, atol=0.05)
