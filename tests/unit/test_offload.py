"""The comparison with disk offload: what is measured, and what the table and its notes say."""

import json
import sys

import numpy as np
import pytest

from bench import offload
from bench.offload import Models
from bench.peers import Case, Outcome
from bench.shapes import SHAPES
from edgemem.budget import GIB, MIB

TINY = SHAPES["opt-1.3b"] | {
    "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
BASE = {"context": 32, "threads": 1, "seed": 0, "prompt": 8, "tokens": 5, "vocab": 300}


def case(engine: str, setting: str, budget: int | None = None) -> Case:
    return Case(engine, setting, BASE, budget)


def done(*steps: float, **facts) -> Outcome:
    return Outcome(prefill=2.0, steps=list(steps), limited=True, facts=facts)


def cells(case: Case, outcome: Outcome) -> list[str]:
    return [c.strip() for c in offload.row(case, outcome, 0.05).strip("|").split("|")]


def test_the_first_steps_do_not_count():
    outcome = done(9, 9, 0.1, 0.3, 0.2, step_reads=[MIB, MIB, 2 * MIB, 4 * MIB, 3 * MIB])
    outcome.group_peak = 64 * MIB
    assert cells(case("edgemem", "neurons", 64 * MIB), outcome) == [
        "edgemem", "neurons", "64.0 MiB", "4.00", "5.00", "200 (100–300)", "0.250", "3.0 MiB",
        "0 bytes", "64.0 MiB",
    ]  # fmt: skip


def test_what_was_not_reached_or_not_enforced_is_shown():
    assert cells(case("accelerate", "half", MIB), Outcome(limited=True))[3:8] == ["—"] * 5
    outcome = Outcome(prefill=2.0, steps=[1, 1, 1])
    assert cells(case("accelerate", "half", MIB), outcome)[2] == "1.0 MiB (not enforced)"


def test_gains_are_over_the_fastest_of_the_others_in_the_same_budget():
    found = offload.gains([
        (case("transformers", "resident"), done(9, 9, 0.001)),
        (case("transformers", "mapped", MIB), done(9, 9, 0.9)),
        (case("accelerate", "half", MIB), done(9, 9, 0.6)),
        (case("accelerate", "less", MIB), done(9, 9)),
        (case("edgemem", "neurons", MIB), done(9, 9, 0.2)),
        (case("edgemem", "neurons", 2 * MIB), done(9, 9, 0.2)),
    ])  # fmt: skip
    assert found == ["edgemem neurons in 1.0 MiB: 3.00 times as fast as accelerate half in 1.0 MiB"]


def test_answers_that_are_far_apart_are_called_so():
    reference = np.float32([[1, 2, 4], [4, 0, 0]])
    near = offload.answers(case("edgemem", "neurons"), reference, reference + np.float32(0.04))
    assert near.startswith("edgemem neurons: 2 of 2 choices") and near.endswith(
        "logits within 1.0 % of the largest"
    )
    far = offload.answers(case("edgemem", "neurons"), reference, reference[:, ::-1])
    assert far.startswith("ANOTHER ANSWER: edgemem neurons: 0 of 2 choices")
    broken = offload.answers(case("edgemem", "neurons"), reference, reference * np.nan)
    assert broken.startswith("ANOTHER ANSWER")


def test_each_budget_has_all_engines_and_accelerate_twice(tmp_path):
    models = Models(tmp_path, tmp_path / "w.edgemem", tmp_path / "n.edgemem")
    found = offload.cases(models, [2 * GIB, 256 * MIB], BASE, tmp_path)
    assert [(c.engine, c.budget) for c in found] == [
        ("transformers", None), ("edgemem", None),
        ("transformers", 2 * GIB), ("accelerate", 2 * GIB), ("accelerate", 2 * GIB),
        ("edgemem", 2 * GIB), ("edgemem", 2 * GIB),
        ("transformers", 256 * MIB), ("accelerate", 256 * MIB),  # it cannot keep less than nothing
        ("edgemem", 256 * MIB), ("edgemem", 256 * MIB),
    ]  # fmt: skip
    keeps = [c.run["keep"] for c in found if c.engine == "accelerate"]
    assert keeps == [2 * GIB, 2 * GIB - offload.PROCESS_BYTES, 256 * MIB]
    assert len({c.run["logits"] for c in found}) == len(found)


def test_all_engines_give_one_answer(tmp_path, monkeypatch, capsys):
    for name in offload.WANTED:
        pytest.importorskip(name, reason=f"the peer is absent: pip install {name}")
    offload.write(TINY, tmp_path / "model", "bf16")
    argv = [str(tmp_path / "model"), "--memory", "900M", "-p", "8", "-n", "3", "--threads", "1"]
    argv += ["--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["offload", *argv])
    offload.main()
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "out.json").read_text())
    assert [c["ended"] for c in told["cases"]] == [""] * 7
    assert all(len(c["steps"]) == 5 and c["prefill"] > 0 for c in told["cases"])
    assert out.count("6 of 6 choices") == 6 and "ANOTHER ANSWER" not in out, out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "out.json"}
