"""The bytes of a store: what is written is read back, and nothing else is accepted."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import painted
import pytest

from edgemem import dtypes
from edgemem import format as fmt
from edgemem._native import crc32c
from edgemem.errors import CorruptError, EdgeMemError, StoreError, UnsupportedError
from edgemem.format import Kind, Layout
from edgemem.models.rope import inverse_frequencies
from edgemem.spec import ModelSpec, RopeSpec
from edgemem.store import Store
from edgemem.writer import StoreWriter

FORMAT = Path(fmt.__file__).parents[1] / "FORMAT.md"


def test_crc32c_is_the_checksum_that_the_format_names():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(b"56789", crc32c(b"1234")) == 0xE3069283


def test_the_document_and_the_code_agree():
    text = FORMAT.read_text(encoding="utf-8")
    table = text.split("## Directory")[1].split("## Footer")[0]
    drawn = [
        (int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| u(\d+) \|", table, re.MULTILINE)
    ]
    fields = [(offset, 8 * kind.itemsize) for kind, offset in fmt.ENTRY.fields.values()]
    assert drawn == fields and fmt.ENTRY.itemsize == 40
    kinds = re.findall(r"^\| (\d) \| ([A-Z]+) \|", text, re.MULTILINE)
    assert [(int(n), name) for n, name in kinds] == [(k.value, k.name) for k in Kind]
    assert f"version **{fmt.MAJOR}.{fmt.MINOR}**" in text
    for spec in (painted.SPEC, replace(painted.ROUTED, qk_norm="head")):
        for kind, layer, _ in fmt.bundle_order(spec, range(spec.n_layers + 1)):
            for part in fmt.bundle_parts(spec, kind, layer):
                assert f"`{part.name}`" in text


# ---- header and footer -------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4096, 16384, 1 << 20])
def test_header(page_size):
    data = fmt.encode_header(page_size, crc32c)
    assert len(data) == page_size and fmt.decode_header(data, crc32c) == page_size


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4097, 12288, 1 << 21, -4096])
def test_page_sizes_out_of_range(page_size):
    with pytest.raises(ValueError, match="page size"):
        fmt.encode_header(page_size, crc32c)


def header(major: int, minor: int, page_size: int) -> bytes:
    body = b"EDGEMEM\0" + major.to_bytes(2, "little") + minor.to_bytes(2, "little")
    body += page_size.to_bytes(4, "little")
    return body + crc32c(body).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", StoreError, "not an edgemem store"),
        (b"GGUF" + bytes(60), StoreError, "not an edgemem store"),
        (header(1, 0, 4096)[:19], StoreError, "not an edgemem store"),
        (header(1, 0, 4096)[:19] + b"\0", CorruptError, "checksum"),
        (header(2, 0, 4096), UnsupportedError, "newer version"),
        (header(2, 7, 1), UnsupportedError, r"2\.7"),
        (header(0, 9, 4096), CorruptError, "no version"),
        (header(1, 0, 4095), CorruptError, "page size"),
    ],
)
def test_headers_that_are_refused(data, error, words):
    with pytest.raises(error, match=words):
        fmt.decode_header(data, crc32c)


def test_a_newer_minor_version_is_read():
    assert fmt.decode_header(header(1, 9, 8192), crc32c) == 8192


FOOTER = fmt.Footer(
    7 * 4096, 2, fmt.Section(3 * 4096, 100, 1), fmt.Section(4 * 4096, 4096, 2),
    fmt.Section(5 * 4096, 80, 3),
)  # fmt: skip


def test_footer():
    data = fmt.encode_footer(FOOTER, 4096, crc32c)
    assert len(data) == 4096 and fmt.decode_footer(data, 4096, 7 * 4096, crc32c) == FOOTER


@pytest.mark.parametrize(
    "change",
    [
        {"file_bytes": 8 * 4096},
        {"bundle_count": 0},
        {"bundle_count": 3},
        {"bundle_count": 1 << 63},
        {"meta": fmt.Section(3 * 4096 + 1, 100, 1)},
        {"meta": fmt.Section(0, 100, 1)},
        {"meta": fmt.Section(3 * 4096, 0, 1)},
        {"meta": fmt.Section(3 * 4096, 4097, 1)},
        {"meta": fmt.Section(3 * 4096, (1 << 64) - 1, 1)},
        {"tokenizer": fmt.Section(4 * 4096, 1 << 40, 1)},
        {"tokenizer": fmt.Section(3 * 4096, 4096, 1)},
        {"directory": fmt.Section(5 * 4096, 79, 1)},
        {"directory": fmt.Section(5 * 4096, 4096 * 2, 1)},
    ],
)
def test_footers_that_do_not_fit(change):
    data = fmt.encode_footer(replace(FOOTER, **change), 4096, crc32c)
    with pytest.raises(CorruptError):
        fmt.decode_footer(data, 4096, 7 * 4096, crc32c)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [32, 255, 257])
def test_blocks_of_256_columns_are_whole(cols):
    layout = Layout.build([("a", dtypes.Q4_K, 16, 1, cols)])
    with pytest.raises(CorruptError, match="no whole blocks of q4_k"):
        Layout.from_json(layout.to_json())


@pytest.mark.parametrize("dtype", dtypes.BY_NAME.values())
def test_segments_are_aligned_and_do_not_overlap(dtype):
    cols = (256, 768, 512) if dtype.block == 256 else (3, 33, 1)
    shapes = (("a", 1, 1), ("b", 16, 17), ("c", 16, 1))
    layout = Layout.build((name, dtype, *form, n) for (name, *form), n in zip(shapes, cols))
    end = 0
    for segment in layout.segments:
        assert segment.offset % 64 == 0 and 0 <= segment.offset - end < 64
        assert segment.bytes == dtypes.matrix_bytes(
            dtype, segment.rows, segment.cols, segment.lanes
        )
        end = segment.end
    assert layout.payload_bytes == end
    assert layout["b"].rows == 17 and "b" in layout and "d" not in layout
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


GOOD = {"name": "q", "dtype": "f32", "lanes": 16, "rows": 8, "cols": 8}


@pytest.mark.parametrize(
    "data",
    [
        None, {}, [], "q", [1], [[]], [GOOD, GOOD], [GOOD] * 65, [{**GOOD, "more": 1}],
        [{k: v for k, v in GOOD.items() if k != "rows"}],
        *([{**GOOD, key: value}] for key, value in [
            ("name", 7), ("name", ""), ("name", "Q"), ("name", "a" * 33), ("name", "../q"),
            ("dtype", None), ("dtype", 3), ("dtype", []), ("lanes", 0), ("lanes", 8),
            ("lanes", True), ("lanes", 16.0), ("lanes", []), ("rows", 0), ("rows", -1),
            ("rows", 1.0), ("rows", True),
            ("rows", 1 << 25), ("rows", 10**400), ("rows", None), ("cols", 0), ("cols", "8"),
        ]),
        [{**GOOD, "rows": 1 << 24, "cols": 1 << 24}],
    ],
)  # fmt: skip
def test_layouts_that_are_refused(data):
    with pytest.raises(CorruptError):
        Layout.from_json(data)


def test_a_number_format_of_the_future_is_unsupported():
    with pytest.raises(UnsupportedError, match="q3_x.*this version reads f32"):
        Layout.from_json([{**GOOD, "dtype": "q3_x"}])


# ---- JSON and meta -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"1e999", b"[-1e400]", b"1.5E+99999",
        b"", b"{", b"NaN", b"[Infinity]", b"-Infinity", b'{"a": NaN}', b"\xff\xfe", b'"\xc3"',
        b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_json_that_is_refused(data):
    with pytest.raises(ValueError) as caught:
        fmt.parse_json(data, unique_keys=True)
    assert len(str(caught.value)) < 300


def meta() -> fmt.Meta:
    layouts = tuple(dict.fromkeys(layout for *_, layout in painted.bundles()))
    return fmt.Meta(
        painted.SPEC, layouts, "{{ x }}", {"top_k": 5}, {"bos": "é\ud800"}, {"a": []}, {}
    )


def test_meta():
    data = fmt.encode_meta(meta())
    assert fmt.decode_meta(data) == meta() and fmt.encode_meta(meta()) == data
    none = replace(meta(), chat_template=None, spec=replace(painted.SPEC, bos_id=None, eos_ids=()))
    assert fmt.decode_meta(fmt.encode_meta(none)) == none


def test_keys_of_a_newer_minor_version():
    """Passed over at the top, refused in the spec, where they may change the answer."""
    data = json.loads(fmt.encode_meta(meta()))
    assert fmt.decode_meta(json.dumps(data | {"more": {"x": 1}}).encode()) == meta()
    data["spec"]["more"] = 1
    with pytest.raises(UnsupportedError, match="more"):
        fmt.decode_meta(json.dumps(data).encode())


HOSTILE = [None, True, -1, 0, 1 << 25, 10**400, 1.5, 1e308 * 10, "x", [], {}, [None], [-1], [1.5]]


def test_a_hostile_meta_is_an_error_or_a_valid_model():
    good = json.loads(fmt.encode_meta(meta()))
    paths = [(key,) for key in good] + [("spec", key) for key in good["spec"]]
    paths += [("spec", "rope", key) for key in good["spec"]["rope"]]
    for path in paths:
        for value in [*HOSTILE, "absent"]:
            data = json.loads(json.dumps(good))
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            if value == "absent":
                del inner[path[-1]]
            try:
                decoded = fmt.decode_meta(json.dumps(data).encode())
            except EdgeMemError:
                continue
            assert isinstance(decoded.spec, ModelSpec) and isinstance(decoded.spec.rope, RopeSpec)


FAR = [1e-300, 1e-7, 1e-6, 0.5, 1.0, 1 + 1e-12, 1e6, 1e7, 1e12, 1e13, 1e300]


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_what_passes_has_finite_frequencies(kind):
    """Every number of a rope at its bounds and far beyond: refused, or it computes."""
    names = ["theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
    passed = 0
    for a, b in itertools.combinations([*names, "attention_factor", "original_positions"], 2):
        for x, y in itertools.product(FAR, FAR):
            values = {"original_positions": 64, a: x, b: y}
            values["original_positions"] = int(values["original_positions"])
            try:
                rope = RopeSpec(type=kind, **values)
            except CorruptError:
                continue
            passed += 1
            for head_dim in (4, 128, 1 << 12):
                with np.errstate(all="raise", under="ignore"):
                    found = inverse_frequencies(rope, head_dim, 64, 1 << 24)
                assert np.isfinite(found).all()
    assert passed > 100


@pytest.mark.parametrize(
    "change",
    [
        {"bos_id": 40}, {"bos_id": -1}, {"eos_ids": (2, 40)}, {"eos_ids": (-1,)},
        {"norm_eps": 1e300}, {"norm_eps": float("nan")}, {"clip_qkv": 1e39},
        {"head_dim": 2, "rope": RopeSpec("dynamic", factor=2.0)},
        {"norm": "batch"}, {"positions": "alibi"}, {"shared_norm": True},
        {"attention_cap": -1.0}, {"logit_scale": 0.0}, {"attention_scale": float("nan")},
        {"residual_scale": 1e30}, {"scoring": "argmax"}, {"router_bias": True}, {"n_groups": 2},
        {"rope": RopeSpec(dims=2 * painted.SPEC.head_dim)},
        {"rope": RopeSpec("longrope", original_positions=9, short_factors=(1.0,))},
    ],
)  # fmt: skip
def test_specs_that_would_fail_later_are_refused(change):
    with pytest.raises(CorruptError, match="is out of range"):
        replace(painted.SPEC, **change)


def test_a_routed_layer_has_a_norm_of_its_own():
    with pytest.raises(CorruptError, match="shared_norm = True is out of range"):
        replace(painted.ROUTED, parallel=True, shared_norm=True)


@pytest.mark.parametrize("groups", [{"n_groups": 3}, {"n_groups": 65}, {"n_groups": 2}])
def test_groups_of_experts_must_fit(groups):
    with pytest.raises(CorruptError, match="_groups = .* is out of range"):
        replace(painted.ROUTED, scoring="sigmoid", **groups)


def test_a_second_rope_travels():
    local = RopeSpec("longrope", 1e4, 1.0, 9, dims=4, short_factors=(1.0, 1.5),
                     long_factors=(2.0, 3.0), long_attention_factor=1.2)  # fmt: skip
    spec = replace(painted.SPEC, local_rope=local, post_norms=True, attention_cap=50.0)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_what_came_later_is_written_down_only_where_it_differs():
    later = {"norm": "layer", "positions": "learned", "gated": False, "parallel": True}
    assert not later.keys() & painted.SPEC.to_dict().keys()
    spec = replace(painted.SPEC, **later, shared_norm=True)
    assert spec.to_dict().items() >= {**later, "shared_norm": True}.items()
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


# ---- directory ---------------------------------------------------------------------------------


def test_thresholds_are_numbers_in_range():
    data = json.loads(fmt.encode_meta(replace(meta(), spec=painted.RESTING)))
    assert fmt.decode_meta(json.dumps(data).encode()).spec == painted.RESTING
    fine = [[0], [1.5]]
    wrong = [value for value in HOSTILE if value not in fine]
    for value in [*fine, *wrong, [10**400], [1e31], [True], ["0"], [0.1, 0.1]]:
        data["spec"]["thresholds"] = value
        if value in fine:
            assert fmt.decode_meta(json.dumps(data).encode()).spec.thresholds == tuple(value)
            continue
        with pytest.raises((CorruptError, UnsupportedError)):
            fmt.decode_meta(json.dumps(data).encode())


@pytest.fixture(scope="module", params=["dense", "routed"])
def directory(request, tmp_path_factory):
    """(entries, meta, end) of a good store."""
    spec = painted.SPEC if request.param == "dense" else painted.ROUTED
    path = painted.write(tmp_path_factory.mktemp("store") / "a.edgemem", spec)
    data = path.read_bytes()
    footer = fmt.decode_footer(data[-4096:], 4096, len(data), crc32c)
    sections = [data[s.offset : s.offset + s.bytes] for s in (footer.meta, footer.directory)]
    entries = np.frombuffer(sections[1], fmt.ENTRY)
    return entries, fmt.decode_meta(sections[0]), footer.meta.offset


def test_a_good_directory(directory):
    entries, meta, end = directory
    fmt.check_directory(entries, meta, 4096, end)


@pytest.mark.parametrize("field", [f for f in fmt.ENTRY.names if f != "crc32c"])
def test_every_field_of_every_entry_is_checked(directory, field):
    entries, meta, end = directory
    top = int(np.iinfo(fmt.ENTRY[field]).max)
    for position in range(len(entries)):
        old = int(entries[position][field])
        for value in {0, 1, 2, old + 1, old - 1, top, top >> 1} - {old, -1}:
            if value > top:
                continue
            changed = entries.copy()
            changed[position][field] = value
            with pytest.raises(CorruptError):
                fmt.check_directory(changed, meta, 4096, end)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_experts_of_one_layer_share_a_layout(tmp_path, monkeypatch, changed):
    """A store whose bundles are all well-formed, but one expert is in another number format."""
    everything = painted.bundles(painted.ROUTED, dtypes.F32)
    other = painted.bundles(painted.ROUTED, dtypes.F16)
    position = [kind for kind, *_ in everything].index(Kind.EXPERT) + changed
    everything[position] = other[position]
    with monkeypatch.context() as patched:
        patched.setattr("edgemem.format.directory.check_bundles", lambda *_: None)
        with StoreWriter(tmp_path / "a") as writer:
            for i, (kind, layer, index, layout) in enumerate(everything):
                with writer.bundle(kind, layer, index, layout) as bundle:
                    bundle.write(painted.payload(i, layout))
            writer.finish(painted.ROUTED, painted.TOKENIZER)
    with pytest.raises(CorruptError, match="the expert bundles of layer 0 are not of one layout"):
        Store.open(tmp_path / "a")


def test_missing_repeated_and_swapped_bundles(directory):
    entries, meta, end = directory
    wrong = [entries[:0], entries[1:], entries[:-1], entries[::-1], np.r_[entries, entries[-1:]]]
    wrong += [np.delete(entries, i) for i in range(len(entries))]
    for changed in wrong:
        with pytest.raises(CorruptError):
            fmt.check_directory(changed, meta, 4096, end)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 32}, {"n_heads": 4}, {"head_dim": 10}, {"vocab_size": 41}, {"vocab_size": 16},
        {"intermediate": 25}, {"qk_norm": "head"},
        {"n_layers": 2, "windows": (0, 0), "routed": (False, False)},
        {"n_layers": 1 << 20, "windows": (0,) * (1 << 20), "routed": (False,) * (1 << 20)},
    ],
)  # fmt: skip
def test_bundles_of_another_model_are_refused(tmp_path, change):
    path = painted.write(tmp_path / "a.edgemem")
    spec = replace(painted.SPEC, **change)

    def swap(data: bytes) -> bytes:
        return fmt.encode_meta(replace(fmt.decode_meta(data), spec=spec))

    painted.rewrite(path, meta=swap)
    with pytest.raises(CorruptError):
        painted.read_all(path)


def test_a_huge_claimed_model_costs_nothing(directory):
    """Neither time nor memory follows what a spec claims: only the entries are walked."""
    entries, meta, end = directory
    spec = replace(painted.ROUTED, n_experts=1 << 24, top_k=1)
    with pytest.raises(CorruptError):
        fmt.check_directory(entries, replace(meta, spec=spec), 4096, end)
