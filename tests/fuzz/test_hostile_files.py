"""Files changed at random but well-formed: checksums fit, JSON parses, and what it says is a lie.

Each case draws a few changes; opening or converting must end in one of our errors or in success,
never in another exception, a hang or a huge allocation. A failure prints its seed and replay
command.
"""

import copy
import json

import numpy as np
import painted
import pytest
import tiny

from edgemem import converters
from edgemem import format as fmt
from edgemem.errors import EdgeMemError

CASES = 250
VALUES = (
    None, True, False, 0, 1, -1, 2, 15, 16, 17, 255, 4096, 1 << 16, (1 << 24) + 1, 1 << 31, 1 << 32,
    1 << 63, 10**30, 0.5, -0.0, 1e-320, 1e308, "", "f32", "q8_0", "q", "rows", "é", "x" * 500,
    [], [0], [1, 2], {}, {"a": 1},
)  # fmt: skip


def places(value, path=()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


def change(value, rng) -> None:
    """Replace, remove, repeat or move one or two values somewhere inside."""
    for _ in range(int(rng.integers(1, 3))):
        all_places = places(value)
        path = all_places[rng.integers(len(all_places))]
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        kind = rng.integers(4)
        if kind == 0 and isinstance(inner, list):
            inner.insert(0, copy.deepcopy(inner[path[-1]]))
        elif kind == 1:
            del inner[path[-1]]
        elif kind == 2 and type(inner[path[-1]]) is int:
            inner[path[-1]] += int(rng.choice([-1, 1, 16, -16]))
        else:
            inner[path[-1]] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])


@pytest.fixture(scope="module", params=["SPEC", "ROUTED", "APART", "FORETOLD", "RESTING"])
def store_bytes(request, tmp_path_factory) -> bytes:
    spec = getattr(painted, request.param)
    return painted.write(tmp_path_factory.mktemp("store") / "a", spec).read_bytes()


def test_lying_metas(tmp_path, store_bytes, rng):
    path, opened = tmp_path / "a", 0
    for _ in range(CASES):
        path.write_bytes(store_bytes)

        def lie(data: bytes) -> bytes:
            value = json.loads(data)
            change(value, rng)
            return json.dumps(value).encode()

        painted.rewrite(path, meta=lie)
        try:
            painted.read_all(path)
            opened += 1
        except EdgeMemError as error:
            assert len(str(error)) < 1500
    assert 0 < opened < CASES  # neither everything nor nothing is refused


def test_lying_directories(tmp_path, store_bytes, rng):
    path = tmp_path / "a"
    path.write_bytes(store_bytes)
    answer = painted.read_all(path)
    for _ in range(CASES):
        path.write_bytes(store_bytes)

        def lie(entries: np.ndarray) -> np.ndarray:
            entries = entries.copy()
            for _ in range(int(rng.integers(1, 3))):
                position, field = rng.integers(len(entries)), rng.choice(fmt.ENTRY.names)
                top = int(np.iinfo(fmt.ENTRY[str(field)]).max)
                value = int(rng.choice([0, 1, 2, top, top - 1, rng.integers(0, 1 << 16)]))
                entries[str(field)][position] = min(value, top)
            if rng.random() < 0.1:
                entries = entries[rng.permutation(len(entries))]
            return entries

        painted.rewrite(path, directory=lie)
        try:
            assert painted.read_all(path) == answer  # what was drawn may change nothing
        except EdgeMemError:
            pass


def test_noise(tmp_path, store_bytes, rng):
    """Runs of random bytes anywhere, checksums not mended."""
    path = tmp_path / "a"
    path.write_bytes(store_bytes)
    answer = painted.read_all(path)
    for _ in range(CASES):
        data = bytearray(store_bytes)
        start = int(rng.integers(len(data)))
        data[start : start + int(rng.integers(1, 5000))] = rng.bytes(int(rng.integers(0, 5000)))
        path.write_bytes(data)
        try:
            assert painted.read_all(path) == answer
        except EdgeMemError:
            pass


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_lying_checkpoints(tmp_path, model_type, rng):
    """Config, safetensors header, index and tokenizer config in turn."""
    model = tiny.write(tmp_path / "model", model_type, 5, dtype="F32")
    names = [p.name for p in model.folder.iterdir() if p.name != "tokenizer.json"]
    good = {name: (model.folder / name).read_bytes() for name in names}
    for _ in range(CASES):
        name = names[rng.integers(len(names))]
        head = good[name][:8] if name.endswith(".safetensors") else b""
        text = good[name][len(head) :]
        if head:
            length = int.from_bytes(head, "little")
            text, data = text[:length], text[length:]
        value = json.loads(text)
        change(value, rng)
        text = json.dumps(value).encode()
        changed = len(text).to_bytes(8, "little") + text + data if head else text
        (model.folder / name).write_bytes(changed)
        try:
            converters.convert(model.folder, tmp_path / "a", "q8_0", force=True)
        except EdgeMemError as error:
            assert len(str(error)) < 1500 and "\n" not in str(error)
        (model.folder / name).write_bytes(good[name])
