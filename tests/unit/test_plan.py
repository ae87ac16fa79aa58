"""`edgemem plan`: it tells what an engine then does, and how fast it will be on a device."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import painted
import pytest
from click.testing import CliRunner

import edgemem
from edgemem import converters, doctor, inventory, plan
from edgemem.budget import MIB, Budget
from edgemem.cli import cli
from edgemem.doctor import Device, Reading
from edgemem.dtypes import BY_NAME, MULTIPLIED
from edgemem.errors import BudgetError, UnsupportedError
from edgemem.needs import Needs
from edgemem.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {"prompt_tokens": 20, "new_tokens": 6}
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(autouse=True)
def a_process_of_one_size(monkeypatch):
    """Else each engine would find what the one before left."""
    monkeypatch.setattr("edgemem.needs.current_bytes", lambda: 64 * MIB)


def device(flash: float = 1e9, dram: float = 1e10, compute: float = 1e15) -> Device:
    """Reads of every size come at one rate."""
    readings = tuple(
        Reading("io_uring", True, size, depth, flash)
        for size in (4096, 1 << 20) for depth in (1, 128)
    )  # fmt: skip
    return Device(
        "there",
        "a processor",
        2,
        1.0,
        readings,
        dram,
        dict.fromkeys((d.name for d in MULTIPLIED), compute),
    )


def looked(path, memory="auto", **more) -> plan.Outlook:
    return plan.look(path, memory, **(COUNTS | more))


def budgets(path) -> list[int]:
    """From all in memory down to the floor."""
    resident = looked(path)
    whole = sum(item.bytes for item in resident.items)
    with Store.open(path) as store:
        needs = Needs(store, 0, resident.context, resident.threads, resident.kv)
    floor = sum(item.bytes for item in needs.items)
    return [whole, *np.linspace(whole - MIB // 4, floor, 4).astype(int).tolist()]


@pytest.fixture(params=["tiny_moe_store", "stories_store", "tiny_relu_neurons"])
def store(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_relu_neurons(shared, tmp_path_factory):
    """tiny-relu with its FFNs taken apart."""
    path = tmp_path_factory.mktemp("plan") / "neurons.edgemem"
    converters.convert(shared / "models" / "tiny-relu", path, neurons=True)
    return path


@pytest.fixture
def resting(tiny_relu_neurons, tmp_path):
    """The same with thresholds: of 30 % of neurons those leave 5."""
    path = tmp_path / "resting.edgemem"
    path.write_bytes(tiny_relu_neurons.read_bytes())

    def changed(data: bytes) -> bytes:
        said = json.loads(data)
        said["spec"]["thresholds"] = [0.1] * said["spec"]["n_layers"]
        said["recipe"]["sparse"] = {"active": 0.3, "used": 0.05}
        return json.dumps(said).encode()

    painted.rewrite(path, meta=changed)
    return path


# What an engine does


def test_an_engine_does_what_was_told(store):
    streams = []
    for memory in budgets(store):
        told = looked(store, memory)
        with edgemem.load(store, memory, told.context) as engine, engine.session() as session:
            ids = list(range(3, 29))
            session.feed(ids[:20])
            for token in ids[20:24]:  # slots are those of the step before last
                session.feed([token])
            assert told.slots + told.neuron_room == sum(engine.slots.values()) or not told.slots
            assert told.resident_bytes == engine._plan.resident_bytes
            assert told.streamed_bundles == len(engine._plan.streamed)
            assert told.chunk_tokens == engine.chunk_tokens
            assert list(told.items) == engine._needs.items
            assert told.slab_bytes <= memory
        streams.append(told.streamed_bytes > 0)
    assert streams == [False, True, True, True, True]


def test_what_does_not_fit_is_refused_with_the_same_sum(store):
    with pytest.raises(BudgetError) as by_plan:
        looked(store, 65 * MIB)
    with pytest.raises(BudgetError) as by_engine:
        edgemem.load(store, 65 * MIB, 26)
    assert str(by_plan.value) == str(by_engine.value) and "sum" in str(by_plan.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": 25}, {"context": 0}, {"context": 1 << 30}, {"context": 30.0}, {"threads": 0},
        {"kv": "f8"}, {"prompt_tokens": 0}, {"new_tokens": 0}, {"memory": "much"},
    ],
)  # fmt: skip
def test_wrong_arguments(wrong, tiny_moe_store):
    with pytest.raises((ValueError, TypeError)):
        looked(tiny_moe_store, **wrong)


# What is expected


def test_without_figures_nothing_is_expected(tiny_moe_store):
    assert looked(tiny_moe_store).expected is None


def test_a_resident_model_is_read_at_the_pace_of_memory(stories_store):
    told = looked(stories_store, device=device(flash=1.0)).expected
    with Store.open(stories_store) as store:
        weights, spec = int(store.entries["payload_bytes"].sum(dtype=np.int64)), store.spec
    keys = 23 * spec.n_layers * 2 * spec.n_kv_heads * 2 * spec.head_dim
    assert told.flash_seconds == told.read_bytes == 0 and told.hit_rate is None
    assert told.compute_seconds == pytest.approx(
        (weights + keys) / (1e10 * plan.PRODUCT_SHARE), rel=0.02
    )
    assert told.seconds == pytest.approx(told.compute_seconds + told.management_seconds)
    assert told.tokens_per_second == 1 / told.seconds


def test_a_slow_processor_is_what_counts(stories_store):
    fast, slow = (
        looked(stories_store, device=device(compute=rate)).expected for rate in (1e15, 1e6)
    )
    with Store.open(stories_store) as store:
        spec = store.spec
    least = spec.vocab_size * spec.hidden + spec.n_layers * 3 * spec.hidden * spec.intermediate
    assert slow.compute_seconds > least / 1e6 > 100 * fast.compute_seconds


def test_only_the_experts_of_a_token_are_read(tiny_moe_store):
    told = looked(tiny_moe_store, device=device()).expected
    with Store.open(tiny_moe_store) as store:
        payload = int(store.entries["payload_bytes"].sum(dtype=np.int64))
    assert told.compute_seconds < 0.7 * payload / 1e10


def test_parts_add_up_to_something_between_the_longest_and_the_sum(store):
    for memory in budgets(store):
        for rate in (1e6, 1e8, 1e10):
            told = looked(store, memory, device=device(flash=rate)).expected
            parts = told.flash_seconds, told.compute_seconds
            low, high = max(parts), sum(parts)
            assert low <= (told.seconds - told.management_seconds) * (1 + 1e-9)
            assert told.seconds - told.management_seconds <= high * (1 + 1e-9)


@pytest.mark.parametrize("compute, read, missed", [(1, 1, 50), (3, 1, 20), (1, 5, 200), (1, 1, 2)])
def test_turns_wait_for_what_they_lack_by_chance(compute, read, missed):
    turns, draws = 40, 20_000
    lacks = np.random.default_rng(0).poisson(missed / turns, (draws, turns))
    each = np.maximum(compute / turns, lacks * read / missed)
    assert plan._by_turns(compute, read, missed, turns) == pytest.approx(
        each.sum(1).mean(), rel=0.02
    )


def test_more_memory_never_costs_time(store):
    found = [looked(store, memory, device=device(flash=1e7)).expected for memory in budgets(store)]
    seconds, read = [p.seconds for p in found], [p.read_bytes for p in found]
    assert seconds == sorted(seconds) and read == sorted(read)
    assert found[0].hit_rate is None and read[0] == 0
    assert all(0 <= p.hit_rate <= 1 for p in found[1:]) and read[-1] > 0


def test_slow_flash_is_all_that_counts(store):
    memory = budgets(store)[-1]
    slow, fast = (looked(store, memory, device=device(flash=rate)).expected for rate in (1e5, 1e14))
    assert slow.seconds == pytest.approx(slow.flash_seconds, rel=0.05)
    assert fast.seconds == pytest.approx(fast.compute_seconds + fast.management_seconds, rel=0.01)
    assert slow.read_bytes == fast.read_bytes


def test_a_dense_model_reads_what_its_slots_do_not_hold(stories_store):
    told = looked(stories_store, budgets(stories_store)[-1], device=device())
    missed = told.expected.read_bytes / told.streamed_bytes
    assert 0.3 < missed <= 1


def test_expectations_come_from_the_size_and_depth_that_are_read(tiny_moe_store):
    """Only large reads are fast: that is what bundles are read by."""
    readings = tuple(
        Reading("io_uring", True, size, depth, rate)
        for size, rate in ((4096, 1.0), (16384, 1e9), (1 << 20, 1e9)) for depth in (1, 128)
    )  # fmt: skip
    memory = budgets(tiny_moe_store)[-1]
    found = dataclasses.replace(device(), flash=readings)
    told = looked(tiny_moe_store, memory, device=found).expected
    assert told.flash_seconds == pytest.approx(told.read_bytes / 1e9, rel=0.2)


def test_what_rests_is_neither_read_nor_multiplied(resting, tiny_relu_neurons):
    memory = budgets(resting)[-1]
    exact, sparse = (
        looked(resting, memory, device=device(), sparse=sparse).expected for sparse in (False, True)
    )
    assert sparse.read_bytes < 0.3 * exact.read_bytes
    assert sparse.management_seconds < exact.management_seconds
    assert sparse.compute_seconds < exact.compute_seconds
    with pytest.raises(UnsupportedError, match="calibrate --cost"):
        looked(tiny_relu_neurons, sparse=True)
    with pytest.raises(ValueError, match="choose one"):
        plan.look(GOLDEN / "v1.0-foretold-q8_0.edgemem", sparse=True, predict=True)


def test_what_is_advised_says_what_a_conversion_does_not_keep(resting, tiny_relu_neurons):
    for path, how in ((resting, "8_0, then calibrate again)"), (tiny_relu_neurons, "8_0)")):
        with Store.open(path) as store:
            needs = Needs(store, 0, 26, 1, "f16")
            lines = needs.advise(Budget("1GiB"), needs.items, sum(i.bytes for i in needs.items))
        assert any(line.endswith(f"(convert --neurons --dtype q{how}") for line in lines), lines


def test_what_a_conversion_would_give_has_no_predictors():
    sizes = []
    for name in ("neurons", "foretold"):
        with Store.open(GOLDEN / f"v1.0-{name}-q8_0.edgemem") as store:
            sizes.append(inventory.bytes_as(store, BY_NAME["q4_0"]))
    places = sum(4 * 40 for _ in range(2))
    assert sizes[1] == sizes[0] + places


# The commands


def command(*arguments, code=0):
    result = CliRunner().invoke(cli, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def cache(tiny_moe_store, tmp_path):
    """A cache folder that knows the device of the stores."""
    folder = tmp_path / "cache"
    doctor._keep(device(), doctor._file(tiny_moe_store, folder))
    return folder


def test_json_has_a_result_for_each_budget(tiny_moe_store, cache):
    memory = budgets(tiny_moe_store)[2]
    budget_options = ("--memory", memory, "--memory", "auto", "--memory", "65M")
    shown = command(
        tiny_moe_store, *budget_options, "--cache-dir", cache, "-p", 20, "-n", 6, "--json", code=1
    )
    said = json.loads(shown.stdout)
    assert said["model_type"] == "qwen3_moe" and said["device"]["dram_bytes_per_second"] == 1e10
    streams, resident, refused = said["results"]
    expected = looked(tiny_moe_store, memory, device=device())
    assert streams == {
        "memory": str(memory),
        **json.loads(json.dumps(dataclasses.asdict(expected))),
    }
    assert resident["slots"] == 0 and resident["expected"]["read_bytes"] == 0
    assert refused["error"] == "does not fit" and "sum" in refused["message"]
    assert "does not fit the memory budget" in shown.stderr


def test_the_table_has_a_row_for_each_budget(tiny_moe_store, cache):
    memory = budgets(tiny_moe_store)[2]
    shown = command(
        tiny_moe_store, "--memory", memory, "--memory", "auto", "--cache-dir", cache,
        "-p", 20, "-n", 6,
    )  # fmt: skip
    rows = [line.split("|")[1:-1] for line in shown.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {len(row) for row in rows} == {11}
    told = looked(tiny_moe_store, memory, device=device())
    assert rows[2][3].strip() == f"{told.slots}/{told.streamed_bundles}"
    assert rows[2][-2].strip() == f"{1e3 * told.expected.seconds:.1f}"
    assert rows[3][3].strip() == "all resident"


def test_without_figures_the_command_says_how_to_get_them(tiny_moe_store, tmp_path):
    shown = command(tiny_moe_store, "--cache-dir", tmp_path)
    assert f"edgemem doctor {tiny_moe_store}" in shown.stderr
    assert "all resident" in shown.stdout
    said = json.loads(command(tiny_moe_store, "--cache-dir", tmp_path, "--json").stdout)
    assert said["device"] is None and said["results"][0]["expected"] is None


def test_neurons_that_rest_have_a_row_too(resting, cache):
    memory = budgets(resting)[-1]
    shown = [
        command(resting, "--memory", memory, "-p", 20, "-n", 6, "--cache-dir", cache, *more).stdout
        for more in ((), ("--sparse",))
    ]
    assert "64/1536 neurons" in shown[1] and shown[0] != shown[1]


@pytest.mark.parametrize(
    "more, context",
    [((), 512), (("--context", "64"), 64), (("-n", "9"), 512), (("-p", "500"), 512)],
)
@pytest.mark.parametrize("command", ["plan", "bench"])
def test_short_models_are_asked_for_what_fits(command, more, context, stories_store, cache):
    """Of 512 positions, which 512 tokens and 128 more would exceed."""
    repeated = ("-r", "1") if command == "bench" else ()
    run = CliRunner().invoke(
        cli, [command, str(stories_store), "--cache-dir", str(cache), *repeated, *more, "--json"]
    )
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)["results"][0]
    assert result["context"] == context


def test_wrong_usage(tiny_moe_store, tmp_path):
    command(tiny_moe_store, "--memory", "much", code=2)
    command(tiny_moe_store, "-p", 30, "-n", 30, "--context", 40, code=2)
    command(tmp_path / "absent", code=1)


def bench(*arguments) -> str:
    words = [sys.executable, "-m", "edgemem", "bench", *map(str, arguments)]
    return subprocess.run(
        words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=120, check=True
    ).stdout


def test_bench_says_what_was_expected(tiny_moe_store, cache):
    few = (tiny_moe_store, "-p", 8, "-n", 3, "-r", 1, "--cache-dir", cache)
    result = json.loads(bench(*few, "--json"))["results"][0]
    expected = looked(tiny_moe_store, prompt_tokens=8, new_tokens=3, device=device())
    assert result["expected"] == dataclasses.asdict(expected.expected)
    paced = device(dram=result["dram_bytes_per_second"])
    hindsight = looked(tiny_moe_store, prompt_tokens=8, new_tokens=3, device=paced).expected
    assert result["expected_in_hindsight"] == dataclasses.asdict(hindsight)
    shown = bench(*few, "--memory", "auto", "--memory", "auto").splitlines()
    head, _, *rows = [line.split("|") for line in shown if line.startswith("|")]
    place = [cell.strip() for cell in head].index("plan")
    rate = expected.expected.tokens_per_second
    assert [float(row[place]) for row in rows] == [pytest.approx(rate, rel=0.02)] * 2
    assert len(re.search(r"a plan says (.*) tok/s", shown[-1])[1].split(", ")) == 2
    unusual = json.loads(bench(*few, "--json", "--policy", "lru"))["results"][0]
    assert unusual["expected"] is None and unusual["expected_in_hindsight"] is None


def found_in_a_run(dram: float, flash: float):
    return SimpleNamespace(
        dram_bytes_per_second=dram, decode=SimpleNamespace(device_bytes_per_second=flash)
    )


@pytest.mark.parametrize("name", ["tiny_moe_store", "resting"])
def test_a_plan_in_hindsight_takes_the_paces_of_the_run(name, request):
    """Of bundles as of neurons, whatever depth they are read at."""
    store = request.getfixturevalue(name)
    memory = budgets(store)[-1]
    readings = tuple(
        Reading("io_uring", True, size, depth, 1e6 * size**0.5 * depth)
        for size in (4096, 1 << 20) for depth in (1, 128)
    )  # fmt: skip
    before = dataclasses.replace(device(dram=1e10), flash=readings)
    told = looked(store, memory, device=before).expected
    pace = told.read_bytes / told.flash_seconds
    same, slow, unread = (
        looked(store, memory, device=plan.hindsight(before, told, run)).expected
        for run in (
            found_in_a_run(1e10, pace), found_in_a_run(5e9, pace / 3), found_in_a_run(1e10, 0.0)
        )
    )  # fmt: skip
    assert same.seconds == pytest.approx(told.seconds)
    assert slow.flash_seconds == pytest.approx(3 * told.flash_seconds)
    assert slow.compute_seconds > told.compute_seconds
    assert unread == told


def test_bench_says_what_was_expected_of_neurons_that_rest(resting, cache):
    few = ("-p", 8, "-n", 3, "-r", 1, "--cache-dir", cache, "--json", "--sparse")
    (result,) = json.loads(bench(resting, *few))["results"]
    counts = {"prompt_tokens": 8, "new_tokens": 3, "sparse": True}
    expected = looked(resting, device=device(), **counts).expected
    assert result["expected"] == dataclasses.asdict(expected)
