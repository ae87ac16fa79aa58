"""Heads that share a latent: products head by head, and attention over what is kept of it, against
reference.py; the same bytes on every instruction set, for every thread count and step."""

import itertools

import numpy as np
import pytest
from random_bundles import Bundle, columns, floats

from tiny_config import Draw
from tiny_families import FAMILIES

from edgemem._native import ffi, isa_names, lib, pointer
from edgemem.dtypes import BY_NAME, KV_TYPES
from edgemem.kvcache import token_bytes
from edgemem.kernels import Array, Core, Ops, Tensors, reference
from edgemem.models.latent import add_heads

U = 2.0**-24


@pytest.fixture(scope="module")
def cores() -> list[Core]:
    """One core per instruction set and thread count; all must give the first one's bytes."""
    made = [Core(threads, isa) for isa in isa_names() for threads in (1, 3)]
    for core in made:
        core.reserve(8 << 20)
    return made


def multiplied(core, bundle: Bundle, x: Array, n_heads: int, taken: int) -> np.ndarray:
    """What the operation makes of all tokens of x, and of each alone, which are the same bytes."""
    rows, everything, alone = bundle.layout["w"].rows // n_heads, x.array.copy(), []
    out = Array((len(x.array), n_heads * (taken + rows)))
    tensors = Tensors(bundle.layout, bundle.address)
    for token in range(len(x.array)):
        x.array[0], ops = everything[token], Ops(core)
        add_heads(ops, tensors, "w", n_heads, x, out, taken)
        ops.run(1)
        alone.append(out.array[0].copy())
    x.array[:] = everything
    ops.run(len(x.array))
    assert np.array(alone).tobytes() == out.array.tobytes()
    return out.array


@pytest.mark.parametrize("name", BY_NAME)
def test_each_head_has_rows_of_its_own(name, cores, rng):
    dtype = BY_NAME[name]
    for i, (heads, rows, cols) in enumerate(((1, 16, 32), (3, 48, 20), (5, 16, 96), (16, 64, 128))):
        (cols,) = columns(dtype, cols)
        taken, beyond, tokens = (0, 4, 0, 64)[i], (3, 0, 8, 0)[i], (5, 1, 2, 17)[i]
        bundle = Bundle(rng, [("w", dtype, 16, heads * rows, cols)])
        x = Array((tokens, heads * (taken + cols + beyond)))
        x.array[:] = floats(rng, *x.array.shape)
        results = [multiplied(core, bundle, x, heads, taken) for core in cores]
        assert len({found.tobytes() for found in results}) == 1
        found = results[0].reshape(tokens, heads, -1)
        each = x.array.reshape(tokens, heads, -1)
        assert np.array_equal(found[..., :taken], each[..., :taken])
        acts, steps = each[..., taken : taken + cols].astype(np.float64), cols
        if dtype.is_block:
            quants, scales = reference.quantize_blocks(acts.reshape(-1, cols))
            values = (quants * scales[..., None].astype(np.float64)).reshape(len(quants), -1)
            acts, steps = values[:, :cols].reshape(acts.shape), 2 * quants.shape[1]
        both = bundle.values["w"], bundle.sizes["w"]
        weights, sizes = (matrix.reshape(heads, rows, cols) for matrix in both)
        expected = np.einsum("nhc,hrc->nhr", acts, weights)
        bound = (steps + 3) * U * np.einsum("nhc,hrc->nhr", np.abs(acts), sizes)
        assert (np.abs(found[..., taken:] - expected) <= bound).all()


@pytest.mark.parametrize(
    "field, value",
    [
        ("rows", 17), ("cols", 0), ("taken", -1), ("x_stride", 3), ("out_stride", 15),
        ("n_heads", 0), ("dtype", 99),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(field, value, cores):
    fields = {"dtype": 0, "n_heads": 1, "rows": 16, "cols": 4, "x_stride": 4, "out_stride": 16}
    heads = ffi.new("em_heads *", fields | {field: value})
    assert lib.em_heads_run(cores[0].handle, heads, 1) == lib.EM_INVALID


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("heads, rotated, latent", [(1, 2, 16), (16, 64, 96), (5, 6, 48)])
def test_attention_over_latents(heads, rotated, latent, kv, cores, rng):
    """A key is what is rotated and then its value, the latent; out lies where q lay."""
    length, dim = 100, rotated + latent
    q, k = floats(rng, length, heads, dim), floats(rng, length, rotated)
    v = floats(rng, length, latent)
    angles = np.arange(length)[:, None] / 10.0 ** np.arange(rotated // 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    scale = 0.7 / np.sqrt(dim)

    def run(core, cuts):
        caches = [
            np.full((112, lib.em_kv_row_bytes(BY_NAME[kv].code, n)), 0x7F, np.uint8)
            for n in (rotated, latent)
        ]
        struct = ffi.new("em_attention *", {
            "n_heads": heads, "n_kv_heads": 1, "head_dim": dim, "rotary": rotated,
            "latent": latent, "kv_dtype": BY_NAME[kv].code, "scale": scale, "context": 112,
            "k_cache": ffi.cast("void *", caches[0].ctypes.data),
            "v_cache": ffi.cast("void *", caches[1].ctypes.data),
        })  # fmt: skip
        out = q.copy()
        for a, b in itertools.pairwise(cuts):
            at = [pointer(t[a:b], "float *") for t in (out, k, v, cos, sin)]
            assert lib.em_attention_store(core.handle, struct, *at, a, b - a) == lib.EM_OK
            args = ffi.NULL, at[0], a, b - a, at[0]
            assert lib.em_attention_run(core.handle, struct, *args) == lib.EM_OK
        return out[..., :latent].copy()

    found = run(cores[0], (0, length))
    for core in cores:
        assert run(core, (0, 1, 17, 63, 64, length)).tobytes() == found.tobytes(), core.isa
    frequencies = 1 / 10.0 ** np.arange(rotated // 2)
    at = np.arange(length)
    turned = reference.rotate(k[:, None].astype(np.float64), at, frequencies, 1.0)
    values = v[:, None].astype(np.float64)
    values = reference.kept(values, kv)
    keys = np.concatenate([reference.kept(turned, kv), values], axis=-1)
    queries = reference.rotate(q.astype(np.float64), at, frequencies, 1.0)
    if kv == "q8_0":
        queries[..., :rotated] = reference.rounded_queries(queries[..., :rotated], scale)
    expected = reference.attend(queries, keys, values, scale=scale)
    # A number near the middle of two may be kept as either.
    bound = {"f32": 1e-5, "f16": 2e-3, "q8_0": 3e-2}[kv] * np.abs(expected).max()
    assert np.abs(found - expected).max() <= bound


@pytest.mark.parametrize("seed", range(5))
def test_a_latent_is_kept_for_all_heads(seed):
    """Nothing that is kept of a token grows with the heads."""
    spec = FAMILIES["deepseek_v2"].spec(Draw(seed), 300)
    rotated = -(-spec.rope.dims // 16) * 16
    assert token_bytes(spec, "f16") == 2 * spec.n_layers * (rotated + spec.latent)
