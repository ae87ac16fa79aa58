"""Engines that stream on purpose: small models, with room for a chosen share of what may stream."""

from contextlib import contextmanager
from unittest import mock

import numpy as np

import edgemem
from edgemem import inventory, planner
from edgemem.engine import Engine
from edgemem.store import Store

LONGEST = 35


@contextmanager
def opened(path, share: float, chunk: int | None = None, **options):
    """An engine with slots for `share` of its streamed bundles' bytes beyond the floor.

    What reading rows takes counts as nothing: small models would rather be resident.
    """
    no_aside = mock.patch.object(inventory, "overhead_bytes", lambda store: 0)
    with Store.open(path) as store, no_aside:
        bundles = inventory.plannable(store, predict=options.get("predict", False))
    floor, whole = planner.floor_bytes(bundles), int(bundles.sizes.sum())
    room = floor + int(share * (whole - 1 - floor))
    slab = room - int(bundles.sizes[~bundles.may_stream].sum())
    plan = planner.plan
    with (
        no_aside,
        mock.patch.object(planner, "plan", lambda bundles, _: plan(bundles, room)),
        mock.patch.object(Engine, "_slab_room", lambda self: slab),
    ):
        engine = edgemem.load(path, **options)
    engine._slab_room = lambda: slab
    try:
        if chunk:
            engine.chunk_tokens = engine.logits_tokens = chunk
        yield engine
    finally:
        engine.close()


def streams(engine) -> bool:
    return engine._plan.streams


def answer(engine, seed: int = 0) -> bytes:
    """Logits of a prompt and of some tokens after it: what may not change."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, engine.spec.vocab_size, min(LONGEST, engine.context))
    prompt = 2 * len(ids) // 3
    with engine.session() as session:
        found = [session.feed(ids[:prompt]).tobytes()]
        found += [session.feed(ids[i : i + 1]).tobytes() for i in range(prompt, len(ids))]
    return b"".join(found)
