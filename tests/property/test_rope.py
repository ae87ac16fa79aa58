"""The native tables of rotary angles against cosines and sines at float64."""

import numpy as np

from edgemem._native import lib, pointer
from edgemem.kernels import reference
from edgemem.spec import RopeSpec

U = 2.0**-24
"""The unit roundoff of float32."""


def test_tables_are_cosines_and_sines():
    for head_dim in (2, 16, 18, 128):
        freqs = reference.frequencies(RopeSpec(theta=500000.0), head_dim, 64, 64)
        for position, scale in ((0, 1.0), (8191, 1.25)):
            cos, sin = (np.zeros((5, head_dim // 2), np.float32) for _ in range(2))
            tables = pointer(cos, "float *"), pointer(sin, "float *")
            args = pointer(freqs, "double *"), head_dim, position, 5, scale, *tables
            assert lib.em_rope_table(*args) == lib.EM_OK
            angles = np.arange(position, position + 5)[:, None] * freqs
            for found, function in ((cos, np.cos), (sin, np.sin)):
                expected = scale * function(angles)
                assert (np.abs(found - expected) <= U * np.abs(expected) + 1e-11).all()
