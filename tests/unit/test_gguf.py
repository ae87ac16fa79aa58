"""GGUF files: headers parsed within bounds, tensors found where they lie, blocks reordered."""

import struct
import tracemalloc

import gguf
import gguf_bytes as raw
import gguf_rows
import numpy as np
import pytest
from boundaries import LANES
from edgemem.converters import blocks
from edgemem.converters.checkpoint import open_checkpoint
from edgemem.converters.checkpoint.gguf import is_gguf
from edgemem.converters.checkpoint.gguf.tensors import DTYPES, TYPES, GgufFile, GgufTensor

from edgemem.dtypes import (
    BLOCK,
    BY_NAME,
    F16,
    F32,
    MXFP4,
    Q4_0,
    Q8_0,
    group_bytes,
    matrix_bytes,
    scale_plane_bytes,
)
from edgemem.kernels.reference import unpack
from edgemem.errors import CheckpointError, UnsupportedError

HUGE = (1 << 63) - 1


@pytest.fixture
def opened(tmp_path):
    """opened(bytes) → the file that holds them, as GgufFile reads it."""

    def open_(data: bytes) -> GgufFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        return GgufFile(path)

    return open_


def one_tensor(**changes) -> bytes:
    """A file with one f32 tensor of 4 × 8, changed as asked."""
    given = {"name": "a", "dims": (8, 4), "code": 0, "offset": 0} | changes
    return raw.file(tensors=[raw.tensor(**given)], data=bytes(128))


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_values_of_every_type(version, opened):
    numbers = {0: ("B", 200), 1: ("b", -3), 2: ("H", 65535), 3: ("h", -5), 4: ("I", 1 << 31),
               5: ("i", -7), 6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 60),
               11: ("q", -(1 << 60)), 12: ("d", 0.1)}  # fmt: skip
    keys = [raw.key(f"k{c}", c, struct.pack("<" + f, v)) for c, (f, v) in numbers.items()]
    keys += [raw.array(f"a{c}", c, 2, struct.pack(f"<2{f}", v, v)) for c, (f, v) in numbers.items()]
    keys.append(raw.key("text", raw.STRING, raw.text("naïve 😀")))
    keys.append(raw.array("texts", raw.STRING, 2, raw.text("") + raw.text("x")))
    found = opened(raw.file(keys, version=version)).metadata
    for code, (_, value) in numbers.items():
        assert found[f"k{code}"] == value and type(found[f"k{code}"]) is type(value)
        assert found[f"a{code}"].tolist() == [value, value]
    assert found["text"] == "naïve 😀" and found["texts"].tolist() == ["", "x"]


def test_tensors_lie_after_the_padding(opened):
    keys = [raw.u32("general.alignment", 64)]
    tensors = [raw.tensor("a", (3,), 0, 0), raw.tensor("b", (2, 5), 1, 64)]
    values = np.arange(3, dtype=np.float32), np.arange(10, dtype=np.float16).reshape(5, 2)
    data = values[0].tobytes() + bytes(52) + values[1].tobytes()
    file = opened(raw.file(keys, tensors, data, alignment=64))
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((3,), F32, (5, 2), F16)
    assert np.array_equal(a.read_rows(0, 1)[0].view(np.float32), values[0])
    assert np.array_equal(b.read_rows(1, 3).view(np.float16), values[1][1:4])


def test_types_are_those_of_the_package():
    for code, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(code)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)
    assert {name for name, _, _ in TYPES.values()} > set(DTYPES)


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (2, 6), (3, 16), (4, 32)])
def test_interleaved_rows_are_put_back(heads, head_dim, opened):
    rows = np.arange(heads * head_dim, dtype=np.float32)[:, None] * [1, 100]
    pairs = rows.reshape(heads, 2, head_dim // 2, 2).swapaxes(1, 2).reshape(-1, 2)
    tensors = [raw.tensor("w", (2, len(rows)), 0, 0)]
    plain = opened(raw.file(tensors=tensors, data=pairs.astype("<f4").tobytes())).tensors["w"]
    whole = GgufTensor(*(getattr(plain, f) for f in ("name", "type_name", "shape", "offset",
                                                    "bytes", "file")), heads=heads)  # fmt: skip
    for first in range(len(rows)):
        for count in range(1, len(rows) - first + 1):
            found = whole.read_rows(first, count).view(np.float32)
            assert np.array_equal(found, rows[first : first + count])


# ---- what is refused -----------------------------------------------------------------------------

GOOD = [raw.u32("a", 1), raw.key("b", raw.STRING, raw.text("x"))]
BAD = {
    "it is no GGUF file": b"GGML" + bytes(40),
    "no GGUF file": b"",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1 ": raw.file(version=1),
    "version 4 ": raw.file(version=4),
    "out of range": raw.file(n_tensors=HUGE),
    f"and {HUGE} keys": raw.file(n_keys=HUGE),
    "longer than the file": raw.file(n_keys=3)[:24],
    "given twice": raw.file([raw.u32("a", 1), raw.u32("a", 1)]),
    "key is not UTF-8": raw.file([raw.key(b"\xff", raw.U32, bytes(4))]),
    "t is not UTF-8": raw.file([raw.key("t", raw.STRING, raw.text(b"\xc3"))]),
    "name of 0 bytes": raw.file([raw.u32("", 1)]),
    "key has a name of": raw.file([struct.pack("<Q", HUGE)], data=bytes(99)),
    "truncated": raw.file([raw.key("t", raw.STRING, struct.pack("<Q", HUGE))], data=bytes(99)),
    "type 77": raw.file([raw.key("t", 77, bytes(8))]),
    "neither true nor false": raw.file([raw.key("t", 7, b"\2")]),
    "array of arrays": raw.file([raw.array("t", raw.ARRAY, 1, bytes(12))]),
    "t should have": raw.file([raw.array("t", raw.STRING, HUGE, b"")], data=bytes(99)),
    "header is longer": raw.file([raw.array("t", 12, 1 << 20, b"")], data=bytes(99)),
    "general.alignment = 48": raw.file([raw.u32("general.alignment", 48)]),
    "general.alignment = 0": raw.file([raw.u32("general.alignment", 0)]),
    "general.alignment = 'x'": raw.file([raw.key("general.alignment", 8, raw.text("x"))]),
    "in it twice": raw.file(tensors=[raw.tensor("a", (1,), 0, 0)] * 2, data=bytes(64)),
    "overlaps": raw.file(tensors=[raw.tensor(n, (9,), 0, o) for n, o in (("a", 0), ("b", 32))],
                         data=bytes(128)),
    "0 dimensions": one_tensor(dims=()),
    "5 dimensions": one_tensor(dims=(1,) * 5),
    "[8, 0]": one_tensor(dims=(8, 0)),
    f"[{HUGE}, 1]": one_tensor(dims=(HUGE, 1)),
    "type Q8_0 has the dimensions [8, 4]": one_tensor(code=8),
    "type Q4_K has the dimensions [32, 4]": one_tensor(code=12, dims=(32, 4)),
    "which is not known": one_tensor(code=12345),
    "not aligned": one_tensor(offset=4),
    "lies beyond": one_tensor(offset=32),
    f"at byte {HUGE - 31 + 96}": one_tensor(offset=HUGE - 31),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(what, opened):
    tracemalloc.start()
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        opened(BAD[what])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert what in str(error.value) and "m.gguf" in str(error.value)
    assert peak < 1 << 20


def test_every_truncation_is_noticed(opened):
    data = raw.file(GOOD, [raw.tensor("w", (8, 4), 0, 0)], bytes(128))
    opened(data)
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            opened(data[:length])


def test_types_that_a_store_cannot_hold_are_named(opened):
    file = opened(raw.file(tensors=[raw.tensor("w", (256, 1), 16, 0)], data=bytes(66)))
    with pytest.raises(UnsupportedError, match="w is of type IQ2_XXS; supported are F32, F16"):
        _ = file.tensors["w"].dtype


def test_vectors_of_blocks_are_refused_by_name(opened):
    data = raw.file(tensors=[raw.tensor("norm", (32,), 8, 0)], data=bytes(34))
    with pytest.raises(UnsupportedError, match="norm' is a vector of type Q8_0"):
        opened(data)


# ---- files ---------------------------------------------------------------------------------------


def test_what_is_taken_for_gguf(tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF....")
    (tmp_path / "other").write_bytes(b"PK")
    (tmp_path / "x.gguf").mkdir()
    assert is_gguf(tmp_path / "blob") and is_gguf(tmp_path / "absent.GGUF")
    assert not is_gguf(tmp_path / "other") and not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "x.gguf") and not is_gguf(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "absent.gguf")


def part(number: int, count: int, total: int, name: str) -> bytes:
    keys = [
        raw.key("split.no", 2, struct.pack("<H", number)),
        raw.key("split.count", 2, struct.pack("<H", count)),
        raw.key("split.tensors.count", 5, struct.pack("<i", total)),
    ]
    return raw.file(keys, [raw.tensor(name, (8,), 0, 0)], bytes(32))


@pytest.mark.parametrize(
    "what, parts",
    [
        ("part 0 of 2", [part(0, 2, 2, "a"), part(0, 2, 2, "b")]),
        ("part 1 of 3", [part(0, 2, 2, "a"), part(1, 3, 2, "b")]),
        ("'a' is in", [part(0, 2, 2, "a"), part(1, 2, 2, "a")]),
        ("3 tensors", [part(0, 2, 3, "a"), part(1, 2, 3, "b")]),
        ("no such file", [part(0, 2, 2, "a")]),
        ("lacks the key", [part(0, 2, 2, "a"), part(1, 2, 2, "b")]),
    ],
)
def test_parts_must_fit_each_other(what, parts, tmp_path):
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(len(parts))]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    for path in paths:
        with pytest.raises(CheckpointError, match=what):
            open_checkpoint(path)


def test_a_renamed_part_is_noticed(tmp_path):
    (tmp_path / "renamed.gguf").write_bytes(part(0, 2, 2, "a"))
    with pytest.raises(CheckpointError, match="fetch all parts, keep their names"):
        open_checkpoint(tmp_path / "renamed.gguf")


# ---- blocks --------------------------------------------------------------------------------------


def painted_rows(dtype, rows: int, n_blocks: int) -> np.ndarray:
    """GGML blocks with scales that are numbers and quants of all kinds, no two rows alike."""
    size = blocks.block_bytes(dtype)
    data = (np.arange(rows * n_blocks * size) * 7 % 251).astype(np.uint8)
    data = data.reshape(rows, n_blocks, size)
    scales = np.arange(1, rows * n_blocks + 1).astype(np.float16) / 8
    data[..., :2] = scales.view(np.uint8).reshape(rows, n_blocks, 2)
    return data.reshape(rows, -1)


def packed(rows: np.ndarray, dtype, lanes: int) -> np.ndarray:
    """FORMAT.md's formulas, a byte at a time."""
    size, chunks = blocks.block_bytes(dtype), dtype.quant_bytes // 4
    n_blocks = rows.shape[1] // size
    cols = n_blocks * BLOCK
    plane = scale_plane_bytes(dtype, cols, lanes)
    out = np.zeros((-(-len(rows) // lanes), group_bytes(dtype, cols, lanes)), np.uint8)
    out[:, plane:] = 0x80 if dtype == Q8_0 else 0x88
    for row in range(len(rows)):
        group, r = out[row // lanes], row % lanes
        for b, block in enumerate(rows[row].reshape(n_blocks, size)):
            group[(b * lanes + r) * 2 :][:2] = block[:2]
            for c in range(chunks):
                at = plane + ((b * chunks + c) * lanes + r) * 4
                quants = block[2 + 4 * c : 6 + 4 * c]
                group[at : at + 4] = quants + np.uint8(128) if dtype == Q8_0 else quants
    return out


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("dtype", [Q8_0, Q4_0], ids=lambda d: d.name)
def test_blocks_lie_where_the_format_says(dtype, lanes):
    for rows in (1, LANES - 1, LANES, LANES + 1, 3 * LANES):
        for n_blocks in (1, 2, 3, 5):
            given = painted_rows(dtype, rows, n_blocks)
            found = blocks.pack(given, dtype, dtype, lanes)
            assert np.array_equal(found, packed(given, dtype, lanes)), (rows, n_blocks)


QUANTISED = [dtype for dtype in BY_NAME.values() if dtype.is_block]


@pytest.mark.parametrize("dtype", QUANTISED, ids=lambda d: d.name)
def test_blocks_have_the_values_of_the_package(dtype):
    """Bit for bit, in a store's order as in GGML's; also in groups that lack rows."""
    kind = gguf.GGMLQuantizationType[dtype.name.upper()]
    values = np.random.default_rng(1).standard_normal((37, 3 * dtype.block), np.float32)
    rows = gguf_rows.quantized(values, kind)
    expected = gguf.quants.dequantize(rows, kind).view(np.uint32)
    assert np.array_equal(blocks.dequantize(rows, dtype).view(np.uint32), expected)
    for lanes in (1, LANES):
        packed = blocks.pack(rows, dtype, dtype, lanes)
        found = unpack(packed.tobytes(), dtype, *values.shape, lanes).astype(np.float32)
        assert np.array_equal(found.view(np.uint32), expected)


@pytest.mark.parametrize("dtype", QUANTISED, ids=lambda d: d.name)
def test_a_store_is_as_large_as_its_gguf(dtype):
    """But for what fills up planes of scales that are no whole number of words."""
    kind = gguf.GGMLQuantizationType[dtype.name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for cols in (768, 2048, 2816, 4096, 14336):
        for rows, lanes in ((32000, 1), (4096, LANES)):
            theirs = rows * cols // block * size
            most = 1.007 if cols == 768 else 1.005  # three blocks of q3_k, odd and small
            assert theirs <= matrix_bytes(dtype, rows, cols, lanes) <= most * theirs


@pytest.mark.parametrize("target", [Q8_0, F16])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_scales_must_be_finite(scale, target):
    rows = painted_rows(Q8_0, 3, 2)
    rows[1, 34:36] = np.array([scale], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        blocks.pack(rows, Q8_0, target, LANES)


@pytest.mark.parametrize("dtype", QUANTISED, ids=lambda d: d.name)
def test_hostile_scales_are_refused(dtype):
    kind = gguf.GGMLQuantizationType[dtype.name.upper()]
    good = gguf_rows.quantized(np.ones((3, 2 * dtype.block), np.float32), kind)
    blocks.pack(good, dtype, dtype, LANES)
    fields = ("e",) if dtype == MXFP4 else ("d", "min")
    for field in (f for f in fields if f in blocks.FIELDS[dtype].names):
        bad = good.copy()
        bad.view(blocks.FIELDS[dtype])[field][2, 1] = 0xFF if dtype == MXFP4 else 0xFC00
        for target in (dtype, F16):
            with pytest.raises(ValueError, match="NaN or infinite"):
                blocks.pack(bad, dtype, target, LANES)
