"""A conversion that meets damage, or is interrupted: a clear error, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgemem import converters
from edgemem.errors import CheckpointError, EdgeMemError
from edgemem.kernels.reference import StoreWeights
from edgemem.store import Store


@pytest.fixture
def model(tmp_path) -> tiny.Tiny:
    """One file, f32, small."""
    made = tiny.write(tmp_path / "model", "qwen3_moe", 2, dtype="F32")
    for path in made.folder.glob("*.safetensors*"):
        path.unlink()
    file = made.folder / "model.safetensors"
    tiny.write_safetensors(file, made.tensors, list(made.tensors), "F32")
    return made


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_bits_flipped_in_a_safetensors_header(model, out, rng):
    """An error, or a store with every weight where it belongs: names cannot be swapped unnoticed.

    A flip inside a tensor's data is another weight; the format has no checksum that could tell.
    """
    path = model.folder / "model.safetensors"
    good = path.read_bytes()
    length = header_bytes(path)
    offsets = rng.choice(length, 300, replace=False)
    for offset in [*range(8), *offsets.tolist()]:
        bit = 1 << int(rng.integers(8))
        path.write_bytes(good[:offset] + bytes([good[offset] ^ bit]) + good[offset + 1 :])
        try:
            converters.convert(model.folder, out / "a", force=True)
        except EdgeMemError as error:
            assert os.listdir(out) == [] and "\n" not in str(error)
        else:
            with Store.open(out / "a") as store:
                np.testing.assert_array_equal(StoreWeights(store).table(), model.weights.table())
            (out / "a").unlink()


def test_truncated_safetensors(model, out):
    path = model.folder / "model.safetensors"
    good, length = path.read_bytes(), header_bytes(path)
    for size in (0, 1, 7, 8, 9, length - 1, length, length + 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match="model.safetensors: "):
            converters.convert(model.folder, out / "a")
        assert os.listdir(out) == []


def test_a_source_that_shrinks_meanwhile(model, out):
    """A file that is still being fetched, or is replaced, while it is read."""
    path = model.folder / "model.safetensors"
    size = path.stat().st_size

    def shrink(done: int, total: int) -> None:
        if path.stat().st_size == size:
            os.truncate(path, header_bytes(path) + 10)

    with pytest.raises(CheckpointError, match="truncated while being read"):
        converters.convert(model.folder, out / "a", progress=shrink)
    assert os.listdir(out) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ZeroDivisionError])
def test_whatever_is_raised_meanwhile(model, out, error):
    """From progress, which is called after each chunk: nothing is left, no thread lives on."""
    calls = []
    converters.convert(model.folder, out / "a", progress=lambda *_: calls.append(1))
    (out / "a").unlink()
    for stop in {1, 2, len(calls) // 2, len(calls) - 1, len(calls)}:
        count = 0

        def interrupt(*_, stop=stop):
            nonlocal count
            count += 1
            if count == stop:
                raise error

        with pytest.raises(error):
            converters.convert(model.folder, out / "a", progress=interrupt)
        assert os.listdir(out) == []
        assert not [t for t in threading.enumerate() if t.name.startswith("pack")]


def test_an_old_target_survives_a_failure_under_force(model, out):
    target = out / "a"
    target.write_text("precious")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converters.convert(model.folder, target, force=True, progress=interrupt)
    assert os.listdir(out) == ["a"] and target.read_text() == "precious"


INTERRUPTED = """
import sys, time
from edgemem import converters
def slow(done, total):
    print("progress", flush=True)
    time.sleep(0.01)
converters.convert(sys.argv[1], sys.argv[2], progress=slow)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT])
def test_a_real_signal(model, out, signum):
    """SIGINT to a process in the middle of converting."""
    command = [sys.executable, "-c", INTERRUPTED, model.folder, out / "a"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(3):
            assert process.stdout.readline() == "progress\n"
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert os.listdir(out) == []
