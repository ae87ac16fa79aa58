"""The budget, held to by the kernel: engines in control groups of exactly the size they promise.

A process that needs more than its group has, page cache counted, is killed. Skipped where no memory
control group can be made (it takes root, or a hierarchy that was delegated).
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bench.cgroup import MemoryGroup, NoControlGroup, evict
from bench.shapes import SHAPES
from bench.synth import write
from edgemem.budget import GIB, MIB

pytestmark = pytest.mark.skipif(
    "EDGEMEM_SANITIZED" in os.environ, reason="a sanitizer has memory of its own"
)

CONTEXT = 640
SMALL = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 8, "vocab_size": 4096,
}  # fmt: skip
CONFIGS = {
    "routed": SHAPES["qwen3-30b-a3b"] | SMALL | {
        "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 4,
    },
    "dense": SHAPES["llama-3.1-8b"] | SMALL | {"intermediate_size": 8192, "num_hidden_layers": 18},
}  # fmt: skip

CHILD = """
import json, re, sys, time, zlib
import numpy as np
import edgemem
from edgemem.budget import MIB, peak_bytes

ids = np.random.default_rng(0).integers(2, 4096, 640)  # the engine counts what is there before it
path, memory, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
read, told = [], {}


def load(memory):
    return edgemem.load(path, memory, context, progress=lambda done, total: read.append(done))


def refusal(memory):
    try:
        load(memory).close()
    except edgemem.BudgetError as error:
        return str(error)


if memory == "floor":
    for _ in range(5):  # the process itself grows a little with its first refusals
        floor = int(re.search(r"this would fit with --memory (\\d+)M", refusal(MIB))[1])
    started = time.perf_counter()
    told["less"] = refusal((floor - 2) * MIB)
    told |= {"seconds": time.perf_counter() - started, "read": len(read)}
    memory = floor * MIB
with load(memory) as engine, engine.session() as session:
    sums = [zlib.crc32(session.feed(ids[:530]))]
    # So many small steps that they lend their scratch, and a large one that takes it back.
    sums += [zlib.crc32(session.feed(ids[i : i + 1])) for i in range(530, 600)]
    sums.append(zlib.crc32(session.feed(ids[600:])))
    told |= {"limit": engine.budget.limit, "sums": sums, "peak": peak_bytes()}
print(json.dumps(told))
"""


def run(store, memory: int | str, group: MemoryGroup | None = None) -> dict:
    """Load, prefill and decode in a process of its own; what it tells of itself."""
    evict(store)  # whoever reads it through the page cache is charged for it
    argv = [sys.executable, "-c", CHILD, str(store), str(memory), str(CONTEXT)]
    argv = group.command(argv) if group else argv
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    killed = group.kills() if group else 0
    assert not killed, f"killed for taking more than {group.limit / MIB:.1f} MiB"
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Model:
    """A store, its bytes, the least budget it runs in, and what it answers, all in memory."""

    store: Path
    size: int
    floor: int
    sums: list[int]

    def check(self, memory: int | str, limit: int) -> tuple[dict, int]:
        """Run in a group of `limit` bytes: the same answer, within the budget, by both counts.
        Returns what the process told, and the page cache it left."""
        with MemoryGroup(limit) as group:
            told = run(self.store, memory, group)
            charged, cache = group.peak_bytes() or 0, group.cache_bytes()
        assert told["sums"] == self.sums
        assert told["peak"] <= told["limit"], "resident bytes"
        assert charged <= told["limit"], "bytes that the group was charged with"
        return told, cache

    def __str__(self) -> str:
        return f"{self.store.stem}, {self.size / MIB:.0f} MiB"


@pytest.fixture(scope="module", autouse=True)
def _groups():
    try:
        with MemoryGroup(64 * MIB):
            pass
    except NoControlGroup as error:
        pytest.skip(f"no budget can be enforced here: {error}")


def test_a_group_ends_what_takes_too_much_and_what_is_left_running():
    with MemoryGroup(64 * MIB) as group:
        greedy = [sys.executable, "-c", "bytearray(100 << 20)"]
        ended = subprocess.run(group.command(greedy), check=False)
        assert ended.returncode == -signal.SIGKILL
        assert group.kills() == 1 and group.peak_bytes() in (None, 64 * MIB)
        command = group.command(["sh", "-c", "echo started; sleep 1000; echo ended"])
        idle = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert idle.stdout.readline() == "started\n"
    assert idle.communicate(timeout=10) == ("", None) and idle.returncode == -signal.SIGKILL


def test_page_cache_is_counted_and_can_be_dropped(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(16 * MIB))
    evict(file)
    with MemoryGroup(64 * MIB) as group:
        subprocess.run(group.command(["cat", str(file)]), stdout=subprocess.DEVNULL, check=True)
        assert group.cache_bytes() >= 16 * MIB
        evict(file)
        assert group.cache_bytes() < 8 * MIB


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    store = tmp_path_factory.mktemp("limits") / f"{request.param}.edgemem"
    size = write(CONFIGS[request.param], store, "q8_0")
    whole = run(store, "100%")
    assert whole["peak"] > size, "this machine has no room for the whole model"
    yield Model(store, size, run(store, "floor")["limit"], whole["sums"])
    store.unlink()  # some hundreds of MB


def test_the_floor_that_a_refusal_names_is_the_floor(model, measured):
    """It runs; two MiB less (one is for luck) are refused at once, before any weight is read."""
    told, _ = model.check("floor", model.floor + 2 * MIB)  # another process, another floor, nearly
    assert "does not fit the memory budget" in told["less"]
    assert told["read"] == 0
    assert told["seconds"] < 5  # far less, but machines are shared
    measured(
        f"{model}: floor {told['limit'] / MIB:.0f} MiB, peak {told['peak'] / MIB:.1f} MiB; "
        f"two MiB less are refused in {told['seconds']:.3f} s"
    )


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_any_budget_from_the_floor_up_is_kept(model, share, measured):
    """`share` of the way from the floor, in another process than told it, to the whole store."""
    floor = model.floor + MIB
    budget = (floor + int(share * (model.size - floor))) // MIB * MIB
    told, _ = model.check(budget, budget)
    assert told["limit"] == budget
    measured(f"{model}: budget {budget / MIB:.1f} MiB, peak {told['peak'] / MIB:.1f} MiB")


def test_a_model_of_twice_the_budget_runs_and_leaves_nothing_in_the_page_cache(model, measured):
    """In a group with room for the whole store beside it: what was read once could have stayed."""
    told, cache = model.check(model.size // 2, 2 * model.size)
    assert told["limit"] == model.size // 2
    assert cache < model.size / 16
    measured(f"{model}: half of it as budget, page cache grew by {cache / MIB:.1f} MiB")


@pytest.mark.parametrize("limit", [200 * MIB, 2 * GIB])
def test_auto_stays_inside_its_group(model, limit):
    """A group smaller than either model, and one that is larger."""
    if limit > psutil.virtual_memory().available:
        pytest.skip(f"less than {limit / GIB:.1f} GiB available: the group would not be the limit")
    told, _ = model.check("auto", limit)
    assert limit / 4 < told["limit"] < limit
