"""What the parts of one model share while they run: where activations and bundles are."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from .._native import ffi, lib
from ..format import Kind, Layout
from ..kernels import SCORING_CODES, Array, Core, Linears, Ops, Tensors
from ..spec import ModelSpec


LENDING_TOKENS = (8, 32, 128)
"""Steps of up to so many tokens lend what they leave of scratch,"""
LEND_AFTER_STEPS = 64
"""once there were so many of them: memory that changes hands has to be cleared by the system."""


class Scratch:
    """The activations of one step of up to `n_tokens` tokens; see `scratch_bytes`."""

    def __init__(self, spec: ModelSpec, n_tokens: int):
        self.x = Array((n_tokens, spec.hidden), trimmed=True)  # the residual stream
        self.h = Array((n_tokens, spec.hidden), trimmed=True)  # its norm, what a block reads
        self._heads = [Array((n_tokens, width), trimmed=True) for width in head_widths(spec)]
        self.q, self.k, self.v, self.attended, *more = self._heads
        if spec.latent:  # queries as they meet latents; what queries are made of
            self.absorbed, self.narrow = more
        self.angles = [Angles(rope.dims or spec.head_dim, n_tokens) for rope in spec.ropes]
        # What a block gives, where it is not added to x as it is.
        self.block = self.x if spec.plain_residual else Array(self.x.array.shape, trimmed=True)
        self.ahead = Array((n_tokens if any(spec.routed) else 1, spec.hidden), trimmed=True)
        self.routing = Routing(spec, n_tokens)
        self.foreseen = Routing(spec, n_tokens)

    def trim(self, n_tokens: int) -> None:
        """Give the memory of activations of more than n tokens back until it is used again."""
        arrays = {self.x, self.h, *self._heads, self.ahead, self.block}
        for array in arrays:
            array.trim(n_tokens)


def head_widths(spec: ModelSpec) -> list[int]:
    """Numbers of one token that attention makes on its way: `Scratch` says what they are."""
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    if not spec.latent:
        return [q, kv, kv, spec.attended]
    absorbed = spec.n_heads * spec.key_dim
    return [q, spec.rope.dims, spec.latent, spec.attended, absorbed, max(spec.q_rank, 1)]


class Angles:
    """Cosines and sines of a step's positions: those by which `dims` numbers of a head turn."""

    def __init__(self, dims: int, n_tokens: int):
        self.dims = dims
        self.cos, self.sin = Array((n_tokens, dims // 2)), Array((n_tokens, dims // 2))


class Routing:
    """Which experts tokens take: pairs of em_ffn_run."""

    def __init__(self, spec: ModelSpec, n_tokens: int):
        pairs = n_tokens * max(spec.top_k, 1)
        self.logits = Array((n_tokens, max(spec.n_experts, 1)))
        self.experts = Array(max(spec.n_experts, 1), np.uint32)
        self.first = Array(spec.n_experts + 2, np.int32)
        self.tokens = Array(pairs, np.int32)
        self.weights = Array(pairs)
        self._n_chosen = Array(1, np.int32)

    def add_to(self, ops: Ops, spec: ModelSpec, tensors: Tensors, x: Array):
        """Let `ops` route x [n, hidden] by a layer's router; the em_route_op's address."""
        router = Linears(tensors, [("router", "router_logit_bias", self.logits)])
        router.add_to(ops, x.pointer, "routing")
        op = ops.add(lib.EM_OP_ROUTE, "routing")
        route = op.route
        rules = route.router
        for name in ("n_experts", "top_k", "n_groups", "top_groups"):
            setattr(rules, name, getattr(spec, name))
        rules.normalize, rules.scoring = spec.normalize_top_k, SCORING_CODES[spec.scoring]
        rules.scale, rules.jitter = spec.routed_scale, spec.router_jitter
        if spec.router_bias:
            rules.bias = tensors.pointer("router_bias", "float *")
        for name in ("logits", "experts", "first", "tokens", "weights"):
            setattr(route, name, getattr(self, name).pointer)
        route.n_chosen = self._n_chosen.pointer
        return ffi.addressof(op, "route")


def core_scratch_bytes(spec: ModelSpec, n_tokens: int, threads: int) -> int:
    """The most that one native call of a step takes from the core's scratch."""
    width = max(spec.intermediate, spec.shared_intermediate)
    needs = [
        lib.em_linear_scratch(n_tokens, max(spec.hidden, spec.attended, spec.q_rank)),
        lib.em_ffn_scratch(n_tokens, n_tokens, spec.hidden, max(width, 1)),
        lib.em_attention_scratch(threads, spec.key_dim),
    ]
    if spec.latent:
        cols = max(spec.head_dim, spec.latent)
        needs.append(lib.em_heads_scratch(n_tokens, spec.n_heads, cols))
    if spec.neurons:
        needs.append(
            lib.em_neurons_scratch(
                threads, n_tokens, spec.hidden, spec.intermediate, max(spec.ranks, default=0)
            )
        )
    if any(spec.routed):
        pairs = n_tokens * spec.top_k
        needs.append(lib.em_ffn_scratch(n_tokens, pairs, spec.hidden, spec.expert_intermediate))
        needs.append(lib.em_route_scratch(n_tokens, spec.n_experts, spec.top_k))
    return max(needs)


def trimmed_bytes(spec: ModelSpec, of_tokens: int, n_tokens: int, threads: int) -> int:
    """Bytes that `Workspace.trim` gives back of the scratch for so many tokens, at the least."""
    floats = [spec.hidden, spec.hidden, *head_widths(spec)]
    floats += [spec.hidden] * (any(spec.routed) + (not spec.plain_residual))
    core = core_scratch_bytes(spec, of_tokens, threads)
    parts = [core - core_scratch_bytes(spec, n_tokens, threads)]
    parts += [4 * (of_tokens - n_tokens) * width for width in floats]
    return sum(max(0, part - 2 * mmap.PAGESIZE) for part in parts)


class ScratchLoan:
    """What small steps lend to others of the scratch that `chunk_tokens` tokens take: all that a
    step of one token leaves, at first."""

    def __init__(self, spec: ModelSpec, chunk_tokens: int, threads: int):
        self._spec, self._chunk_tokens, self._threads = spec, chunk_tokens, threads
        self._small_steps = 0
        self._lend(min(LENDING_TOKENS[0], chunk_tokens))

    @property
    def tokens(self) -> int:
        """Steps of up to so many tokens fit what is not lent."""
        return self._now[0]

    @property
    def bytes(self) -> int:
        """What is lent now."""
        return self._now[1]

    def _lend(self, tokens: int) -> None:
        # One assignment: an interrupt finds the old loan or the new one.
        lent = trimmed_bytes(self._spec, self._chunk_tokens, tokens, self._threads)
        self._now = (tokens, lent)

    def expect(self, n: int, trim: Callable[[int], None]) -> None:
        """A step of n tokens comes: takes back what it needs, or lends more if that is worth while,
        after `trim` was told the tokens of the largest step that may touch scratch from now on."""
        least = next((tokens for tokens in LENDING_TOKENS if n <= tokens), self._chunk_tokens)
        tokens = min(least, self._chunk_tokens)
        self._small_steps = self._small_steps + 1 if tokens < self.tokens else 0
        if self._small_steps >= LEND_AFTER_STEPS:
            trim(tokens)
        if tokens > self.tokens or self._small_steps >= LEND_AFTER_STEPS:
            self._lend(tokens)


def scratch_bytes(spec: ModelSpec, n_tokens: int, threads: int) -> int:
    """Bytes of a `Scratch`, of the core's scratch, and of two rows of logits, one its reader's."""
    floats = (3 + (not spec.plain_residual)) * spec.hidden
    floats += sum(head_widths(spec)) + len(spec.ropes) * spec.head_dim
    floats += 2 * (spec.n_experts + 2 * spec.top_k) + 4
    return core_scratch_bytes(spec, n_tokens, threads) + 4 * (
        n_tokens * floats + 2 * spec.vocab_size
    )


class Workspace:
    """One model's spec, core, streamer and scratch, and its store's bundles by kind and layer."""

    def __init__(self, store, streamer, core: Core, n_tokens: int, predict: bool = False):
        self.spec: ModelSpec = store.spec
        self.predicts = predict
        self.streamer, self.core = streamer, core
        self.scratch = Scratch(self.spec, n_tokens)
        self._store = store
        core.reserve(core_scratch_bytes(self.spec, n_tokens, core.threads))

    def trim(self, n_tokens: int) -> None:
        """Give memory that steps of up to n tokens do not touch back until it is used again."""
        self.scratch.trim(n_tokens)
        self.core.trim(core_scratch_bytes(self.spec, n_tokens, self.core.threads))

    def bundles(self, kind: Kind, layer: int | None = None) -> tuple[np.ndarray, list[Layout]]:
        """(ids uint32 [n], their layouts) of the bundles of one kind, in one layer or in none."""
        ids = self._store.find(kind) if layer is None else self._store.find(kind, layer)
        return np.ascontiguousarray(ids, np.uint32), [self._store.layout_of(int(i)) for i in ids]

    def find_neurons(self, bundle: int, found) -> None:
        """Say in `found` (em_neuron_rows) where a bundle's rows are."""
        self.streamer.find_neurons(self._store, bundle, found)

    def tensors(self, layer: int) -> Tensors:
        """What every token needs of a layer, or after the last of them."""
        ids, layouts = self.bundles(Kind.DENSE, layer)
        return Tensors(layouts[0], self.streamer.resident(int(ids[0])))

    def ops(self) -> Ops:
        """New operations, whose failures the streamer explains."""
        return Ops(self.core, self.streamer.check)
