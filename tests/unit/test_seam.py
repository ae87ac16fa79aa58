"""Pointers that go through the seam: what they point at, and how long."""

import gc
import weakref

import numpy as np
import pytest

from edgemem._native import ffi, lib, pointer

TYPES = {
    "float *": np.float32, "double *": np.float64, "int32_t *": np.int32, "int64_t *": np.int64,
    "uint8_t *": np.uint8, "uint16_t *": np.uint16, "uint32_t *": np.uint32,
    "uint64_t *": np.uint64,
}  # fmt: skip


@pytest.mark.parametrize("ctype", TYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3), (0, 3)])
def test_a_pointer_points_at_the_first_element(ctype, shape):
    array = np.arange(np.prod(shape), dtype=TYPES[ctype]).reshape(shape)
    at = pointer(array, ctype)
    assert int(ffi.cast("uintptr_t", at)) == array.ctypes.data
    assert [at[i] for i in range(array.size)] == array.ravel().tolist()


def test_writing_through_a_pointer_changes_the_array():
    x = np.array([[1, -3], [5, 0]], np.float32)
    assert lib.em_clamp(pointer(x, "float *"), x.size, 2.0) == lib.EM_OK
    assert lib.em_clamp(pointer(x, "float *") + 3, 1, 2.0) == lib.EM_OK
    assert x.tolist() == [[1, -2], [2, 0]]


def test_a_read_only_array_has_a_pointer():
    array = np.arange(3, dtype=np.uint32)
    array.flags.writeable = False
    assert pointer(array, "uint32_t *")[2] == 2


def test_an_array_lives_as_long_as_its_pointer():
    array = np.arange(4.0)
    alive, at = weakref.ref(array), pointer(array, "double *")
    del array
    gc.collect()
    assert alive() is not None and at[3] == 3
    del at
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x.T, lambda x: x[:, 1]])
def test_an_array_with_gaps_is_refused(view):
    with pytest.raises(ValueError, match="contiguous"):
        pointer(view(np.zeros((3, 4), np.float32)), "float *")
