"""`edgemem doctor`: what is measured, how it is kept, and what is refused."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from edgemem import doctor
from edgemem.cli import cli
from edgemem.doctor import Device, Reading
from edgemem.dtypes import MULTIPLIED
from edgemem.errors import FlashError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """Hundredths of a second and a MiB instead of 25 s and 256 MiB."""
    for name, value in {
        "SIZES": (4096, 16384), "DEPTHS": (1, 4), "ROUNDS": 2, "READ_SECONDS": 0.001,
        "MEMORY_SECONDS": 0.001, "COMPUTE_SECONDS": 0.0001, "MEMORY_BYTES": 16 * MIB,
        "FILE_BYTES": MIB, "LEAST_FILE_BYTES": MIB, "BUFFER_BYTES": MIB,
    }.items():  # fmt: skip
        monkeypatch.setattr(doctor, name, value)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * MIB))
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch) -> list:
    """The places that were measured, without measuring them."""
    places = []

    def measure(place, progress=None):
        places.append(place)
        return device(place=str(place), measured_at=float(len(places)))

    monkeypatch.setattr(doctor, "measure", measure)
    return places


def device(**changed) -> Device:
    """A device that reads at 1000 bytes a second for each KiB and read in flight."""
    facts = {
        "place": "there", "cpu": "a processor", "threads": 2, "measured_at": 1.0,
        "flash": tuple(
            Reading("io_uring", True, size, depth, size / 1.024 * depth)
            for size in (4096, 65536) for depth in (1, 16)
        ),
        "dram_bytes_per_second": 1e10, "multiply_adds": {d.name: 1e12 for d in MULTIPLIED},
    }  # fmt: skip
    return Device(**(facts | changed))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is measured


def test_a_file_is_read_in_every_way_and_stays_as_it_is(file):
    before, content = file.stat(), file.read_bytes()
    found = doctor.measure(file)
    ways = {(r.engine, r.direct) for r in found.flash}
    assert ("threads", False) in ways
    cells = {(r.bytes, r.depth) for r in found.flash}
    assert cells == {(s, d) for s in (4096, 16384) for d in (1, 4)}
    assert len(found.flash) == len(ways) * len(cells)
    assert all(r.bytes_per_second > 0 for r in found.flash)
    assert found.dram_bytes_per_second > 0 and found.threads >= 1
    assert (
        list(found.multiply_adds) == [d.name for d in MULTIPLIED]
        and min(found.multiply_adds.values()) > 0
    )
    assert file.read_bytes() == content and file.stat().st_mtime_ns == before.st_mtime_ns
    assert files(file.parent) == ["large"]


def test_a_folder_never_shows_the_file_that_is_written(tmp_path):
    shown = []
    found = doctor.measure(tmp_path, lambda done, total: shown.append((files(tmp_path), done)))
    assert found.flash and all(names == [] for names, _ in shown)
    counts = [done for _, done in shown]
    assert counts == list(range(1, 2 * (len(found.flash) + 2) + 1))
    assert files(tmp_path) == []


def test_what_ends_measuring_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doctor.measure(tmp_path, interrupt)
    assert files(tmp_path) == []


# What is kept


def test_figures_are_kept_until_they_are_asked_for_again(file, cache, counted):
    first = doctor.examine(file, cache)
    assert doctor.examine(file, cache) == first == doctor.known(file, cache)
    assert len(counted) == 1 and len(files(cache)) == 1
    assert doctor.examine(file, cache, again=True) != first
    assert len(counted) == 2 and len(files(cache)) == 1


def test_all_places_of_a_file_system_are_one_device(file, cache, counted):
    doctor.examine(file, cache)
    elsewhere = file.parent / "folder"
    assert doctor.known(elsewhere / "not yet there", cache) is not None
    elsewhere.mkdir()
    doctor.examine(elsewhere, cache)
    assert len(counted) == 1


@pytest.mark.parametrize("what", ["cpu_name", "fast_cpus"])
def test_another_machine_is_measured_anew(what, file, cache, counted, monkeypatch):
    doctor.examine(file, cache)
    monkeypatch.setattr(doctor, what, lambda: 12345)
    assert doctor.known(file, cache) is None
    doctor.examine(file, cache)
    assert len(counted) == 2


def test_another_file_system_is_measured_anew(file, cache, counted, monkeypatch):
    doctor.examine(file, cache)
    other = SimpleNamespace(f_fsid=99)
    monkeypatch.setattr(doctor.os, "statvfs", lambda path: other)
    doctor.examine(file, cache)
    assert len(counted) == 2


def changed(**values):
    return json.dumps(dataclasses.asdict(device()) | values)


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "no JSON", "\ud800", changed(flash=[]), changed(flash=[1]),
        changed(dram_bytes_per_second=0), changed(dram_bytes_per_second="fast"),
        changed(dram_bytes_per_second=float("nan")), changed(multiply_adds={}),
        "[" * 100_000, changed(measured_at=1e300), changed(threads="two"), changed(place=3),
        changed(multiply_adds=[1]), changed(more=1),
        changed(flash=[dataclasses.asdict(Reading("io_uring", True, 4096, 0, 1.0))]),
        changed(flash=[dataclasses.asdict(Reading("steam", True, 4096, 1, 1.0))]),
        changed(flash=[dataclasses.asdict(Reading("io_uring", True, 10**30, 1, 1.0))]),
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew(text, file, cache, counted):
    doctor.examine(file, cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(text.encode(errors="surrogatepass"))
    assert doctor.known(file, cache) is None
    assert doctor.examine(file, cache) == doctor.known(file, cache)
    assert len(counted) == 2


# What is refused


def refusal(place, *words, cache=None) -> str:
    with pytest.raises(FlashError) as caught:
        doctor.examine(place, cache or Path(place).parent / "cache")
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def test_what_is_no_place_to_measure_is_told(tmp_path):
    (tmp_path / "small").write_bytes(bytes(5000))
    refusal(tmp_path / "small", "small", "4.9 KiB", "or a folder")
    refusal(tmp_path / "absent", "absent", "No such file", "folder or a file")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "pipe", "neither a file nor a folder")
    assert files(tmp_path) == ["pipe", "small"]


def test_a_disk_without_room_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * MIB))
    refusal(tmp_path, "3.0 MiB", "free some", cache=tmp_path / "cache")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * MIB))
    assert doctor.measure(tmp_path).flash
    assert files(tmp_path) == []


def test_a_disk_that_fills_is_told_and_left_clean(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    refusal(tmp_path, "No space left", "free some", cache=tmp_path / "cache")
    assert files(tmp_path) == []


def test_a_cache_folder_that_cannot_be_is_told(file, counted):
    refusal(file, "--cache-dir", cache=file / "folder")


def test_a_file_that_shrinks_is_told(file, monkeypatch):
    monkeypatch.setattr(doctor, "_file_bytes", lambda place: 64 * MIB)
    refusal(file, "measuring reads of", "check the device")


def test_all_figures_of_a_large_file_are_of_the_same_places(tmp_path, monkeypatch):
    large, read = tmp_path / "large", {}
    monkeypatch.setattr(doctor, "FILE_BYTES", 64 * MIB)
    with open(large, "wb") as out:
        out.truncate(4 * doctor.FILE_BYTES)

    def note(reader, engine, direct, size, depth, offsets):
        assert all(offset % size == 0 for offset in offsets)
        read.setdefault(size, set()).update(offset // MIB for offset in offsets)
        return 1.0

    monkeypatch.setattr(doctor._Reader, "_read", note)
    with doctor._reader(large) as reader:
        reader.settle()
        cells = reader.cells()
        read.clear()  # engines were tried out
        for cell in cells:
            reader.rate(*cell, 0)
    places = read.pop(doctor.SIZES[0])
    assert len(places) == doctor.FILE_BYTES // MIB and max(places) > 3 * len(places)
    assert len(read) == len(doctor.SIZES) - 1 and all(found == places for found in read.values())


# What is made of the figures


def test_rates_between_measured_ones():
    found = device()
    for reading in found.flash:
        rate = found.flash_rate(reading.bytes, reading.depth)
        assert rate == pytest.approx(reading.bytes_per_second)
    # Rates that are powers of size and depth are met exactly between.
    assert found.flash_rate(16384, 4) == pytest.approx(16384 / 1.024 * 4)
    assert found.flash_rate(512, 1) == pytest.approx(4000)
    assert found.flash_rate(1 << 24, 99) == pytest.approx(64000 * 16)


def test_the_engine_and_way_of_the_runtime_count():
    def reading(engine, direct, rate):
        return Reading(engine, direct, 4096, 1, rate)

    uring, threads = reading("io_uring", True, 1.0), reading("threads", True, 9.0)
    buffered = reading("threads", False, 99.0)
    assert device(flash=(buffered, threads, uring)).flash_rate(4096, 1) == pytest.approx(1)
    assert device(flash=(buffered, threads)).flash_rate(4096, 1) == pytest.approx(9)
    assert device(flash=(buffered,)).flash_rate(4096, 1) == pytest.approx(99)


def test_the_knee_is_the_least_in_flight_that_is_about_the_best():
    rates = {(4, 1): 10, (4, 16): 40, (64, 1): 60, (64, 4): 95, (64, 16): 100, (1024, 1): 96}
    flash = tuple(
        Reading("io_uring", True, size << 10, depth, rate) for (size, depth), rate in rates.items()
    )
    knee = device(flash=flash).knee()
    assert (knee.bytes, knee.depth) == (64 << 10, 4)


# The command


def command(*arguments, code=0):
    result = CliRunner().invoke(cli, ["doctor", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_a_table_and_json(file, cache):
    shown = command(file, "--cache-dir", cache).stdout
    found = doctor.known(file, cache)
    assert "threads, buffered: MB/s" in shown and "suffice" in shown and "GB/s" in shown
    assert shown.count("4 KiB") >= 2
    said = json.loads(command(file, "--cache-dir", cache, "--json").stdout)
    assert said.pop("knee") == dataclasses.asdict(found.knee())
    assert said == json.loads(json.dumps(dataclasses.asdict(found)))


def test_memory_is_not_taken_for_flash(file, cache, monkeypatch):
    number = file.stat().st_dev
    mounts = file.parent / "mounts"
    where = f"{os.major(number)}:{os.minor(number)} / /somewhere rw,relatime shared:7"
    monkeypatch.setattr(doctor, "_MOUNTS", mounts)
    for kind in ("ext4", "tmpfs"):
        mounts.write_text(
            f"22 27 0:999999 / /proc rw - proc proc rw\n25 24 {where} - {kind} x rw\n"
        )
        assert doctor.lies_in_memory(file) == (kind == "tmpfs")
        shown = command(file, "--cache-dir", cache, "--json")
        assert ("lies in memory" in shown.stderr) == (kind == "tmpfs")
    mounts.unlink()
    assert not doctor.lies_in_memory(file)


def test_the_cache_folder_is_measured_by_default(cache, counted):
    command("--cache-dir", cache)
    assert counted == [cache] and cache.is_dir()
    command("--cache-dir", cache)
    assert len(counted) == 1
    command("--cache-dir", cache, "--again")
    assert len(counted) == 2
