"""Lengths at which code that works in lanes, blocks and pages is most likely to be wrong."""

from edgemem.dtypes import BLOCK, LANES

PAGE = 4096
LENGTHS = (
    0, 1, LANES - 1, LANES, LANES + 1, BLOCK - 1, BLOCK, BLOCK + 1, 251, PAGE - 1, PAGE, PAGE + 1,
)  # fmt: skip
DIMENSIONS = tuple(n for n in LENGTHS if 0 < n < PAGE - 1) + (2 * BLOCK, 3 * BLOCK + 5)
"""Those that a matrix may have as rows or columns without taking long."""
CYCLE = 251
"""Painted values repeat after this many: a prime, so that swapped blocks cannot look alike."""
