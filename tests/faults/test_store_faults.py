"""Damage and interruption: an error or the same answer, and nothing half done."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import painted
import pytest

from edgemem.errors import CorruptError, EdgeMemError, StoreError
from edgemem.store import Store
from edgemem.writer import StoreWriter

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def store_path(tmp_path_factory) -> Path:
    return painted.write(tmp_path_factory.mktemp("store") / "a.edgemem")


# ---- damage ------------------------------------------------------------------------------------


def test_every_byte_flipped_in_turn(tmp_path, store_path, rng):
    """Each byte of the file, one bit at random: opening and reading fails, or gives the same.

    Where it gives the same the byte is padding, and `verify` notices it.
    """
    answer, good = painted.read_all(store_path), store_path.read_bytes()
    path = tmp_path / "flipped.edgemem"
    path.write_bytes(good)
    padding = []
    with path.open("r+b", buffering=0) as file:
        for offset, byte in enumerate(good):
            file.seek(offset)
            file.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
            try:
                found = painted.read_all(path)
            except EdgeMemError:
                pass
            else:
                assert found == answer, offset
                padding.append(offset)
            file.seek(offset)
            file.write(bytes([byte]))
        assert path.read_bytes() == good
        assert all(good[offset] == 0 for offset in padding)
        for offset in padding[:: len(padding) // 200]:
            file.seek(offset)
            file.write(b"\1")
            with Store.open(path) as store:
                assert not store.verify().ok, offset
            file.seek(offset)
            file.write(b"\0")


def test_every_kind_of_truncation(tmp_path, store_path):
    """Nothing, parts of each structure, each page boundary and its neighbours, one byte short."""
    good = store_path.read_bytes()
    lengths = {0, 1, 7, 8, 19, 20, 21, 64, 100, 4095, len(good) - 1, len(good) - 4096 + 100}
    for page in range(0, len(good), 4096):
        lengths |= {page - 1, page, page + 1, page + 100, page + 2048}
    path = tmp_path / "short.edgemem"
    for length in sorted(n for n in lengths if 0 <= n < len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(StoreError):
            Store.open(path)
    for more in (b"\0", b"\0" * 4096, good):
        path.write_bytes(good + more)
        with pytest.raises(CorruptError):
            Store.open(path)


def test_pages_swapped_doubled_and_blanked(tmp_path, store_path):
    """What a device or a copy does wrong is whole pages."""
    good = store_path.read_bytes()
    pages = [good[i : i + 4096] for i in range(0, len(good), 4096)]
    path = tmp_path / "pages.edgemem"
    for i in range(len(pages)):
        for j in range(len(pages)):
            changed = list(pages)
            changed[i] = pages[j] if i != j else bytes(4096)
            path.write_bytes(b"".join(changed))
            with pytest.raises(EdgeMemError):
                painted.read_all(path)


# ---- interruption ------------------------------------------------------------------------------

KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import painted
from edgemem.writer import StoreWriter
left = int(sys.argv[2])
if sys.argv[3] == "hidden" and hasattr(os, "O_TMPFILE"):
    del os.O_TMPFILE
write = StoreWriter._write
def counted(self, data):
    global left
    write(self, data)
    left -= 1
    if left == 0:
        os._exit(9)
StoreWriter._write = counted
painted.write(__import__("pathlib").Path(sys.argv[1]))
"""


@pytest.mark.parametrize("temporary", ["unnamed", "hidden"])
def test_a_writer_killed_after_each_write(tmp_path, temporary):
    """The target is never there; nothing is left, or what is left under a hidden name does not
    open: but after the last write, when it is whole.
    """
    if temporary == "unnamed" and not hasattr(os, "O_TMPFILE"):
        pytest.skip("the system has no files without a name")
    target, answer = tmp_path / "a.edgemem", painted.read_all(painted.write(tmp_path / "good"))
    script = KILLED.format(tests=str(TESTS))
    opened = []
    for count in range(1, 1000):
        command = [sys.executable, "-c", script, target, str(count), temporary]
        run = subprocess.run(command, check=False)
        if run.returncode == 0:
            break
        assert run.returncode == 9 and not target.exists()
        for left in tmp_path.glob(".a.edgemem.*"):
            assert temporary == "hidden"
            try:
                assert painted.read_all(left) == answer
                opened.append(count)
            except EdgeMemError:
                pass
            left.unlink()
    assert count > 8 and opened == ([count - 1] if temporary == "hidden" else [])
    assert painted.read_all(target) == answer


class FullDisk:
    """A file on a disk that takes `room` bytes: it accepts what fits, then refuses."""

    def __init__(self, file, room: int, code: int):
        self._file, self._room, self._code = file, room, code

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data) -> int:
        if self._room <= 0:
            raise OSError(self._code, os.strerror(self._code))
        count = self._file.write(memoryview(data)[: self._room])
        self._room -= count
        return count


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_disk_that_fills_up(tmp_path, store_path, code, monkeypatch):
    """At every page boundary, and between: one clear error, and nothing left."""
    size = store_path.stat().st_size
    target = tmp_path / "a.edgemem"
    create = StoreWriter._create
    for room in (*range(0, size, 4096), 1, 5000, size - 1):

        def full(self, room=room):
            create(self)
            self._file = FullDisk(self._file, room, code)

        monkeypatch.setattr(StoreWriter, "_create", full)
        with pytest.raises(StoreError, match=f"writing {target}: {os.strerror(code)}; .+"):
            painted.write(target)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "link", "linkat"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    if call == "link":
        monkeypatch.setattr(os, "rename", fail)
    if call == "linkat":  # the trial works, naming the store does not
        monkeypatch.setattr(StoreWriter, "_name", fail)
        if not hasattr(os, "O_TMPFILE"):
            pytest.skip("the system has no files without a name")
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreError, match="Input/output error; check the device"):
        painted.write(tmp_path / "a.edgemem")
    assert os.listdir(tmp_path) == []


def test_a_real_limit_on_file_sizes(tmp_path):
    """No fault made by us: the system itself refuses a file beyond RLIMIT_FSIZE."""
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); import painted\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "painted.write(__import__('pathlib').Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, TESTS, tmp_path / "a.edgemem"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 1 and "StoreError" in run.stderr and "File too large" in run.stderr
    assert os.listdir(tmp_path) == []


def test_interrupts_leave_nothing(tmp_path, monkeypatch):
    """Ctrl-C at each of the writer's writes, by way of an exception as Python raises it."""
    write, done = StoreWriter._write, []

    def interrupted(self, data):
        write(self, data)
        done.append(1)
        if len(done) == limit:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "_write", interrupted)
    for limit in range(1, 100):
        done.clear()
        try:
            painted.write(tmp_path / "a.edgemem")
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == []
        else:
            break
    assert limit > 8 and os.listdir(tmp_path) == ["a.edgemem"]


def test_signals_are_python_exceptions_here():
    """The test above stands for Ctrl-C only where SIGINT raises KeyboardInterrupt."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
