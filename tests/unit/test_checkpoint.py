"""Checkpoints as hostile files: every fault is named, none is believed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgemem.converters.checkpoint import Checkpoint
from edgemem.converters.checkpoint.tensors import TensorFile

from edgemem.errors import CheckpointError, UnsupportedError


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (JSON, or bytes as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


def open_file(folder: Path, content: bytes) -> TensorFile:
    path = folder / "a.safetensors"
    path.write_bytes(content)
    return TensorFile(path)


# ---- one safetensors file ----------------------------------------------------------------------


def test_agrees_with_the_reference_implementation(shared):
    import torch
    from safetensors import safe_open

    for path in sorted((shared / "models").glob("*/model.safetensors")):
        ours = TensorFile(path)
        with safe_open(path, "pt") as theirs:
            assert sorted(ours.tensors) == sorted(theirs.keys())
            for name in list(theirs.keys())[::7]:
                tensor, expected = ours.tensors[name], theirs.get_tensor(name)
                assert tensor.shape == tuple(expected.shape)
                rows = tensor.elements // tensor.shape[-1]
                assert tensor.read_rows(0, rows).tobytes() == bytes(
                    expected.view(torch.uint8).numpy()
                )
        ours.close()


def test_rows_of_any_rank(tmp_path):
    data = np.arange(24, dtype="<u2")
    header = {"t": {"dtype": "BF16", "shape": [2, 3, 4], "data_offsets": [0, 48]}}
    file = open_file(
        tmp_path, safetensors({"__metadata__": {"format": "pt"}, **header}, data.tobytes())
    )
    tensor = file.tensors["t"]
    assert tensor.elements == 24 and tensor.dtype.name == "bf16"
    assert tensor.read_rows(1, 4).tolist() == data.reshape(6, 4)[1:5].tolist()
    assert tensor.read_rows(6, 0).shape == (0, 4)
    file.close()


GOOD = {"a": entry(0, 8), "b": entry(8, 24, [2, 2])}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (safetensors({}, length=1 << 63), "should have 9223372036854775808 bytes"),
        (safetensors({}, length=(1 << 64) - 1), "should have"),
        (safetensors(GOOD, bytes(24))[:-1], "tensors end at byte"),
        (safetensors(GOOD, bytes(24))[:30], "should have"),
        (safetensors(GOOD, bytes(25)), "tensors end at byte"),
        (safetensors(b"", b""), "header is wrong"),
        (safetensors(b"{", b""), "header is wrong"),
        (safetensors(b"[]"), "not a JSON object"),
        (safetensors(b"\xff{}"), "header is wrong"),
        (safetensors(b'{"a": NaN}'), "header is wrong: NaN"),
        (safetensors(b'{"a": 1e999}'), "header is wrong: the number 1e999 is too large"),
        (safetensors(b"[" * 100_000), "nested too deeply"),
        (safetensors(b'{"a": 1, "a": 2}'), "'a' is given twice"),
        (safetensors({"a": 7}), "other fields"),
        (safetensors({"a": {**entry(0, 8), "x": 1}}, bytes(8)), "other fields"),
        (safetensors({"a": entry(0, 8, dtype=3)}, bytes(8)), "has no type"),
        (safetensors({"a": entry(0, 8, [-2])}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, [2.0])}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, [True])}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, [1 << 62])}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, [1] * 9 + [2])}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, {"x": 1})}, bytes(8)), "has the shape"),
        (safetensors({"a": entry(0, 8, [3])}, bytes(8)), "shape contradicts"),
        (safetensors({"a": entry(0, 8, [1 << 40, 1 << 40])}, bytes(8)), "shape contradicts"),
        (safetensors({"a": entry(8, 0, [2])}, bytes(8)), "has the offsets"),
        (safetensors({"a": {**entry(0, 8), "data_offsets": [0]}}, bytes(8)), "has the offsets"),
        (safetensors({"a": {**entry(0, 8), "data_offsets": "08"}}, bytes(8)), "has the offsets"),
        (safetensors({"a": {**entry(0, 8), "data_offsets": [0, 10**300]}}, bytes(8)), "offsets"),
        (safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "does not follow"),
        (safetensors({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "does not follow"),
        (safetensors({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "does not follow"),
        (safetensors({"a": entry(4, 12)}, bytes(12)), "does not follow"),
        (safetensors({"a": entry(0, 800)}, bytes(8)), "tensors end at byte"),
        (safetensors({"x" * 10_000: 7}), "other fields"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        open_file(tmp_path, content)
    assert "a.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


def test_empty_tensors_and_files_are_fine(tmp_path):
    assert open_file(tmp_path, safetensors({})).tensors == {}
    file = open_file(tmp_path, safetensors({"a": entry(0, 0, [0, 4]), "b": entry(0, 8)}, bytes(8)))
    assert set(file.tensors) == {"a", "b"}


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "BOOL", "Q7"])
def test_other_types_are_refused_when_asked_for(tmp_path, dtype):
    size = {"F64": 8}.get(dtype, 1)
    file = open_file(tmp_path, safetensors({"w": entry(0, size, [1], dtype)}, bytes(size)))
    with pytest.raises(UnsupportedError, match=f"tensor w is of type {dtype}; supported are F32"):
        file.tensors["w"].read_rows(0, 1)


def test_a_file_that_shrinks_while_open(tmp_path):
    file = open_file(tmp_path, safetensors(GOOD, bytes(24)))
    os.truncate(tmp_path / "a.safetensors", 100)
    with pytest.raises(CheckpointError, match="ends early"):
        file.tensors["b"].read_rows(0, 2)


# ---- the directory -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint in one file, to be spoiled."""
    return tiny.write(tmp_path / "model", "llama", 3, dtype="F32").folder


def shard(folder: Path, changes: dict | None = None) -> dict:
    """Make the checkpoint one of two shards with an index; return its weight map."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    tiny.write_safetensors(folder / "s-1.safetensors", {"a": np.zeros(2)}, ["a"], "F32")
    tiny.write_safetensors(folder / "s-2.safetensors", {"b": np.ones(3)}, ["b"], "F32")
    weight_map = {"a": "s-1.safetensors", "b": "s-2.safetensors"} | (changes or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards(folder):
    shard(folder)
    with Checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["b"].read_rows(0, 1).view(np.float32).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    "name",
    ["../s-1.safetensors", "/etc/passwd", "..", "", "sub/s-1.safetensors", "s-1",
     "a\0b.safetensors",
     "s-1.safetensors/", "..\\s-1.safetensors", None, 7, ["s-1.safetensors"], "s-1.safetensors\n"],
)  # fmt: skip
def test_an_index_may_name_files_beside_it_only(folder, name):
    shard(folder, {"a": name})
    (folder.parent / "s-1.safetensors").write_bytes((folder / "s-1.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is no name of a file beside it"):
        Checkpoint(folder)


def test_faults_between_index_and_shards(folder):
    shard(folder, {"c": "s-2.safetensors"})
    with pytest.raises(CheckpointError, match="s-2.safetensors: tensor 'c' should be in it"):
        Checkpoint(folder)
    shard(folder, {"a": "s-2.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'a' should be in it"):
        Checkpoint(folder)
    shard(folder, {"c": "s-3.safetensors"})
    with pytest.raises(CheckpointError, match="s-3.safetensors: there is no such file"):
        Checkpoint(folder)
    shard(folder)
    tiny.write_safetensors(
        folder / "s-2.safetensors", {"a": np.ones(3), "b": np.ones(3)}, "ab", "F32"
    )
    with pytest.raises(CheckpointError, match="tensor 'a' is in .*s-1.safetensors as well"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "index",
    [b"{}", b"[]", b"{", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 99_999],
)
def test_an_index_that_is_none(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match="index.json"):
        Checkpoint(folder)


def test_links_are_followed_as_hub_caches_need_it(folder):
    """A snapshot of the Hugging Face cache is a directory of links into ../../blobs."""
    snapshot = folder.parent / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    with Checkpoint(folder) as plain, Checkpoint(snapshot) as linked:
        assert plain.config == linked.config and list(plain.tensors) == list(linked.tensors)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_not_opened(folder, name, make):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: it is not a file"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b'{"a": NaN}', b"[" * 99_999, b"\x80"])
def test_json_files_that_are_none(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(folder)


def test_huge_json_files_are_refused_unread(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(CheckpointError, match="larger than"):
        Checkpoint(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="not a directory, nor a GGUF file"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint(folder / "config.json")
    with pytest.raises(CheckpointError, match="holds no config.json"):
        Checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer.json"):
        Checkpoint(folder)
    (folder / "tokenizer.model").touch()
    with pytest.raises(UnsupportedError, match=r"another kind \(tokenizer.model\).*AutoTokenizer"):
        Checkpoint(folder)


def test_weights_of_another_kind_are_named(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        Checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin; only safetensors.*save_pretrained"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("configured", "file", "expected"),
    [
        (None, None, None),
        ("{{ a }}", None, "{{ a }}"),
        ("{{ a }}", "{{ é }}", "{{ é }}"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "only", "template": "o"}], None, "o"),
        ([{"name": "x", "template": "1"}, {"name": "y", "template": "2"}], None, None),
        ([], None, None),
        ([None, {"name": 7}, {"name": "default", "template": "d"}], None, "d"),
    ],
)
def test_chat_templates(folder, configured, file, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({"a": 1, "chat_template": configured}))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file, encoding="utf-8")
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.chat_template == expected and checkpoint.tokenizer_config == {"a": 1}


@pytest.mark.parametrize("configured", [7, {"default": "x"}, [{"name": "default", "template": 7}]])
def test_chat_templates_that_are_none(folder, configured):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    with pytest.raises(CheckpointError, match="chat_template is neither"):
        Checkpoint(folder)
