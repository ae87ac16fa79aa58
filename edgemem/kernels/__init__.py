"""The native operations as Python sees them: a `Core`, and arrays that it works on in place.

`reference.py` is the meaning of each operation in plain numpy; `native/edgemem.h` is the contract.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._native import Slab, check, ffi, lib, pointer
from ..format import Layout

ACTIVATION_CODES = {
    "silu": lib.EM_SILU,
    "gelu": lib.EM_GELU,
    "gelu_tanh": lib.EM_GELU_TANH,
    "gelu_quick": lib.EM_GELU_QUICK,
    "relu": lib.EM_RELU,
    "relu2": lib.EM_RELU2,
    "clamped_swiglu": lib.EM_CLAMPED_SWIGLU,
}

SCORING_CODES = {
    "softmax": lib.EM_SOFTMAX,
    "sigmoid": lib.EM_SIGMOID,
    "sparsemixer": lib.EM_SPARSEMIXER,
}


class Array:
    """A numpy array of zeros together with its address, made once so that a step makes none.

    With `trimmed` it lies in small pages of its own, whose memory can be given back.
    """

    __slots__ = ("array", "pointer")

    def __init__(self, shape, dtype=np.float32, trimmed: bool = False):
        if trimmed:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            slab = Slab(size, huge=False)
            self.array = np.frombuffer(slab.view, dtype).reshape(shape)
        else:
            self.array = np.zeros(shape, dtype)
        self.pointer = pointer(self.array, _CTYPES[np.dtype(dtype)])

    def trim(self, rows: int) -> None:
        """Give the memory beyond the first rows back; when used again, it is zero."""
        used = self.array[:rows].nbytes
        start = ffi.cast("char *", self.pointer) + used
        lib.em_pages_drop(start, self.array.nbytes - used)


_CTYPES = {
    np.dtype(np.float32): "float *",
    np.dtype(np.float64): "double *",
    np.dtype(np.int32): "int32_t *",
    np.dtype(np.uint32): "uint32_t *",
    np.dtype(np.uint64): "uint64_t *",
}


class Core:
    """A thread pool, the kernels of one instruction set, and their scratch. One step at a time.

    `threads` counts the calling thread; `isa` (or the environment's EDGEMEM_ISA) forces a set of
    kernels. Raises UnsupportedError if that set does not run here.
    """

    def __init__(self, threads: int, isa: str | None = None):
        isa = isa or os.environ.get("EDGEMEM_ISA") or None
        out = ffi.new("em_core **")
        name = ffi.NULL if isa is None else isa.encode()
        check(lib.em_core_open(threads, name, out), f"opening the core with {isa or 'any ISA'}")
        self.handle = ffi.gc(out[0], lib.em_core_close)
        self.threads = threads
        self.isa = ffi.string(lib.em_core_isa(self.handle)).decode()

    def clocks(self) -> dict[str, float]:
        """Seconds since open in which feed-forward networks waited for bundles (stall), operations
        took bundles and let go of them (taking), and foresaw which come next (foreseeing)."""
        times = lib.em_core_clocks(self.handle)
        return {
            name: getattr(times, f"{name}_ns") / 1e9 for name in ("stall", "taking", "foreseeing")
        }

    def read_bytes(self, address: int, size: int) -> None:
        """Read memory with all threads and do nothing with it: the pace that bounds products."""
        lib.em_read_bytes(self.handle, ffi.cast("void *", address), size)

    def multiply_adds(self, dtype: int, items: int) -> int:
        """Let all threads multiply and add as products of a number format (its code) do, but
        without memory, in so many parts; how many multiply-adds they were."""
        return lib.em_peak(self.handle, dtype, items)

    def trim(self, size: int) -> None:
        """Give the memory of scratch beyond `size` bytes back until it is used again."""
        lib.em_core_trim(self.handle, size)

    def reserve(self, size: int) -> None:
        """Make scratch at least `size` bytes. Not while a step runs."""
        check(lib.em_core_reserve(self.handle, size), f"reserving {size} bytes of scratch")


class Ops:
    """Operations on one scratch that one native call runs one after another, in the order in which
    they were added; whoever adds one fills in what `add` returns, and lets `keep` keep what that
    points to, if nobody else does.

    `check(status, doing)` raises what a status means.
    """

    MOST = 24

    def __init__(self, core: Core, check: Callable[[int, str], None] = check):
        self._core, self._check = core, check
        self._ops = ffi.new("em_op[]", self.MOST)
        self._failed = ffi.new("int32_t *")
        self._doing: list[str] = []
        self._kept: list[object] = []

    def add(self, kind: int, doing: str):
        """A new em_op; `doing` is for the error if it fails."""
        assert len(self._doing) < self.MOST, "a layer has more operations than were foreseen"
        op = self._ops[len(self._doing)]
        op.kind = kind
        self._doing.append(doing)
        return op

    def keep(self, owner: object) -> None:
        """Keep what operations point to."""
        self._kept.append(owner)

    def lend(self, foresight) -> None:
        """Let `foresight` (em_foresight) run these operations."""
        foresight.ops, foresight.n_ops = self._ops, len(self._doing)

    def spent(self) -> dict[str, float]:
        """Seconds that operations have worked since they were added, by what each was doing."""
        seconds = dict.fromkeys(self._doing, 0.0)
        for op, doing in zip(self._ops, self._doing):
            seconds[doing] += op.spent_ns / 1e9
        return seconds

    def run(self, n_tokens: int, attention=ffi.NULL, position: int = 0) -> None:
        """Run them on n tokens; `attention` (em_attention): the layer's cache where one attends."""
        status = lib.em_ops_run(
            self._core.handle, self._ops, len(self._doing), attention, position, n_tokens,
            self._failed,
        )  # fmt: skip
        if status != lib.EM_OK:
            self._check(status, self._doing[self._failed[0]])


@dataclass(frozen=True)
class Tensors:
    """The tensors of a bundle that stays where it is: laid out by `layout` from `address` on."""

    layout: Layout
    address: int

    def __contains__(self, name: str) -> bool:
        return name in self.layout

    def pointer(self, name: str, ctype: str):
        """Where a tensor starts."""
        return ffi.cast(ctype, self.address + self.layout[name].offset)


class Linears:
    """Matrices of one bundle that read the same input: out_i (+)= W_i x + b_i.

    `parts` is a list of (segment name, bias segment name or None, out Array).
    """

    def __init__(self, tensors: Tensors, parts, accumulate: bool = False):
        self._items = ffi.new("em_linear[]", len(parts))
        for item, (name, bias, out) in zip(self._items, parts, strict=True):
            segment = tensors.layout[name]
            item.weights = tensors.pointer(name, "void *")
            if bias is not None and bias in tensors:
                item.bias = tensors.pointer(bias, "float *")
            item.out, item.out_stride = out.pointer, segment.rows
            item.dtype, item.rows, item.cols = segment.dtype.code, segment.rows, segment.cols
            item.accumulate = accumulate

    def add_to(self, ops: Ops, x, doing: str) -> None:
        """Let `ops`, which keeps this, multiply x, a float pointer to [n_tokens, cols]."""
        op = ops.add(lib.EM_OP_LINEARS, doing).linears
        op.items, op.n_items, op.x = self._items, len(self._items), x
        ops.keep(self)
