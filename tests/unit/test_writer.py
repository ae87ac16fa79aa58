"""Writing a store: all of it under its name, or nothing at all."""

import os

import painted
import pytest

from edgemem.errors import CorruptError, StoreError
from edgemem.format import Kind, Layout
from edgemem.store import Store
from edgemem.writer import StoreWriter


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    a, b = (painted.write(tmp_path / name) for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes() and files(tmp_path) == ["a", "b"]
    assert Store.open(a).verify().ok


def test_an_existing_target_is_kept_without_force(tmp_path):
    target = tmp_path / "a.edgemem"
    target.write_text("precious")
    with pytest.raises(StoreError, match="--force"):
        painted.write(target)
    assert target.read_text() == "precious" and files(tmp_path) == ["a.edgemem"]
    painted.write(target, force=True)
    assert Store.open(target).verify().ok and files(tmp_path) == ["a.edgemem"]


def test_a_link_is_replaced_by_force_and_what_it_names_is_kept(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    with pytest.raises(StoreError, match="it exists"):
        painted.write(link)
    painted.write(link, force=True)
    assert precious.read_text() == "precious" and not link.is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    target = tmp_path / "a.edgemem"
    with StoreWriter(target) as writer:
        write_bundles(writer)
        target.write_text("precious")
        with pytest.raises(StoreError, match="it exists"):
            writer.finish(painted.SPEC, painted.TOKENIZER)
    assert target.read_text() == "precious" and files(tmp_path) == ["a.edgemem"]


def refuse_links(*_):
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


def test_leaving_early_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), StoreWriter(tmp_path / "a") as writer:
            write_bundles(writer)
            assert len(files(tmp_path)) == 1 and files(tmp_path)[0].startswith(".a.")
            raise error
        assert files(tmp_path) == []
    with StoreWriter(tmp_path / "a") as writer:
        write_bundles(writer)
    assert files(tmp_path) == []


def test_what_a_dead_process_left_is_stepped_over(tmp_path):
    stale = tmp_path / f".a.{os.getpid()}.tmp"
    stale.write_text("stale")
    painted.write(tmp_path / "a")
    assert Store.open(tmp_path / "a").verify().ok and stale.read_text() == "stale"


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
