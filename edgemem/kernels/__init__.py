"""The native operations as Python sees them: a `Core`, and arrays that it works on in place.

`reference.py` is the meaning of each operation in plain numpy; `native/edgemem.h` is the contract.
"""

import os

import numpy as np

from .._native import Slab, check, ffi, lib, pointer

ACTIVATION_CODES = {
    "silu": lib.EM_SILU,
    "gelu": lib.EM_GELU,
    "gelu_tanh": lib.EM_GELU_TANH,
    "gelu_quick": lib.EM_GELU_QUICK,
    "relu": lib.EM_RELU,
    "relu2": lib.EM_RELU2,
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
        self._stall_us = 0

    def stall_us(self) -> int:
        """Microseconds that products have waited for bundles so far."""
        self._stall_us += lib.em_core_take_stall_us(self.handle)
        return self._stall_us

    def read_bytes(self, address: int, size: int) -> None:
        """Read memory with all threads and do nothing with it: the pace that bounds products."""
        lib.em_read_bytes(self.handle, ffi.cast("void *", address), size)

    def trim(self, size: int) -> None:
        """Give the memory of scratch beyond `size` bytes back until it is used again."""
        lib.em_core_trim(self.handle, size)

    def reserve(self, size: int) -> None:
        """Make scratch at least `size` bytes. Not while a step runs."""
        check(lib.em_core_reserve(self.handle, size), f"reserving {size} bytes of scratch")


class Ops:
    """Operations on one scratch that one native call runs one after another, in the order in which
    they were added; whoever adds one fills in what `add` returns, and keeps what that points to."""

    MOST = 16

    def __init__(self, core: Core):
        self._core = core
        self._ops = ffi.new("em_op[]", self.MOST)
        self._failed = ffi.new("int32_t *")
        self._doing: list[str] = []

    def add(self, kind: int, doing: str):
        """A new em_op; `doing` is for the error if it fails."""
        assert len(self._doing) < self.MOST, "a layer has more operations than were foreseen"
        op = self._ops[len(self._doing)]
        op.kind = kind
        self._doing.append(doing)
        return op

    def run(self, n_tokens: int, attention=ffi.NULL, position: int = 0) -> None:
        """Run them on n tokens; `attention` (em_attention): the layer's cache where one attends."""
        status = lib.em_ops_run(
            self._core.handle, self._ops, len(self._doing), attention, position, n_tokens,
            self._failed,
        )  # fmt: skip
        if status != lib.EM_OK:
            check(status, self._doing[self._failed[0]])


class Linears:
    """Matrices of one bundle that read the same input: out_i (+)= W_i x + b_i.

    `parts` is a list of (segment name, bias segment name or None, out Array, first float in out);
    out rows are `stride` floats apart, by default the matrix's rows.
    """

    def __init__(
        self, core: Core, layout, parts, accumulate: bool = False, stride: int | None = None
    ):
        self._core = core
        self._items = ffi.new("em_linear[]", len(parts))
        self._offsets = []
        for item, (name, bias, out, start) in zip(self._items, parts, strict=True):
            segment = layout[name]
            item.out = out.pointer + start
            item.out_stride = stride or segment.rows
            item.dtype, item.rows, item.cols = segment.dtype.code, segment.rows, segment.cols
            item.accumulate = accumulate
            has_bias = bias is not None and bias in layout
            self._offsets.append((item, segment.offset, layout[bias].offset if has_bias else None))

    def bind(self, address: int) -> None:
        """The bundle is at `address` from now on."""
        for item, weights, bias in self._offsets:
            item.weights = ffi.cast("void *", address + weights)
            if bias is not None:
                item.bias = ffi.cast("float *", address + bias)

    def add_to(self, ops: Ops, x, doing: str) -> None:
        """Let `ops` multiply x, a float pointer to [n_tokens, cols]."""
        op = ops.add(lib.EM_OP_LINEARS, doing).linears
        op.items, op.n_items, op.x = self._items, len(self._items), x

    def run(self, x, n_tokens: int) -> None:
        """x: float pointer to [n_tokens, cols]."""
        status = lib.em_linears(self._core.handle, self._items, len(self._items), x, n_tokens)
        check(status, "multiplying matrices")


class Table:
    """A matrix split over bundles of whole rows (the last may hold fewer): gathered, or multiplied.

    Both take the bundles that are there now: their addresses, uint64 [k].
    """

    def __init__(self, core: Core, layouts):
        self._core = core
        self._segments = [layout["rows"] for layout in layouts]
        self._addresses = np.zeros(len(layouts), np.uint64)
        self.rows_per_bundle = self._segments[0].rows
        self._linears = ffi.new("em_linear[]", len(self._segments))
        rows = sum(segment.rows for segment in self._segments)
        for linear, segment in zip(self._linears, self._segments, strict=True):
            linear.dtype, linear.rows = segment.dtype.code, segment.rows
            linear.cols, linear.out_stride = segment.cols, rows

    def gather(self, ids: np.ndarray, out: Array, here: np.ndarray, addresses: np.ndarray) -> None:
        """out [n, cols] = the rows `ids`, int32 [n], contiguous, each checked by the caller.

        Rows that are not in the bundles `here` are left as they are.
        """
        first = self._segments[0]
        self._addresses[:] = 0
        self._addresses[here] = addresses
        status = lib.em_embed(
            self._core.handle, pointer(self._addresses, "uint64_t *"), first.rows,
            first.dtype.code, first.lanes, first.cols, pointer(ids, "int32_t *"), len(ids),
            out.pointer,
        )  # fmt: skip
        check(status, "gathering rows")

    def multiply(self, x, n_tokens: int, out: Array, start: int, addresses: np.ndarray) -> None:
        """out [n_tokens, rows] = x · tableᵀ in the columns of bundles `start` and on, for a float
        pointer x to [n_tokens, cols]; the others are left as they are."""
        for i, address in enumerate(addresses.tolist(), start):
            self._linears[i].weights = ffi.cast("void *", address)
            self._linears[i].out = out.pointer + i * self.rows_per_bundle
        status = lib.em_linears(
            self._core.handle, self._linears + start, len(addresses), x, n_tokens
        )
        check(status, "multiplying by a table")
