"""GGUF files that were damaged or made to hurt: a conversion ends well, or with an error of ours.

Nothing else may come out (no other exception, no crash, no endless loop), and memory stays near
what the file is large. What comes of a file that still converts is whole, holds the numbers that
the gguf package reads, and runs. Each seed damages one file in one way; a failure names its seed.
$EDGEMEM_FUZZ is how many seeds a file gets (250), $EDGEMEM_SEED which: a long run goes in parts.
"""

import os
import tracemalloc
import warnings

import gguf
import gguf_bytes as raw
import mixed_gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
from edgemem.converters.configuration import describe
from gguf import GGMLQuantizationType as Type

import edgemem
from edgemem import converters
from edgemem.errors import EdgeMemError
from edgemem.kernels.reference import StoreWeights
from edgemem.store import Store

SEEDS = int(os.environ.get("EDGEMEM_FUZZ", "250"))
PARTS = 5
DAMAGED_BYTES = 64 << 10
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 12, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)
MAX_BYTES = 48 << 20
"""A header is read in pieces of 1 MiB and up; a tiny model and its vocabulary take a few more."""


@pytest.fixture(scope="module", params=["llama", "qwen2_moe", "mixed"])
def good(request, tmp_path_factory, seed_base) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    if request.param == "mixed":
        config = mixed_gguf.CONFIG | {"vocab_size": 272, "max_position_embeddings": 128}
        mixed_gguf.write(describe(config, {}).spec, folder / "m.gguf")
        return (folder / "m.gguf").read_bytes()
    facts = tiny_gguf.facts(request.param, 1, blocks=32)
    model = tiny.write(folder / "hf", request.param, seed_base, **facts)
    return tiny_gguf.write(folder / "m.gguf", model, Type.Q8_0).read_bytes()


def damaged(good: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, overwrite numbers with extreme ones, cut, or repeat, mostly in the header."""
    data = bytearray(good)
    header = good.index(b"token_embd.weight") + 4000
    for _ in range(int(rng.integers(1, 4))):
        end = header if rng.random() < 0.8 else DAMAGED_BYTES
        at = int(rng.integers(4, min(len(data), end)))
        match int(rng.integers(5)):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                size = int(rng.choice([4, 8]))
                number = NUMBERS[int(rng.integers(len(NUMBERS)))] % (1 << 8 * size)
                data[at : at + size] = number.to_bytes(size, "little")
            case 2:
                del data[at : at + int(rng.integers(1, 40))]
            case 3:
                data[at:at] = data[at : at + int(rng.integers(1, 200))]
            case 4 if rng.random() < 0.3:
                del data[int(rng.integers(len(data))) :]
    return bytes(data)


def attempt(path, target) -> bool:
    """Convert; True if it ended well, and then the store is whole."""
    tracemalloc.start()
    try:
        converters.convert(path, target, force=True)
    except EdgeMemError as error:
        assert str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_BYTES
    with Store.open(target) as store:
        assert store.verify().ok
        holds_what_the_package_reads(StoreWeights(store).table(), path)
    return True


def holds_what_the_package_reads(table: np.ndarray, path) -> None:
    """Bit for bit, where the package reads such a file at all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    except Exception:  # of any kind: it is not made for such files
        return
    found = tensors["token_embd.weight"]
    expected = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.array_equal(table.astype(np.float32).view("u4"), expected.view("u4"))


def run(target) -> None:
    """A few tokens; what they give is as broken as the weights are."""
    try:
        with edgemem.load(target, context=8, threads=1) as engine:
            assert engine.logits([1, 2, 3]).shape == (3, engine.spec.vocab_size)
    except EdgeMemError as error:
        assert str(error)


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_files_end_with_an_error(part, good, tmp_path, seed_base):
    path, target = tmp_path / "m.gguf", tmp_path / "m.edgemem"
    path.write_bytes(good)
    assert attempt(path, target)
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        rng = np.random.default_rng([seed_base, seed])
        path.write_bytes(damaged(good, rng))
        try:
            if attempt(path, target):
                run(target)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {seed_base}: {type(error).__name__}") from error


def test_a_header_of_nothing_but_lengths(tmp_path):
    """Arrays that claim all that their file could hold cost no more than the file."""
    path = tmp_path / "m.gguf"
    for code in (0, 7, 8, 12):
        for count in (1 << 16, 1 << 20, 1 << 22, 1 << 40):
            keys = [raw.array(f"k{i}", code, count, b"") for i in range(20)]
            path.write_bytes(raw.file(keys, data=bytes(1 << 20)))
            assert not attempt(path, tmp_path / "m.edgemem")
