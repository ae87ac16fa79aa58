"""Reading a store: what was written comes back, and what is wrong is named."""

import os
import threading
from pathlib import Path

import numpy as np
import painted
import pytest

from edgemem import dtypes
from edgemem._native import crc32c
from edgemem.errors import CorruptError, FlashError, StoreError, UnsupportedError
from edgemem.format import NO_LAYER, Kind
from edgemem.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return painted.write(tmp_path_factory.mktemp("store") / "a.edgemem", painted.ROUTED)


def test_everything_written_comes_back(path):
    payloads, spec, layouts, *_ = painted.read_all(path)
    assert spec == painted.ROUTED
    wanted = painted.bundles(painted.ROUTED)
    assert payloads == [painted.payload(i, b[-1]) for i, b in enumerate(wanted)]
    assert set(layouts) == {b[-1] for b in wanted} and len(layouts) == len(set(layouts))
    with Store.open(path) as store:
        assert store.chat_template == "{{ text }}" and store.tokenizer_json == painted.TOKENIZER
        assert store.provenance == {"by": "painted"} and store.generation == {}
        assert store.file_bytes == path.stat().st_size and store.path == path
        assert [store.layout_of(i) for i in range(len(wanted))] == [b[-1] for b in wanted]


def test_find(path):
    with Store.open(path) as store:
        expected = {}
        for i, (kind, layer, _, _) in enumerate(painted.bundles(painted.ROUTED)):
            expected.setdefault((kind, layer), []).append(i)
        for kind in Kind:
            for layer in [0, 1, 2, 3, NO_LAYER]:
                assert store.find(kind, layer).tolist() == expected.get((kind, layer), [])
        assert store.find(Kind.HEAD).tolist() == expected[Kind.HEAD, NO_LAYER]


def test_bundles_are_page_aligned_runs(tmp_path):
    for page_size in (4096, 16384):
        path = painted.write(tmp_path / f"{page_size}.edgemem", painted.ROUTED, page_size=page_size)
        with Store.open(path) as store:
            assert store.page_size == page_size and store.file_bytes % page_size == 0
            end = 1
            for i, entry in enumerate(store.entries):
                assert entry["page_first"] == end
                end += int(entry["page_count"])
                run = np.full(int(entry["page_count"]) * page_size, 255, np.uint8)
                assert store.read(i, run) == run.nbytes
                assert not run[int(entry["payload_bytes"]) :].any()
                assert run[: int(entry["payload_bytes"])].tobytes() == painted.payload(
                    i, store.layout_of(i)
                )


def test_a_buffer_must_hold_the_payload_or_the_pages(path):
    with Store.open(path) as store:
        payload = int(store.entries["payload_bytes"][0])
        for size in (0, payload - 1, payload + 1, 4096 * int(store.entries["page_count"][0]) + 1):
            with pytest.raises(ValueError, match="neither"):
                store.read(0, bytearray(size))
        with pytest.raises(IndexError):
            store.read(len(store.entries), bytearray(payload))
        with pytest.raises((TypeError, BufferError)):
            store.read(0, bytes(payload))


def test_a_flipped_payload_is_named(tmp_path):
    path = painted.write(tmp_path / "a.edgemem", painted.ROUTED)
    with Store.open(path) as store:
        expert = int(store.find(Kind.EXPERT, 0)[2])
        offset = int(store.entries["page_first"][expert]) * 4096 + 100
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with Store.open(path) as store:
        buffer = bytearray(int(store.entries["payload_bytes"][expert]))
        with pytest.raises(CorruptError, match=r"expert bundle 2 of layer 0 of .*a\.edgemem"):
            store.read(expert, buffer)
        store.read(expert, buffer, check=False)
        assert buffer[100] == byte ^ 1
        report = store.verify()
        assert not report.ok and len(report.faults) == 1 and "expert bundle 2" in report.faults[0]


def test_verify_reads_everything(path):
    calls = []
    with Store.open(path) as store:
        report = store.verify(lambda done, total: calls.append((done, total)))
        assert report.ok and report.bundle_count == len(store.entries)
        assert report.payload_bytes == store.entries["payload_bytes"].sum()
    assert calls == sorted(calls) and calls[-1] == (report.file_bytes, report.file_bytes)


def test_verify_notices_padding(tmp_path):
    """Every padding byte of the file: readers ignore it, verify does not."""
    path = painted.write(tmp_path / "a.edgemem")
    good, answer = path.read_bytes(), painted.read_all(path)
    with Store.open(path) as store:
        first = int(store.entries["page_first"][1]) * 4096 - 1
        meta_end = store.file_bytes - 4096 - 1
    for offset in (20, 4095, first, meta_end, len(good) - 4096 + 100, len(good) - 1):
        assert good[offset] == 0
        path.write_bytes(good[:offset] + b"\1" + good[offset + 1 :])
        assert painted.read_all(path) == answer
        with Store.open(path) as store:
            report = store.verify()
            assert len(report.faults) == 1 and "zeros" in report.faults[0]


def test_large_bundles_are_verified_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("edgemem.store._CHUNK_BYTES", 100)
    path = painted.write(tmp_path / "a.edgemem", dtype=dtypes.F32)
    with Store.open(path) as store:
        assert store.verify().ok


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("places", lambda words: words.fill(words[0]), "places of neurons bundle 0 of layer 1"),
        ("places", lambda words: words.__setitem__(3, 1 << 31), "places of neurons bundle 0"),
        ("places", lambda words: words.__setitem__([2, 5], words[[5, 2]]), "neuron 2 of neurons"),
        ("checksums", lambda words: words.__setitem__(7, 0), "neuron 7 of neurons bundle 0"),
    ],
)
def test_verify_notices_rows_that_are_not_where_they_should_be(tmp_path, name, change, fault):
    """What lies about rows is written as it is read: the bundle's checksum fits."""
    path = tmp_path / "a.edgemem"
    data = bytearray((GOLDEN / "v1.0-foretold-q8_0.edgemem").read_bytes())
    path.write_bytes(data)
    with Store.open(path) as store:
        assert store.verify().ok
        bundle, entries = int(store.find(Kind.NEURONS, 1)[0]), store.entries.copy()
        segment, size = store.layout_of(bundle)[name], int(entries["payload_bytes"][bundle])
        start = int(entries["page_first"][bundle]) * store.page_size
    change(np.frombuffer(data, "<u4", segment.cols, start + segment.offset))
    entries["crc32c"][bundle] = crc32c(bytes(data[start : start + size]))
    path.write_bytes(data)
    painted.rewrite(path, directory=lambda _: entries)
    with Store.open(path) as store:
        (found,) = store.verify().faults
    assert fault in found


def test_threads_may_read_at_once(path):
    with Store.open(path) as store:
        wanted = [painted.payload(i, store.layout_of(i)) for i in range(len(store.entries))]
        wrong = []

        def read(seed: int) -> None:
            for i in np.random.default_rng(seed).permutation(len(wanted)).tolist() * 5:
                buffer = bytearray(len(wanted[i]))
                store.read(i, buffer)
                if buffer != wanted[i]:
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_what_is_no_store(tmp_path, shared):
    text = tmp_path / "text.edgemem"
    text.write_text("hello")
    (tmp_path / "empty").touch()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, words in [
        (tmp_path / "missing.edgemem", "there is no such file"),
        (tmp_path, "is not a file"),
        (pipe, "is not a file"),
        (text, "not an edgemem store"),
        (tmp_path / "empty", "not an edgemem store"),
        (shared / "models" / "stories260k" / "model.safetensors", "not an edgemem store"),
        (tmp_path / ("x" * 300), "opening"),
        ("a\0b", "opening"),
        ("", "opening a store: its path is empty"),
    ]:
        with pytest.raises(StoreError, match=words) as caught:
            Store.open(path)
        assert "\n" not in str(caught.value)


def test_what_ends_early_is_said_to(tmp_path):
    path = painted.write(tmp_path / "a.edgemem")
    for size, words in ((4096, "the end of the store is missing"), (5000, "no whole number")):
        os.truncate(path, size)
        with pytest.raises(CorruptError, match=words) as caught:
            Store.open(path)
        assert "?" not in str(caught.value)
        painted.write(path, force=True)


def test_numbers_beyond_any_float_are_refused(tmp_path):
    path = painted.write(tmp_path / "a.edgemem")
    painted.rewrite(path, meta=lambda data: data.replace(b'"theta":10000.0', b'"theta":1e999'))
    with pytest.raises(CorruptError, match=r"a\.edgemem: .*the number 1e999 is too large"):
        Store.open(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    path = painted.write(tmp_path / "a.edgemem")
    monkeypatch.setattr(type(path), "open", denied)
    with pytest.raises(StoreError, match=r"a\.edgemem: Permission denied; check"):
        Store.open(path)


def test_a_newer_version_is_named(tmp_path):
    from edgemem._native import crc32c

    path = painted.write(tmp_path / "a.edgemem")
    data = bytearray(path.read_bytes())
    data[8:10] = (2).to_bytes(2, "little")
    data[16:20] = crc32c(bytes(data[:16])).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=r"a\.edgemem: the store is of a newer version"):
        Store.open(path)


class FailingFile:
    """A file that the device stops delivering."""

    def __init__(self, file):
        self._file = file
        self.failing = False

    def __getattr__(self, name):
        return getattr(self._file, name)

    def readinto(self, buffer):
        if self.failing:
            raise OSError(5, "Input/output error")
        return self._file.readinto(buffer)


def test_a_failing_device_is_a_flash_error(path):
    with Store.open(path) as store:
        store._file = FailingFile(store._file)
        buffer = bytearray(int(store.entries["payload_bytes"][0]))
        store.read(0, buffer)
        store._file.failing = True
        with pytest.raises(FlashError, match="embed bundle 0 of .*Input/output error"):
            store.read(0, buffer)
        with pytest.raises(FlashError):
            store.verify()


def test_a_store_that_shrinks_while_open(tmp_path):
    path = painted.write(tmp_path / "a.edgemem")
    with Store.open(path) as store:
        os.truncate(path, 4096)
        with pytest.raises(CorruptError, match="ends within dense bundle 0 of layer 0"):
            store.read(0, bytearray(int(store.entries["payload_bytes"][0])))
