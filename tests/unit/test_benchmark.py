"""`edgemem bench`: what is measured, of which demand, and what the command does with it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import streaming

import edgemem
from edgemem import belady, benchmark, converters, inventory, policies, rates, recorder, tracefile
from edgemem.cli import options

ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8"}
COUNTS = {"prompt_tokens": 20, "new_tokens": 6, "repetitions": 2}


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(rates, "DRAM_SECONDS", 0.002)
    for rate in (rates.flash_rate, rates.row_rate):
        monkeypatch.setattr(rate, "__defaults__", (0.02,))


def assert_sane(report: benchmark.Report, repetitions: int = 2) -> None:
    assert (report.prompt_tokens, report.new_tokens) == (20, 6)
    assert report.repetitions == repetitions
    for spread in (
        report.prefill.tokens_per_second,
        report.decode.tokens_per_second,
        report.first_token_seconds,
    ):
        assert 0 < spread.low <= spread.median <= spread.high
    assert report.dram_bytes_per_second > 0 and report.load_bytes_per_second > 0
    assert 0 < report.peak_rss_bytes and 0 < report.efficiency
    rates, ideal = report.decode.tokens_per_second, report.ideal_seconds_per_token
    assert 0.999 * ideal * rates.low <= report.efficiency <= 1.001 * ideal * rates.high


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_a_streaming_model(share, warm, tiny_moe_store):
    with streaming.opened(tiny_moe_store, share, lookahead=False) as engine:
        report = benchmark.measure(engine, **COUNTS, warm=warm)
        size = int(engine._streamer._residency.sizes[engine._plan.streamed[0]])
    assert_sane(report)
    decode = report.decode
    assert report.record_bytes == size and report.flash_bytes_per_second > 0
    assert 0 < report.slots < report.streamed_bundles == 192
    assert 0 <= decode.hit_rate <= report.belady_hit_rate + 1e-9 < 1.1
    # 6 layers of 4 experts a token: what was not there was read.
    assert decode.read_bytes_per_token == pytest.approx(24 * (1 - decode.hit_rate) * size)
    assert decode.demand_bytes_per_token > 24 * size
    missed = 24 * (1 - report.belady_hit_rate) * size / report.flash_bytes_per_second
    plain = decode.demand_bytes_per_token / report.dram_bytes_per_second
    assert report.ideal_seconds_per_token == pytest.approx(max(missed, plain))
    assert 0 <= decode.stall_share <= 1 and 0 <= decode.device_share <= 1.1


def test_a_device_that_is_slow_afterwards_does_not_flatter_the_run(tiny_moe_store, monkeypatch):
    monkeypatch.setattr(benchmark, "flash_rate", lambda engine: (4096, 1.0))
    with streaming.opened(tiny_moe_store, 0.2, lookahead=False) as engine:
        report = benchmark.measure(engine, **COUNTS)
    decode = report.decode
    rate = decode.read_bytes_per_token * decode.tokens_per_second.low / decode.device_share
    assert report.flash_bytes_per_second >= 0.9 * rate > 1e5


def test_a_model_whose_neurons_stream(shared, tmp_path):
    path = tmp_path / "a.edgemem"
    converters.convert(shared / "models" / "tiny-relu", path, neurons=True)
    for share in (0.1, 0.7):
        with streaming.opened(path, share) as engine:
            report = benchmark.measure(engine, **COUNTS)
        assert_sane(report)
        assert 0 < report.neuron_room < report.neurons == 1536
        assert 0 < report.decode.hit_rate <= report.belady_hit_rate + 1e-9 < 1.1
        assert report.neurons_bytes_per_second > 0 and report.efficiency < 1.5


def test_a_dense_model_that_streams(stories_store):
    with streaming.opened(stories_store, 0.5) as engine:
        report = benchmark.measure(engine, **COUNTS)
    assert_sane(report)
    assert 0 < report.belady_hit_rate < 1 and report.decode.hit_rate is not None


@pytest.mark.parametrize("share", [0.2, None])
def test_the_breakdown_adds_up_to_the_time_of_a_token(share, tiny_moe_store):
    opened = edgemem.load if share is None else streaming.opened
    with opened(tiny_moe_store, *[share] * (share is not None)) as engine:
        report = benchmark.measure(engine, **COUNTS)
    parts, rates = report.breakdown, report.decode.tokens_per_second
    assert 0.999 / rates.high <= sum(parts.values()) <= 1.001 / rates.low
    assert all(seconds >= 0 for seconds in parts.values())
    assert min(parts["routing"], parts["attending"], parts["multiplying by the output head"]) > 0
    streams = (parts["waiting for bundles"] > 0, parts["foreseeing bundles"] > 0)
    assert streams == (share is not None, share is not None)


def test_a_breakdown_is_shown_where_it_is_asked_for(tiny_moe_store, floor):
    budgets = ("--memory", f"{floor + 8}M", "--memory", "auto")
    shown = bench(tiny_moe_store, *FEW, *budgets, "--breakdown")[0]
    table = [line.split("|")[1:-1] for line in shown.split("ms of a decoded token")[1].splitlines()]
    assert [len(row) for row in table[1:] if row] == [3] * (len(table) - 1)
    assert [cell.strip() for cell in table[-1]][0] == "all" and table[-1][1].endswith("(100.0 %) ")
    assert "ms of a decoded token" not in bench(tiny_moe_store, *FEW, *budgets)[0]


def test_a_model_that_fits_says_nothing_of_flash(tiny_moe_store):
    with edgemem.load(tiny_moe_store, context=64) as engine:
        report = benchmark.measure(engine, **COUNTS)
    assert_sane(report)
    assert report.slots == report.streamed_bundles == report.streamed_bytes == 0
    assert report.belady_hit_rate is report.flash_bytes_per_second is report.record_bytes is None
    assert report.decode.hit_rate is None and report.decode.read_bytes_per_token == 0
    assert report.io_engine == "none"
    json.dumps(dataclasses.asdict(report))


def test_repetitions_are_cold_and_of_equal_tokens_each_time(tiny_moe_store):
    reads = []
    for _ in range(2):
        with streaming.opened(tiny_moe_store, 0.7, lookahead=False) as engine:
            cold = benchmark.measure(engine, **COUNTS)
            reads.append(cold.prefill.read_bytes_per_token)
    with streaming.opened(tiny_moe_store, 0.7, lookahead=False) as engine:
        warm = benchmark.measure(engine, **COUNTS, warm=True)
    assert reads[0] == reads[1] > warm.prefill.read_bytes_per_token
    assert cold.prefill.hit_rate == 0 < warm.prefill.hit_rate


def test_belady_is_of_the_demand_that_was_traced(tiny_moe_store, tmp_path):
    counts = COUNTS | {"repetitions": 1}
    options = {"trace": tmp_path / "x", "lookahead": False}
    with streaming.opened(tiny_moe_store, 0.2, **options) as engine:
        report = benchmark.measure(engine, **counts)
    header, lines = tracefile.read(tmp_path / "x")
    lines = list(lines)
    assert [(line["phase"], line["tokens"]) for line in lines] == [
        ("prefill", 20), *[("decode", 1)] * 6,
    ]  # fmt: skip
    demand = [ids for line in lines for ids in line["ids"]]
    starts, ids = np.cumsum([0, *map(len, demand)]), np.concatenate(demand)
    there = belady.hits(starts, ids, header.class_of, header.slots)
    hits = there[starts[6] :]
    assert report.belady_hit_rate == hits.sum() / (6 * 24)
    live = sum(sum(line["hits"]) for line in lines[1:])
    assert report.decode.hit_rate == live / (6 * 24)


@pytest.mark.parametrize("warm, steps", [(False, 7), (True, 21)])
def test_a_trace_is_of_the_first_repetition_or_of_all_warm_ones(
    warm, steps, tiny_moe_store, tmp_path
):
    with streaming.opened(tiny_moe_store, 0.2, trace=tmp_path / "x") as engine:
        engine._governor.withheld = lambda most: 1
        benchmark.measure(engine, **COUNTS, warm=warm)
        engine.generate("The", max_tokens=3)
    lines = list(tracefile.read(tmp_path / "x")[1])
    assert [line["withheld_bytes"] for line in lines] == [1] * steps


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"new_tokens": 0}, {"repetitions": 0}, {"prompt_tokens": 60}]
)
def test_wrong_counts_are_refused(wrong, stories_store):
    with edgemem.load(stories_store, context=64) as engine:
        with pytest.raises(ValueError, match="must be at least 1|do not fit the context of 64"):
            benchmark.measure(engine, **COUNTS | wrong)
        assert engine.trace.summary()["prefill"]["steps"] == 0


def test_an_engine_goes_on_after_it_was_measured(tiny_moe_store):
    with streaming.opened(tiny_moe_store, 0.1) as engine:
        expected = engine.generate("The river", max_tokens=10)
        engine.clear()
        benchmark.measure(engine, **COUNTS)
        assert engine.generate("The river", max_tokens=10) == expected


def test_the_host_tells_of_itself():
    host = benchmark.host()
    assert host["cpu"] and host["cores"] >= host["usable_cores"] >= 1
    assert host["isa"][-1] == "scalar" and host["memory_bytes"] > 1 << 28


def test_the_options_name_the_policies():
    assert options.POLICIES == tuple(policies.POLICIES)
    assert options.POLICIES[0] == policies.DEFAULT


def test_a_header_counts_classes_as_slots_do(tiny_moe_store):
    with streaming.opened(tiny_moe_store, 0.2) as engine:
        slots, plan, turns = engine.slots, engine._plan, inventory.turns(engine.store)
        header = recorder.header(
            engine.store, plan.streamed, plan.apart, turns, slots, "lru", False
        )  # fmt: skip
        assert np.array_equal(header.class_of, rates.layout_classes(engine))
    assert header.slots == tuple(slots.values())
    assert set(header.class_of) == set(range(len(header.slots))) and header.read_ahead == ()
    assert len(header.layer_of) == inventory.by_kind(engine.store)["expert"]["bundle_count"]


# The command

FEW = ("-p", 20, "-n", 6, "-r", 2)


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "edgemem", "bench", *map(str, arguments)]


def bench(*arguments, code=0, **options):
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def floor(tiny_moe_store) -> int:
    """MiB that are about enough to start streaming."""
    stderr = bench(tiny_moe_store, *FEW, "--memory", "20M", code=1)[1]
    return int(stderr.split("--memory ")[1].split("M")[0])


def test_a_table_with_a_row_for_each_budget(tiny_moe_store, floor):
    sizes = ("auto", f"{floor + 8}M", "20M")
    stdout, stderr = bench(
        tiny_moe_store, *FEW, *[word for size in sizes for word in ("--memory", size)], code=1
    )
    lines = stdout.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    legend = lines[lines.index(rows[-1]) :]
    assert "qwen3_moe, 22.0 M parameters" in lines[0]
    assert any("KV cache at f16" in line and "flash" in line for line in legend)
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1 and len(rows[0]) <= 150
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(sizes)
    assert "all resident" in rows[2] and "does not fit" in rows[4]
    assert re.search(r"\d+/19[23] ", rows[3])  # experts, and at the floor the head
    assert "does not fit the memory budget" in stderr and "  sum " in stderr


def test_json_has_all_that_was_measured(tiny_moe_store, floor):
    more = ("--memory", f"{floor + 8}M", "--policy", "lru", "--threads", 1, "--context", 40,
            "--kv", "q8_0")  # fmt: skip
    result = json.loads(bench(tiny_moe_store, *FEW, *more, "--json")[0])
    assert result["host"]["cpu"] and result["model_type"] == "qwen3_moe"
    (one,) = result["results"]
    assert one["policy"] == "lru" and one["threads"] == 1 and one["context"] == 40
    assert one["kv"] == "q8_0"
    assert {field.name for field in dataclasses.fields(benchmark.Report)} <= set(one)
    assert one["budget_bytes"] == (floor + 8) << 20
    if "EDGEMEM_SANITIZED" not in os.environ:  # a sanitizer has memory of its own
        assert one["peak_rss_bytes"] <= one["budget_bytes"]
    results = json.loads(
        bench(tiny_moe_store, *FEW, "--memory", "20M", "--memory", "auto", "--json", code=1)[0]
    )["results"]
    assert results[0]["error"] == "does not fit" and "sum" in results[0]["message"]
    assert results[1]["decode"]["tokens_per_second"]["median"] > 0


def test_budgets_are_measured_wherever_one_stands(tiny_moe_store, tmp_path):
    """Also beside a folder that has the package's name."""
    (tmp_path / "edgemem").mkdir()
    (tmp_path / "edgemem" / "__init__.py").write_text("raise ImportError('the wrong one')")
    code = "import sys; sys.path.pop(0); from edgemem.__main__ import main; main(sys.argv[1:])"
    arguments = ["bench", tiny_moe_store, *FEW, "--memory", "auto", "--memory", "90%"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, capture_output=True,
        text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("all resident") == 2, result.stderr


def test_a_store_whose_name_looks_like_an_option(tiny_moe_store, tmp_path):
    (tmp_path / "-x").symlink_to(tiny_moe_store.resolve())
    code = "from edgemem.__main__ import main; main()"
    arguments = ["bench", *FEW, "--memory", "auto", "--memory", "90%", "--", "-x"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, capture_output=True,
        text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("all resident") == 2, result.stderr


def test_what_the_governor_withheld_is_in_the_trace(tiny_moe_store, tmp_path):
    with streaming.opened(tiny_moe_store, 0.2, trace=tmp_path / "x") as engine:
        engine._streamer.end_step("decode", 1, withheld_bytes=4096)
        engine._streamer.end_recording()
    assert [line["withheld_bytes"] for line in tracefile.read(tmp_path / "x")[1]] == [4096]


def test_a_trace_of_a_benchmark(tiny_moe_store, floor, tmp_path):
    trace = ("--trace", tmp_path / "x")
    bench(tiny_moe_store, *FEW, "--memory", f"{floor + 8}M", *trace)
    assert len(list(tracefile.read(tmp_path / "x")[1])) == 7
    stderr = bench(tiny_moe_store, "--memory", "1G", "--memory", "2G", *trace, code=2)[1]
    assert "--trace records one budget" in stderr


@pytest.mark.parametrize(
    "arguments, words, code",
    [
        (("--memory", "1G", "--memory", "4X"), "4GiB", 2),
        (("-p", 5000), "context", 2),
        (("-n", 0), "new-tokens", 2),
        (("--policy", "fifo"), "next-use", 2),
        (("--policy", "static"), "profile", 2),
        (("--policy", "static", "--profile", "nowhere"), "reading nowhere", 1),
        (("--trace", "nowhere/x"), "recording a trace in nowhere/x", 1),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(arguments, words, code, tiny_moe_store):
    stdout, stderr = bench(tiny_moe_store, *arguments, code=code)
    assert words in stderr and stdout == ""


def child_of(process: subprocess.Popen) -> psutil.Process:
    """The process that measures, once it does."""
    for _ in range(600):
        children = psutil.Process(process.pid).children()
        if children and children[0].num_threads() > 1:
            return children[0]
        time.sleep(0.05)
    raise AssertionError("no process was started")


def start_long(store) -> subprocess.Popen:
    long = command(store, "--memory", "auto", "--memory", "90%", "-r", 1000)
    return subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_whoever_is_ended_takes_the_child_along(name, code, tiny_moe_store):
    with start_long(tiny_moe_store) as process:
        child = child_of(process)
        process.send_signal(getattr(signal, name))
        stdout, stderr = process.communicate(timeout=20)
        assert process.returncode == code and stdout == "" and "Traceback" not in stderr
        assert stderr.startswith("\nedgemem: ") and stderr.count("\n") == 2
        assert not child.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_whoever_is_killed_takes_the_child_along(tiny_moe_store):
    with start_long(tiny_moe_store) as process:
        child = child_of(process)
        process.kill()
        process.communicate(timeout=20)
        assert psutil.wait_procs([child], 10)[0] == [child]


def test_a_child_that_is_killed_is_a_row_that_says_so(tiny_moe_store):
    with start_long(tiny_moe_store) as process:
        for _ in range(2):
            child = child_of(process)
            child.kill()
            psutil.wait_procs([child], 5)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 1 and stdout.count("ended by SIGKILL") == 2
    assert "the process ended by SIGKILL" in stderr


# What `edgemem run` says of streaming


def run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "edgemem", "run", *map(str, arguments)], capture_output=True,
        text=True, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr


def test_a_run_tells_what_streaming_did(tiny_moe_store, floor, tmp_path):
    arguments = (tiny_moe_store, "-p", "The river", "-n", 9, "--context", 64)
    budget = ("--memory", f"{floor + 8}M", "--policy", "lfu", "--trace", tmp_path / "x")
    stdout, stderr = run(*arguments, *budget)
    assert " read per token · " in stderr and "% hits · " in stderr and "% stalled" in stderr
    header, lines = tracefile.read(tmp_path / "x")
    assert header.policy == "lfu" and len(list(lines)) >= 9
    found = json.loads(run(*arguments, *budget, "--json")[0])
    assert found["text"] + "\n" == stdout
    for phase in ("prefill", "decode"):
        assert 0 <= found[phase]["hit_rate"] <= 1 and 0 <= found[phase]["stall_share"] <= 1
    assert found["prefill"]["read_bytes_per_token"] > 0
    resident, stderr = run(*arguments)
    assert resident == stdout and "hits" not in stderr
    assert "hit_rate" not in json.loads(run(*arguments, "--json")[0])["decode"]
