"""The comparison with llama.cpp: what is measured, what is cut, and what the table says of it."""

import json
import subprocess
import sys

import pytest

from bench import peers
from bench.harness import spread
from bench.peers import Case, Outcome
from bench.shapes import SHAPES
from bench.synth import write
from edgemem.budget import MIB

CONFIG = SHAPES["qwen3-30b-a3b"] | {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 300,
}  # fmt: skip
BASE = {"context": 64, "threads": 1, "seed": 0, "prompt": 8, "tokens": 3, "vocab": 300}


def edgemem_case(store, **facts) -> Case:
    run = BASE | {"engine": "edgemem", "path": str(store), "memory": None, "warm": True} | facts
    return Case("edgemem", "resident", run)


def test_a_measurement_tells_every_step(tmp_path):
    write(CONFIG, tmp_path / "s.edgemem", "q8_0")
    outcome = peers.measured(edgemem_case(tmp_path / "s.edgemem"), None)
    assert outcome.ended == "" and outcome.prefill > 0 and len(outcome.steps) == 3
    assert outcome.peak_rss > 10 * MIB and outcome.facts["isa"]
    assert outcome.facts["read_bytes"] == 0
    assert peers.notes_of(edgemem_case("s"), [outcome], 100) == []
    outcome.facts["read_bytes"] = 5
    assert (
        "does not fit this machine and streams"
        in peers.notes_of(edgemem_case("s"), [outcome], 9)[0]
    )


def test_what_fails_says_why(tmp_path):
    write(CONFIG, tmp_path / "s.edgemem", "q8_0")
    outcome = peers.measured(edgemem_case(tmp_path / "s.edgemem", memory=MIB), None)
    assert "BudgetError: the model does not fit" in outcome.ended and outcome.prefill is None


def test_a_phase_that_takes_too_long_is_cut():
    code = 'import time; print(\'{"prefill": 2}\\n{"step": 0.5}\', flush=True); time.sleep(99)'
    outcome = Outcome()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        peers.follow(child, outcome, 1.0)
    assert (outcome.ended, outcome.prefill, outcome.steps) == ("cut", 2, [0.5])
    assert outcome.peak_rss > MIB


def cells(case: Case, *outcomes: Outcome) -> list[str]:
    line = peers.row(case, list(outcomes), spread([10.0]), limit=100)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_marks_bounds_and_gaps():
    case = Case("llama.cpp", "mapped", BASE, 64 * MIB)
    done = Outcome(prefill=2.0, steps=[0.5, 0.25, 0.25], limited=True, group_peak=64 * MIB)
    assert cells(case, done) == [
        "llama.cpp", "mapped", "64.0 MiB", "4.00 (4.00–4.00)", "3.00 (3.00–3.00)", "0.300",
        "0 bytes", "64.0 MiB",
    ]  # fmt: skip
    cut = Outcome(prefill=2.0, steps=[1.0], limited=True, ended="cut")
    assert cells(case, cut)[3:6] == ["4.00 (4.00–4.00)", "≤ 1.00 (1.00–1.00)", "≤ 0.100"]
    nothing = Outcome(limited=True, ended="cut in prefill")  # 8 tokens in over 100 s, not one step
    assert cells(case, nothing)[3:6] == ["≤ 0.08 (0.08–0.08)", "≤ 0.01 (0.01–0.01)", "≤ 0.001"]
    refused = Outcome(limited=True, ended="BudgetError: too much")
    assert cells(case, refused)[3:6] == ["—", "—", "—"]
    assert peers.notes_of(case, [refused], 100) == [
        "llama.cpp mapped in 64.0 MiB, round 1: BudgetError: too much"
    ]
    assert cells(case, Outcome(prefill=1.0, steps=[1.0]))[2] == "64.0 MiB (not enforced)"


def test_both_engines_side_by_side(tmp_path, monkeypatch, capsys):
    pytest.importorskip("llama_cpp", reason="the peer is absent: pip install llama-cpp-python")
    for name in ("s.edgemem", "s.gguf"):
        write(CONFIG, tmp_path / name, "q8_0")
    argv = [str(tmp_path / "s.edgemem"), str(tmp_path / "s.gguf"), "--memory", "150M", "-p", "8"]
    argv += ["-n", "2", "-r", "1", "--context", "64", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["peers", *argv])
    peers.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:]] == ["| llama.cpp", "| edgemem"] * 2
    told = json.loads((tmp_path / "out.json").read_text())
    rounds = [case["rounds"] for case in told["cases"][:-1]]
    assert all(len(r) == 1 and len(r[0]["steps"]) == 2 and r[0]["ended"] == "" for r in rounds)
    assert told["cases"][-1]["rounds"][0]["facts"]["device"] > 0
