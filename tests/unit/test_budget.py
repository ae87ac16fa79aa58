"""Budget: sizes, control groups, and a refusal that shows its sum."""

import os
import subprocess
import sys

import pytest

from edgemem import budget
from edgemem.budget import GIB, MIB, Budget, Item, parse_size, show_size
from edgemem.errors import BudgetError


@pytest.mark.parametrize(
    "text, expected",
    [
        (12345, 12345),
        ("12345", 12345),
        ("1b", 1),
        ("4k", 4096),
        ("512M", 512 * MIB),
        ("512 MB", 512 * MIB),
        (" 512MiB ", 512 * MIB),
        ("4GiB", 4 * GIB),
        ("4g", 4 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("2TiB", 2048 * GIB),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


def test_a_share_is_of_the_whole_machine():
    assert parse_size("50%") == budget.machine_bytes() // 2
    assert parse_size("100%") == budget.machine_bytes()


@pytest.mark.parametrize("text", ["", "lots", "4X", "-1G", "4 G B", "1e9", "0", 0, -5, "0%", "%"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="memory size"):
        parse_size(text)


@pytest.mark.parametrize("value", [1.5, None, True, [1]])
def test_sizes_of_a_wrong_type(value):
    with pytest.raises(TypeError, match="memory size"):
        parse_size(value)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (5 * GIB, "5.0 GiB"),
        (2**42, "4096.0 GiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert show_size(size) == text


# Control groups, from files laid out as the kernel does


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_tightest_group_of_a_v2_hierarchy_counts(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app\n",
            "sys/fs/cgroup/user/app/memory.max": "max\n",
            "sys/fs/cgroup/user/app/memory.current": "5\n",
            "sys/fs/cgroup/user/app/memory.stat": "inactive_file 1\n",
            "sys/fs/cgroup/user/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/user/memory.current": f"{60 * MIB}\n",
            "sys/fs/cgroup/user/memory.stat": f"anon 1\ninactive_file {20 * MIB}\n",
        },
    )
    assert budget._memory_groups(tmp_path) == [(100 * MIB, 40 * MIB)]
    assert budget.machine_bytes(tmp_path) == 100 * MIB
    # 60 MiB of room and what this process has (which that group does not know here), less half.
    assert 60 * MIB / 2 <= budget.auto_bytes(tmp_path) < 60 * MIB + budget.current_bytes()


def test_a_v1_group_whose_path_is_that_of_the_host(tmp_path):
    base = "sys/fs/cgroup/memory/"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
            base + "memory.limit_in_bytes": f"{64 * MIB}\n",
            base + "memory.usage_in_bytes": f"{MIB}\n",
            base + "memory.stat": "total_inactive_file 0\n",
        },
    )
    assert budget._memory_groups(tmp_path) == [(64 * MIB, MIB)]


def test_no_limit_is_no_limit(tmp_path):
    assert budget._memory_groups(tmp_path) == []
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
        },
    )
    assert budget._memory_groups(tmp_path) == []


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"sys/fs/cgroup/app/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/app/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "garbage\n"}, None),
    ],
)
def test_a_quota_of_processor_time_limits_the_cores(tmp_path, files, expected):
    write(tmp_path, {"proc/self/cgroup": "0::/app\n"} | files)
    assert budget.usable_cpus(tmp_path) == (expected or budget.usable_cpus(tmp_path / "none"))


def test_a_quota_of_v1(tmp_path):
    base = "sys/fs/cgroup/cpu,cpuacct/"
    write(
        tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/x\n", base + "cpu.cfs_period_us": "1000\n"}
    )
    cores = budget.usable_cpus(tmp_path / "none")
    for quota, expected in (("-1", cores), ("1000", 1), ("10", 1), ("1000000", cores)):
        write(tmp_path, {base + "cpu.cfs_quota_us": quota})
        assert budget.usable_cpus(tmp_path) == expected


def test_slow_cores_get_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 6}, raising=False)
    capacity = "sys/devices/system/cpu/cpu{}/cpu_capacity"
    assert budget.fast_cpus(tmp_path) == 5, "nothing is said about them"
    write(tmp_path, {capacity.format(cpu): "250\n" for cpu in (0, 1, 2, 3, 4)})
    assert budget.fast_cpus(tmp_path) == 5, "two are unknown"
    write(tmp_path, {capacity.format(cpu): f"{size}\n" for cpu, size in ((5, 700), (6, 1024))})
    assert budget.fast_cpus(tmp_path) == 2
    write(tmp_path, {capacity.format(cpu): "512\n" for cpu in (0, 2)})
    assert budget.fast_cpus(tmp_path) == 4
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "3000 1000\n"})
    assert budget.fast_cpus(tmp_path) == 3, "a quota counts as well"


def test_auto_leaves_a_reserve():
    assert 0 < Budget("auto").limit < budget.machine_bytes()


# Promises


def test_promises_are_kept_and_given_back():
    purse = Budget(100 * MIB)
    weights, cache = Item("weights", 60 * MIB), Item("KV cache", 30 * MIB)
    purse.take([weights, cache])
    assert purse.promised == 90 * MIB
    with pytest.raises(BudgetError):
        purse.take([cache])
    assert purse.promised == 90 * MIB, "a refusal promises nothing"
    purse.give_back([cache])
    purse.take([cache])
    assert purse.promised == 90 * MIB


def test_a_refusal_shows_the_sum_and_what_would_fit():
    purse = Budget("100M")
    purse.take([Item("process", 40 * MIB)])
    items = [Item("weights", 55 * MIB), Item("KV cache", 10 * MIB)]
    with pytest.raises(BudgetError) as refusal:
        purse.take(items, lambda items, spare: [f"{len(items)} items, {show_size(spare)} left"])
    assert str(refusal.value).splitlines() == [
        "the model does not fit the memory budget: 5.0 MiB too much",
        "  process             40.0 MiB",
        "  weights             55.0 MiB",
        "  KV cache            10.0 MiB",
        "  sum                105.0 MiB",
        "  budget (as asked)  100.0 MiB",
        "  2 items, 60.0 MiB left",
    ]


def test_a_budget_is_never_more_than_the_machine():
    assert Budget(1 << 60).limit == budget.machine_bytes()


def test_the_peak_is_that_of_this_process_alone():
    """The child's peak, not that of the large parent which started it."""
    ballast = bytearray(200 * MIB)
    code = "import edgemem.budget as b; print(b.peak_bytes(), b.current_bytes())"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    peak, current = map(int, output.stdout.split())
    assert 0 < current <= peak * 1.05
    if sys.platform == "linux":
        assert peak < 100 * MIB
    del ballast


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "G", "1" + "0" * 30, "9" * 400 + "%"])
def test_sizes_beyond_all_machines(text):
    with pytest.raises(ValueError, match="at most .* TiB"):
        parse_size(text)
