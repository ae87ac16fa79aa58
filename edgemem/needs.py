"""What running a model takes of a memory budget: decided before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from . import inventory, planner
from ._native import isa_names
from .arguments import context_limit
from .budget import MIB, Budget, Item, current_bytes, machine_bytes, show_size
from .dtypes import BY_NAME
from .kvcache import cache_bytes, token_bytes, unused_bytes
from .models.workspace import ScratchLoan, scratch_bytes
from .planner import Plan
from .store import Store

DEFAULT_CONTEXT = 4096
CHUNK_TOKENS, LARGE_CHUNK_TOKENS = 128, 512
"""Tokens per forward pass in prefill: the larger where its scratch fits. Then experts have more
tokens each, and where bundles stream, each is read once for more of them."""
SLAB_PER_SCRATCH = 8
"""So much larger than the scratch of a large step the slab must be."""
STREAMING_LOGITS_TOKENS = 16
"""Tokens per forward pass where bundles stream and every position's logits are wanted."""
STREAMING_RESERVE_BYTES = 16 << 20
"""What slots leave for what the system keeps for this process, such as page tables."""

HEADROOM_BYTES = 4 * MIB
"""What the interpreter and its heap grow by while a model runs."""
STACK_BYTES = 128 << 10
"""Of each thread, at most: products by tiles take most (native/matrices.h)."""


class Needs:
    """What a store needs of a budget of `limit` bytes, and how it makes do with that.

    `context` tokens (None: 4096 or what the model was made for, if that is less), a KV cache of the
    type `kv`, `threads` and whether neurons are foretold, or may rest (`sparse`), are given;
    ValueError says that the model has no such context. `plan` says what streams, and is None where
    not even the least fits: then `items`, the sum, are more than the limit. Steps take
    `chunk_tokens`, or `logits_tokens` where every position's logits are wanted.
    """

    def __init__(
        self, store: Store, limit: int, context: int | None, threads: int, kv: str,
        predict: bool = False, sparse: bool = False,
    ):  # fmt: skip
        self.store, self.spec, self.kv, self.threads = store, store.spec, kv, threads
        self.predict, self.sparse = predict, sparse
        self.context = _context(store, context)
        label = f"KV cache ({self.context} tokens at {kv})"
        self.kv_item = Item(label, cache_bytes(self.spec, self.context, kv))
        isa_names()  # kernels are tested once in a process, whose memory that is from then on
        base = [
            Item("process before loading", current_bytes()),
            Item("headroom for Python and stacks", HEADROOM_BYTES + threads * STACK_BYTES),
            self.kv_item,
        ]
        self._choose(limit - sum(item.bytes for item in base))
        weights = self._weight_items()
        self._weights_bytes = sum(item.bytes for item in weights)
        self.items = [*base, Item("scratch", self._scratch_bytes(self.chunk_tokens)), *weights]

    def _choose(self, spare: int) -> None:
        """Choose what streams and how many tokens a step takes.

        Everything stays in memory where that fits. Otherwise slots take the room that is left, and
        steps are large, or small again where the floor is tight; the output head streams only
        where nothing else helps.
        """
        reserve = STREAMING_RESERVE_BYTES
        small, large = (self._scratch_bytes(n) for n in (CHUNK_TOKENS, LARGE_CHUNK_TOKENS))
        for streams, head, chunk, kept in (
            (False, False, LARGE_CHUNK_TOKENS, 0), (False, False, CHUNK_TOKENS, 0),
            (True, False, LARGE_CHUNK_TOKENS, reserve + SLAB_PER_SCRATCH * (large - small)),
            (True, False, CHUNK_TOKENS, reserve),
            (True, True, CHUNK_TOKENS, reserve), (True, True, CHUNK_TOKENS, 0),
        ):  # fmt: skip
            bundles = inventory.plannable(self.store, head, self.predict)
            self.plan: Plan | None = planner.plan(
                bundles, spare - self._scratch_bytes(chunk) - kept
            )
            if self.plan is not None and streams == self.plan.streams:
                break
        self.chunk_tokens = min(chunk, self.context)
        self.logits_tokens = min(STREAMING_LOGITS_TOKENS if streams else CHUNK_TOKENS, self.context)

    def _scratch_bytes(self, chunk: int) -> int:
        return scratch_bytes(self.spec, min(chunk, self.context), self.threads)

    def _weight_items(self) -> list[Item]:
        """What the plan takes at least; without one, the least that a plan would take."""
        if self.plan is None:
            least = planner.floor_bytes(inventory.plannable(self.store, True, self.predict))
            return [Item("weights that every token needs, and one step's bundles", least)]
        items = [Item("weights", self.plan.resident_bytes)]
        if self.plan.streams:
            label = f"slab (at least {self.plan.least_text})"
            items.append(Item(label, self.plan.least_bytes))
        if len(self.plan.apart):
            items.append(Item("reading neurons", self.plan.aside_bytes))
        return items

    def expected_slots(self, spare: int, prompt_tokens: int, more_tokens: int) -> dict[int, int]:
        """The slots of each layout class after a prompt and more tokens, one by one, where the
        budget has so much to `spare` beside `items`."""
        loan = ScratchLoan(self.spec, self.chunk_tokens, self.threads)
        for n in (min(prompt_tokens, self.chunk_tokens), *[1] * more_tokens):
            loan.expect(n, lambda _: None)
        unused = unused_bytes(self.spec, self.context, self.kv, prompt_tokens + more_tokens)
        return self.plan.slots(self.slab_room(spare, unused + loan.bytes))

    def slab_room(self, spare: int, unused: int) -> int:
        """Bytes that slots may take: what is theirs, and of what the budget has to `spare`, and
        others do not use yet."""
        return self.plan.least_bytes + max(0, spare + unused - STREAMING_RESERVE_BYTES)

    def advise(self, budget: Budget, items: Sequence[Item], spare: int) -> list[str]:
        """What would fit where `items` do not: a shorter context, a smaller format, more memory."""
        needed = sum(item.bytes for item in items)
        lines = []
        per_token = token_bytes(self.spec, self.kv)
        context = (spare - needed + self.kv_item.bytes) // per_token // 64 * 64
        if context > 0:
            lines.append(f"a context of {context} tokens would fit (--context {context})")
        for name in ("f16", "q8_0"):
            smaller = cache_bytes(self.spec, self.context, name)
            saved = self.kv_item.bytes - smaller
            if saved > 0 and needed - saved <= spare:
                lines.append(f"a KV cache at {name} would fit: {show_size(smaller)} (--kv {name})")
                break
        for name in ("q8_0", "q4_0"):
            smaller = inventory.bytes_as(self.store, BY_NAME[name])
            if needed - self._weights_bytes + smaller <= spare:
                size = show_size(smaller)
                lines.append(
                    f"the same model at {name} would fit: about {size} ({self._how(name)})"
                )
                break
        return lines + advise_memory(budget.promised + needed)

    def _how(self, dtype: str) -> str:
        """How to have the store in another number format. Its predictors and thresholds go."""
        spec = self.spec
        again = ", then calibrate again" if spec.ranks or any(spec.thresholds) else ""
        return f"convert {'--neurons ' if spec.neurons else ''}--dtype {dtype}{again}"


def advise_memory(needed: int) -> list[str]:
    """The line that says which budget would do, where this machine has so many bytes."""
    if needed > machine_bytes():
        return []
    # A process does not start with the same bytes each time.
    return [f"this would fit with --memory {-(-needed // MIB) + 1}M"]


def _context(store: Store, context: int | None) -> int:
    limit = context_limit(store.spec)
    chosen = min(DEFAULT_CONTEXT, store.spec.max_positions) if context is None else int(context)
    if chosen > limit:
        raise ValueError(f"context {chosen} is more than this model's {limit} tokens")
    return chosen
