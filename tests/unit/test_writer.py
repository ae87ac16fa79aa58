"""Writing a store: all of it under its name, or nothing at all."""

import itertools
import os
import subprocess
import sys

import painted
import pytest

from edgemem import writer as writer_module
from edgemem.errors import CorruptError, StoreError
from edgemem.format import Kind, Layout
from edgemem.store import Store
from edgemem.writer import StoreWriter


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(params=["unnamed", "hidden"])
def temporary(request, monkeypatch) -> str:
    """Files without a name until they are whole, or systems that have none such."""
    if request.param == "hidden":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("the system has no files without a name")
    return request.param


def test_the_same_input_gives_the_same_bytes(tmp_path, temporary):
    a, b = (painted.write(tmp_path / name) for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes() and files(tmp_path) == ["a", "b"]
    assert Store.open(a).verify().ok


def test_an_existing_target_is_kept_without_force(tmp_path, temporary):
    target = tmp_path / "a.edgemem"
    target.write_text("precious")
    with pytest.raises(StoreError, match="--force"):
        painted.write(target)
    assert target.read_text() == "precious" and files(tmp_path) == ["a.edgemem"]
    painted.write(target, force=True)
    assert Store.open(target).verify().ok and files(tmp_path) == ["a.edgemem"]


def test_a_link_is_replaced_by_force_and_what_it_names_is_kept(tmp_path, temporary):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    with pytest.raises(StoreError, match="it exists"):
        painted.write(link)
    painted.write(link, force=True)
    assert precious.read_text() == "precious" and not link.is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, temporary, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    target = tmp_path / "a.edgemem"
    with StoreWriter(target) as writer:
        write_bundles(writer)
        target.write_text("precious")
        with pytest.raises(StoreError, match="it exists"):
            writer.finish(painted.SPEC, painted.TOKENIZER)
    assert target.read_text() == "precious" and files(tmp_path) == ["a.edgemem"]


def refuse_links(*_, **__):
    raise PermissionError(1, "Operation not permitted")


def write_bundles(writer, skip=()) -> None:
    for i, (kind, layer, index, layout) in enumerate(painted.bundles()):
        if i not in skip:
            with writer.bundle(kind, layer, index, layout) as bundle:
                bundle.write(painted.payload(i, layout))


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    assert Store.open(painted.write(tmp_path / "a")).verify().ok and files(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("folder", "it is a directory"), ("no/where", "there is no directory"),
     ("pipe", "regular file"),
     ("x" * 250 + ".edgemem", "shorter name"), ("file/inside", "no directory")],
)  # fmt: skip
def test_targets_that_cannot_be(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = files(tmp_path)
    with pytest.raises(StoreError, match=words):
        StoreWriter(tmp_path / name, force=True)
    assert files(tmp_path) == before


def test_page_sizes_are_checked_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="power of two"):
        StoreWriter(tmp_path / "a", page_size=5000)
    assert files(tmp_path) == []


def test_leaving_early_leaves_nothing(tmp_path, temporary):
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), StoreWriter(tmp_path / "a") as writer:
            write_bundles(writer)
            assert len(files(tmp_path)) == (temporary == "hidden")
            assert all(name.startswith(".a.") for name in files(tmp_path))
            raise error
        assert files(tmp_path) == []
    with StoreWriter(tmp_path / "a") as writer:
        write_bundles(writer)
    assert files(tmp_path) == []


def test_what_a_dead_process_of_our_id_left_is_stepped_over(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(writer_module, "_NUMBERS", itertools.count())
    stale = tmp_path / f".a.{os.getpid()}.0.tmp"
    stale.write_text("stale")
    painted.write(tmp_path / "a")
    assert Store.open(tmp_path / "a").verify().ok and stale.read_text() == "stale"


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_dead_writers_of_the_target_left_is_removed(tmp_path, temporary):
    fcntl, dead = pytest.importorskip("fcntl", reason="no locks on files here"), dead_pid()
    kept = {f".b.{dead}.0.tmp", f".a.{os.getpid()}.0.tmp", ".a.tmp", f"a.{dead}.0.tmp",
            f".a.{dead}.0.tmp.b", f".a.{dead}.7.tmp"}  # fmt: skip
    for name in kept | {f".a.{dead}.tmp", f".a.{dead}.3.tmp"}:
        (tmp_path / name).write_text("left")
    os.mkfifo(tmp_path / f".a.{dead}.8.tmp")
    (tmp_path / f".a.{dead}.9.tmp").symlink_to("a")
    with (tmp_path / f".a.{dead}.7.tmp").open() as used:  # of a container that shares the folder
        fcntl.flock(used, fcntl.LOCK_EX)
        painted.write(tmp_path / "a")
    kept |= {"a", f".a.{dead}.8.tmp", f".a.{dead}.9.tmp"}
    assert set(files(tmp_path)) == kept


def test_a_writer_locks_its_file(tmp_path, monkeypatch):
    """So that another process, which may not see its id, does not take it for a leftover."""
    pytest.importorskip("fcntl", reason="no locks on files here")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(writer_module, "_alive", lambda pid: False)
    with StoreWriter(tmp_path / "a") as writer:
        write_bundles(writer)
        StoreWriter(tmp_path / "a").abort()
        writer.finish(painted.SPEC, painted.TOKENIZER)
    assert files(tmp_path) == ["a"]


def test_a_file_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Another process may come between making the file and locking it."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    lock, calls = writer_module._lock, []

    def late(fd: int) -> None:
        if not calls:
            (tmp_path / files(tmp_path)[0]).unlink()
        calls.append(fd)
        lock(fd)

    monkeypatch.setattr(writer_module, "_lock", late)
    assert Store.open(painted.write(tmp_path / "a")).verify().ok
    assert files(tmp_path) == ["a"] and len(calls) == 2


@pytest.mark.parametrize("skip", [(0,), (1,), (3,), (0, 1, 2, 3)])
def test_bundles_must_be_those_of_the_model(tmp_path, skip):
    with pytest.raises(CorruptError), StoreWriter(tmp_path / "a") as writer:
        write_bundles(writer, skip)
        writer.finish(painted.SPEC, painted.TOKENIZER)
    assert files(tmp_path) == []


def test_a_bundle_must_be_whole(tmp_path):
    kind, layer, index, layout = painted.bundles()[0]
    data = painted.payload(0, layout)
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(ValueError, match="bytes"), StoreWriter(tmp_path / "a") as writer:
            with writer.bundle(kind, layer, index, layout) as bundle:
                bundle.write(wrong)
    assert files(tmp_path) == []


def test_segments_are_placed_by_name(tmp_path):
    """`begin` fills the gaps: the bytes are those of a payload written in one piece."""
    whole = painted.write(tmp_path / "whole")
    with StoreWriter(tmp_path / "parts") as writer:
        for i, (kind, layer, index, layout) in enumerate(painted.bundles()):
            data = painted.payload(i, layout)
            with writer.bundle(kind, layer, index, layout) as bundle:
                for segment in layout.segments:
                    bundle.begin(segment.name)
                    middle = segment.offset + segment.bytes // 2
                    bundle.write(data[segment.offset : middle])
                    bundle.write(memoryview(data)[middle : segment.end])
        writer.finish(
            painted.SPEC,
            painted.TOKENIZER,
            chat_template="{{ text }}",
            provenance={"by": "painted"},
        )
    assert (tmp_path / "parts").read_bytes() == whole.read_bytes()


def test_segments_cannot_go_back(tmp_path):
    layout: Layout = painted.bundles()[0][-1]
    with StoreWriter(tmp_path / "a") as writer:
        with pytest.raises(ValueError, match="starts before"):
            with writer.bundle(Kind.DENSE, 0, 0, layout) as bundle:
                bundle.begin("k")
                bundle.write(bytes(layout["k"].bytes))
                bundle.begin("q")


@pytest.mark.parametrize("tokenizer", [b"", bytes((256 << 20) + 1)], ids=["empty", "huge"])
def test_nothing_is_published_that_a_reader_would_refuse(tmp_path, tokenizer):
    with pytest.raises(CorruptError, match="sections"), StoreWriter(tmp_path / "a") as writer:
        write_bundles(writer)
        writer.finish(painted.SPEC, tokenizer)
    assert files(tmp_path) == []
