"""What the parts of one model share while they run: where activations and bundles are."""

from __future__ import annotations

import numpy as np

from .._native import lib
from ..format import Kind, Layout
from ..kernels import Array, Core
from ..spec import ModelSpec


class Scratch:
    """The activations of one step of up to `n_tokens` tokens; see `scratch_bytes`."""

    def __init__(self, spec: ModelSpec, n_tokens: int):
        heads, kv_heads = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.x = Array((n_tokens, spec.hidden))  # the residual stream
        self.h = Array((n_tokens, spec.hidden))  # its norm, what a block reads
        self.q = Array((n_tokens, heads))
        self.k = Array((n_tokens, kv_heads))
        self.v = Array((n_tokens, kv_heads))
        self.attended = Array((n_tokens, heads))
        self.cos = Array((n_tokens, spec.head_dim // 2))
        self.sin = Array((n_tokens, spec.head_dim // 2))
        self.ahead = Array((n_tokens if any(spec.routed) else 1, spec.hidden))
        self.routing = Routing(spec, n_tokens)
        self.foreseen = Routing(spec, n_tokens)


class Routing:
    """Which experts tokens take: `logits` in; pairs of em_ffn_run out."""

    def __init__(self, spec: ModelSpec, n_tokens: int):
        pairs = n_tokens * max(spec.top_k, 1)
        self.logits = Array((n_tokens, max(spec.n_experts, 1)))
        self.experts = Array(max(spec.n_experts, 1), np.uint32)
        self.first = Array(spec.n_experts + 2, np.int32)
        self.tokens = Array(pairs, np.int32)
        self.weights = Array(pairs)

    def choose(self, work: Workspace, n: int) -> np.ndarray:
        """uint32: the experts that n tokens need, ascending."""
        spec = work.spec
        wanted = lib.em_route(
            work.core.handle, self.logits.pointer, n, spec.n_experts, spec.top_k,
            spec.normalize_top_k, self.experts.pointer, self.first.pointer, self.tokens.pointer,
            self.weights.pointer,
        )  # fmt: skip
        assert wanted >= 0, "routing: the core refused its arguments"
        return self.experts.array[:wanted]

    def uses(self, wanted: int) -> np.ndarray:
        """int32: how many tokens take each of the experts chosen last."""
        return np.diff(self.first.array[: wanted + 1])


def core_scratch_bytes(spec: ModelSpec, n_tokens: int, threads: int) -> int:
    """The most that one native call of a step takes from the core's scratch."""
    width = max(spec.intermediate, spec.shared_intermediate)
    needs = [
        lib.em_linear_scratch(n_tokens, max(spec.hidden, spec.n_heads * spec.head_dim)),
        lib.em_ffn_scratch(n_tokens, n_tokens, spec.hidden, max(width, 1)),
        lib.em_attention_scratch(threads, spec.head_dim),
    ]
    if any(spec.routed):
        pairs = n_tokens * spec.top_k
        needs.append(lib.em_ffn_scratch(n_tokens, pairs, spec.hidden, spec.expert_intermediate))
        needs.append(lib.em_route_scratch(n_tokens, spec.n_experts, spec.top_k))
    return max(needs)


def scratch_bytes(spec: ModelSpec, n_tokens: int, threads: int) -> int:
    """Bytes of a `Scratch`, of the core's scratch, and of two rows of logits, one its reader's."""
    heads = 2 * spec.n_heads + 2 * spec.n_kv_heads
    floats = 3 * spec.hidden + (heads + 1) * spec.head_dim
    floats += 2 * (spec.n_experts + 2 * spec.top_k) + 4
    return core_scratch_bytes(spec, n_tokens, threads) + 4 * (
        n_tokens * floats + 2 * spec.vocab_size
    )


class Workspace:
    """One model's spec, core, streamer and scratch, and its store's bundles by kind and layer."""

    def __init__(self, store, streamer, core: Core, n_tokens: int):
        self.spec: ModelSpec = store.spec
        self.streamer, self.core = streamer, core
        self.scratch = Scratch(self.spec, n_tokens)
        self._store = store
        core.reserve(core_scratch_bytes(self.spec, n_tokens, core.threads))

    def bundles(self, kind: Kind, layer: int | None = None) -> tuple[np.ndarray, list[Layout]]:
        """(ids uint32 [n], their layouts) of the bundles of one kind, in one layer or in none."""
        ids = self._store.find(kind) if layer is None else self._store.find(kind, layer)
        return np.ascontiguousarray(ids, np.uint32), [self._store.layout_of(int(i)) for i in ids]
