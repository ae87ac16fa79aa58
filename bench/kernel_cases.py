"""What `bench.kernels` measures: each operation with the sizes that real models give it.

Weights, keys and values are taken from memory that is larger than the caches, in order, as a model
that runs token by token takes them; small inputs stay in the caches, as they do there.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from edgemem._native import Slab, check, ffi, lib, pointer
from edgemem.dtypes import BLOCK, BY_NAME, MULTIPLIED, matrix_bytes, round_up
from edgemem.kernels import ACTIVATION_CODES, Array, Core

PAGE = 4096
SCRATCH_BYTES = 64 << 20
MOST_OPS = 512
"""Operations that one native call runs; fewer where fewer of them fill the memory."""

PRODUCTS = {
    "qwen3-30b-a3b/expert-up": (768, 2048),
    "qwen3-30b-a3b/expert-down": (2048, 768),
    "qwen3-30b-a3b/q": (4096, 2048),
    "qwen3-30b-a3b/o": (2048, 4096),
    "llama-3.1-8b/ffn-up": (14336, 4096),
    "llama-3.1-8b/ffn-down": (4096, 14336),
    "head": (128256, 2048),
}
"""Rows and columns; an expert's or FFN's gate has its up's."""
PRODUCTS_OF_ALL_BLOCKS = ("qwen3-30b-a3b/q", "llama-3.1-8b/ffn-up")
"""The others are measured in formats that differ in how they are multiplied."""
EXPERTS = {"qwen3-30b-a3b/8-experts": (8, 2048, 768)}
"""Experts of a token, hidden size, neurons."""
ATTENTION = {"qwen3-30b-a3b/1k-keys": (32, 4, 1024), "qwen3-30b-a3b/16k-keys": (32, 4, 16384)}
"""Heads, KV heads, keys."""
HEAD_DIM = 128
ROWS = {"2048": 2048}
"""Columns of an operation on rows."""
ROUTES = {"128-experts-8": (128, 8)}


@dataclass(frozen=True)
class Case:
    """One operation on one kind of numbers, with one size."""

    op: str
    type: str
    shape: str
    tokens: int


@dataclass(frozen=True)
class Work:
    """A case on one core: `run(n)` does n calls. What one call takes at the least: `bytes` read
    from memory (from the caches where `cached`), `operations`, two for a multiply-add."""

    run: Callable[[int], None]
    bytes: int = 0
    operations: int = 0
    cached: bool = False
    dtype: int = lib.EM_F32
    keep: tuple = field(default=(), repr=False)  # what native structs point into


class ColdMemory:
    """Memory larger than the caches, on huge pages, with numbers that are normal in every format:
    what it holds is taken from end to end, so that what comes next is in no cache.

    Raises MemoryError.
    """

    def __init__(self, size: int):
        self._slab, self._at = Slab(round_up(size, PAGE)), 0
        numbers = np.random.default_rng(0).integers(32, 60, 1 << 20).astype(np.uint8)
        self.bytes = np.frombuffer(self._slab.view, np.uint8)
        for start in range(0, self._slab.bytes, len(numbers)):
            part = self.bytes[start : start + len(numbers)]
            part[:] = numbers[: len(part)]

    def places(self, size: int, most: int | None = None) -> list[int]:
        """Addresses of disjoint pieces of so many bytes each, in order. Raises MemoryError where
        not even one fits."""
        step = round_up(size, PAGE)
        count = self._slab.bytes // step
        if not count:
            raise MemoryError(f"{size} bytes do not fit into {self._slab.bytes} of cold memory")
        return [self._slab.address + i * step for i in range(min(count, most or count))]

    def read(self, core: Core, size: int) -> int:
        """Read the next bytes and do nothing with them; how many."""
        size = min(size, self._slab.bytes)
        if self._at + size > self._slab.bytes:
            self._at = 0
        core.read_bytes(self._slab.address + self._at, size)
        self._at += size
        return size

    def read_again(self, core: Core, size: int) -> int:
        """Read the same first bytes again, which are in the caches if they are few."""
        size = min(size, self._slab.bytes)
        core.read_bytes(self._slab.address, size)
        return size


def cases() -> Iterator[Case]:
    """All there are."""
    for shape, (_, cols) in PRODUCTS.items():
        for dtype in _types(cols, shape in PRODUCTS_OF_ALL_BLOCKS):
            for tokens in (1, 4, 64, 512):
                yield Case("product", dtype, shape, tokens)
    for shape, (_, hidden, width) in EXPERTS.items():
        for dtype in _types(math.gcd(hidden, width), all_blocks=True):
            yield Case("ffn", dtype, shape, 1)
    for shape in ATTENTION:
        for dtype in ("f32", "f16", "q8_0"):
            for tokens in (1, 64):
                yield Case("attention", dtype, shape, tokens)
    for shape in ROWS:
        for op, some in (("norm", (1, 64, 512)), ("quantize", (64, 512)), ("softmax", (64, 512))):
            for tokens in some:
                yield Case(op, "f32", shape, tokens)
    for shape in ROUTES:
        for tokens in (1, 64, 512):
            yield Case("route", "f32", shape, tokens)


def _types(cols: int, all_blocks: bool) -> list[str]:
    """Formats that have rows of so many columns."""
    formats = BY_NAME.values() if all_blocks else MULTIPLIED
    return [dtype.name for dtype in formats if dtype.block <= BLOCK or cols % dtype.block == 0]


def weight_bytes(case: Case) -> int:
    """What one call of a case takes of cold memory."""
    if case.op == "product":
        return matrix_bytes(BY_NAME[case.type], *PRODUCTS[case.shape])
    if case.op == "ffn":
        count, hidden, width = EXPERTS[case.shape]
        dtype = BY_NAME[case.type]
        bundle = 2 * matrix_bytes(dtype, width, hidden) + matrix_bytes(dtype, hidden, width)
        return count * round_up(bundle, PAGE)
    if case.op == "attention":
        _, kv_heads, keys = ATTENTION[case.shape]
        return 2 * kv_heads * keys * lib.em_kv_row_bytes(BY_NAME[case.type].code, HEAD_DIM)
    return 0


def prepare(case: Case, core: Core, memory: ColdMemory) -> Work:
    """Everything that a case needs before it runs on this core, whose scratch must be reserved
    (SCRATCH_BYTES)."""
    return _PREPARE[case.op](case, core, memory)


def _floats(*shape: int) -> Array:
    array = Array(shape)
    array.array[:] = np.random.default_rng(1).standard_normal(shape)
    return array


def _in_turn(core: Core, ops, count: int, n_tokens: int) -> Callable[[int], None]:
    """Runs native operations [count] one after another, going on where it stopped."""
    at, failed = 0, ffi.new("int32_t *")

    def run(calls: int) -> None:
        nonlocal at
        while calls > 0:
            here = min(calls, count - at)
            status = lib.em_ops_run(core.handle, ops + at, here, ffi.NULL, 0, n_tokens, failed)
            check(status, "measuring a kernel")
            at, calls = (at + here) % count, calls - here

    return run


def _repeated(call: Callable[[], int]) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls):
            check(call(), "measuring a kernel")

    return run


def _product(case: Case, core: Core, memory: ColdMemory) -> Work:
    rows, cols = PRODUCTS[case.shape]
    dtype, size = BY_NAME[case.type], weight_bytes(case)
    places = memory.places(size, MOST_OPS)
    x, out = _floats(case.tokens, cols), Array((case.tokens, rows))
    linears, ops = ffi.new("em_linear[]", len(places)), ffi.new("em_op[]", len(places))
    for i, address in enumerate(places):
        linear, ops[i].kind = linears[i], lib.EM_OP_LINEARS
        linear.weights, linear.out = ffi.cast("void *", address), out.pointer
        linear.dtype, linear.rows, linear.cols, linear.out_stride = dtype.code, rows, cols, rows
        ops[i].linears.items, ops[i].linears.x, ops[i].linears.n_items = linears + i, x.pointer, 1
    return Work(
        _in_turn(core, ops, len(places), case.tokens), size, 2 * rows * cols * case.tokens,
        dtype=dtype.code, keep=(x, out, linears, ops),
    )  # fmt: skip


def _ffn(case: Case, core: Core, memory: ColdMemory) -> Work:
    count, hidden, width = EXPERTS[case.shape]
    dtype = BY_NAME[case.type]
    matrix = matrix_bytes(dtype, width, hidden)
    ffn = ffi.new("em_ffn *", {
        "gate": 0, "up": matrix, "down": 2 * matrix,
        "gate_bias": -1, "up_bias": -1, "down_bias": -1, "hidden": hidden, "intermediate": width,
        "activation": ACTIVATION_CODES["silu"],
        "gate_dtype": dtype.code, "up_dtype": dtype.code, "down_dtype": dtype.code,
    })  # fmt: skip
    size = weight_bytes(case) // count
    chosen = cycle(
        np.arange(count, dtype=np.uint64) * size + first for first in memory.places(count * size)
    )
    first, weights = np.arange(count + 1, dtype=np.int32), np.full(count, 1 / count, np.float32)
    tokens, x, out = np.zeros(count, np.int32), _floats(1, hidden), Array((1, hidden))

    def call() -> int:
        return lib.em_ffn_run(
            core.handle, ffn, count, pointer(next(chosen), "uint64_t *"), ffi.NULL, ffi.NULL,
            pointer(first, "int32_t *"), pointer(tokens, "int32_t *"), pointer(weights, "float *"),
            x.pointer, 1, out.pointer,
        )  # fmt: skip

    return Work(_repeated(call), count * size, 6 * count * hidden * width, dtype=dtype.code)


def _attention(case: Case, core: Core, memory: ColdMemory) -> Work:
    heads, kv_heads, keys = ATTENTION[case.shape]
    size, n = weight_bytes(case), case.tokens
    struct = {"n_heads": heads, "n_kv_heads": kv_heads, "head_dim": HEAD_DIM, "context": keys}
    struct["kv_dtype"] = BY_NAME[case.type].code
    layers = []
    for address in memory.places(size):
        layers.append(ffi.new("em_attention *", struct))
        layers[-1].k_cache = ffi.cast("void *", address)
        layers[-1].v_cache = ffi.cast("void *", address + size // 2)
    q, out, layer = _floats(n, heads * HEAD_DIM), Array((n, heads * HEAD_DIM)), cycle(layers)

    def call() -> int:
        return lib.em_attention_run(
            core.handle, next(layer), ffi.NULL, q.pointer, keys - n, n, out.pointer
        )

    seen = sum(range(keys - n + 1, keys + 1))
    return Work(_repeated(call), size, 4 * heads * HEAD_DIM * seen)


def _norm(case: Case, core: Core, memory: ColdMemory) -> Work:
    cols, n = ROWS[case.shape], case.tokens
    x, weight, out = _floats(n, cols), _floats(cols), Array((n, cols))
    ops = ffi.new("em_op[]", MOST_OPS)
    for op in ops:
        op.kind, op.norm.x, op.norm.weight = lib.EM_OP_NORM, x.pointer, weight.pointer
        op.norm.out, op.norm.eps, op.norm.rows, op.norm.cols = out.pointer, 1e-6, 1, cols
    return Work(
        _in_turn(core, ops, MOST_OPS, n), x.array.nbytes, cached=True, keep=(x, weight, out)
    )


def _quantize(case: Case, core: Core, memory: ColdMemory) -> Work:
    cols, n = ROWS[case.shape], case.tokens
    x, q = _floats(n, cols), ffi.new("int8_t[]", n * (cols + 32))
    scale, total = Array((n, cols // 32 + 1)), Array((n, cols // 32 + 1), np.int32)

    def call() -> int:
        return lib.em_quantize(core.handle, x.pointer, n, cols, q, scale.pointer, total.pointer)

    return Work(_repeated(call), x.array.nbytes, cached=True)


def _softmax(case: Case, core: Core, memory: ColdMemory) -> Work:
    x = _floats(case.tokens, ROWS[case.shape])

    def call() -> int:
        return lib.em_softmax(core.handle, x.pointer, *x.array.shape)

    return Work(_repeated(call), x.array.nbytes, cached=True)


def _route(case: Case, core: Core, memory: ColdMemory) -> Work:
    (experts, top), n = ROUTES[case.shape], case.tokens
    logits, weights = _floats(n, experts), Array((n, top))
    chosen, first = Array((experts,), np.uint32), Array((experts + 1,), np.int32)
    tokens, n_chosen = Array((n, top), np.int32), ffi.new("int32_t *")
    ops = ffi.new("em_op[]", MOST_OPS)
    for op in ops:
        op.kind = lib.EM_OP_ROUTE
        route = op.route
        router, route.logits = route.router, logits.pointer
        router.n_experts, router.top_k, router.normalize, router.scale = experts, top, 1, 1.0
        route.experts, route.first, route.n_chosen = chosen.pointer, first.pointer, n_chosen
        route.tokens, route.weights = tokens.pointer, weights.pointer
    keep = (logits, weights, chosen, first, tokens, n_chosen)
    return Work(_in_turn(core, ops, MOST_OPS, n), keep=keep)  # choosing reads next to nothing


_PREPARE = {
    "product": _product, "ffn": _ffn, "attention": _attention, "norm": _norm,
    "quantize": _quantize, "softmax": _softmax, "route": _route,
}  # fmt: skip
