"""The seam between Python and the native core: the only module that sees cffi.

Statuses become exceptions here and nowhere else. Pointers made here borrow the memory they point
into: whoever makes one keeps the owner alive.
"""

import mmap

import numpy as np

from ._core import ffi, lib
from .errors import EdgeMemError, FlashError, UnsupportedError


def crc32c(data, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object, continuing `crc`."""
    view = ffi.from_buffer(data)
    return lib.em_crc32c(crc, view, len(view))


def check(status: int, doing: str) -> None:
    """Raise what a core status means; `doing` says what was being done."""
    if status == lib.EM_OK:
        return
    if status == lib.EM_NO_MEMORY:
        raise MemoryError(f"{doing}: the core has too little memory for it")
    if status == lib.EM_NO_THREADS:
        raise EdgeMemError(f"{doing}: the system refused to start a thread; ask for fewer threads")
    if status == lib.EM_UNSUPPORTED:
        raise UnsupportedError(f"{doing}: not something that runs here")
    if status == lib.EM_FLASH:
        raise FlashError(f"{doing}: a read failed")
    raise AssertionError(f"{doing}: the core refused its arguments (status {status})")


def isa_names(running_only: bool = True) -> list[str]:
    """Instruction sets built into the core, best first; by default those that run here."""
    names = []
    for i in range(64):
        name = lib.em_isa_name(i)
        if name == ffi.NULL:
            break
        if not running_only or lib.em_isa_runs(i):
            names.append(ffi.string(name).decode())
    return names


def pointer(array: np.ndarray, ctype: str):
    """A contiguous array's first element as `ctype` ("float *"); keeps the array alive.

    What is derived from it (p + 1, a struct's field) does not. Costs 0.2 us. Raises ValueError for
    an array that is not contiguous.
    """
    return ffi.from_buffer(_ARRAYS[ctype], array)


_ARRAYS = {f"{name} *": ffi.typeof(f"{name}[]") for name in (
    "float", "double", "int32_t", "int64_t", "uint8_t", "uint16_t", "uint32_t", "uint64_t",
)}  # fmt: skip
"""Pointers that have a length and an owner, by the pointers that they serve as."""


class Slab:
    """Page-aligned zeroed memory outside the Python heap.

    On `huge` pages where the system has them: then memory is touched in pieces of their size.

    `address` is its first byte; `view` a writable memoryview of `bytes` bytes. Freed with the
    object once no view is left. Raises MemoryError.
    """

    def __init__(self, size: int, huge: bool = True):
        self.bytes = size
        try:
            # Private: shared memory would get no huge pages, and a forked child could write it.
            self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"reserving {size} bytes of memory: {error}") from error
        advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
        if advice is not None:
            try:
                self._map.madvise(advice)
            except OSError:
                pass  # a kernel without huge pages: small ones serve
        self.view = memoryview(self._map)[:size]
        self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))
