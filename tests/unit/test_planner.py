"""The planner: what it gives fits, wastes little, and refuses only what cannot work."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgemem import planner


@st.composite
def models(draw):
    """Bundles of some classes, each with its own size."""
    layouts, sizes, may_stream, at_once, use, rows = [], [], [], [], [], []
    for layout in range(draw(st.integers(1, 4))):
        size, streams = 4096 * draw(st.integers(1, 50)), draw(st.booleans())
        wanted, used = draw(st.integers(1, 8)), draw(st.floats(0.001, 1))
        apart = draw(st.sampled_from((0, 0, 1, 50, 3000)))
        for _ in range(draw(st.integers(1, 40))):
            layouts.append(layout)
            sizes.append(size)
            may_stream.append(streams)
            at_once.append(wanted)
            use.append(used)
            rows.append(apart)
    arrays = map(np.array, (layouts, sizes, may_stream, at_once, use, rows))
    return planner.Bundles(*arrays, aside_bytes=draw(st.integers(0, 100_000)))


def each(model, layout: int) -> tuple[int, int]:
    """(bytes, how many there are) of what slots of a layout class hold: bundles, or rows of all."""
    mine = model.may_stream & (model.layouts == layout)
    rows = int(model.rows[mine][0])
    if rows > 0:
        return -(-int(model.sizes[mine].sum()) // rows), rows
    return int(model.sizes[mine][0]), int(mine.sum())


@given(models(), st.floats(0, 1.2))
def test_a_plan_fits_its_room(model, share):
    layouts, sizes, may_stream = model.layouts, model.sizes, model.may_stream
    room = int(share * sizes.sum())
    plan = planner.plan(model, room)
    floor = planner.floor_bytes(model)
    if plan is None:
        assert room < floor
        return
    if not len(plan.streamed) and not len(plan.apart):
        assert plan.resident_bytes == sizes.sum() <= room
        return
    aside = plan.aside_bytes
    assert aside == (model.aside_bytes if len(plan.apart) else 0)
    room -= aside
    slots = plan.slots(room - plan.resident_bytes)
    taken = sum(count * each(model, layout)[0] for layout, count in slots.items())
    assert plan.resident_bytes + taken <= room
    more = plan.slots(room - plan.resident_bytes + 40 * 4096)
    assert all(more[layout] >= count for layout, count in slots.items())
    held = {*plan.streamed.tolist(), *plan.apart.tolist()}
    assert held == set(np.flatnonzero(may_stream).tolist())
    assert (model.rows[plan.streamed] == 0).all() and (model.rows[plan.apart] > 0).all()
    for layout, count in slots.items():
        mine, (_, there) = may_stream & (layouts == layout), each(model, layout)
        apart = model.rows[mine][0] > 0
        least = planner.MIN_ROWS if apart else max(2, int(model.at_once[mine].max()))
        assert min(least, there) <= count <= there


@given(models())
def test_the_floor_is_honest(model):
    """Exactly at the floor there is a plan; a byte below there is none."""
    floor = planner.floor_bytes(model)
    assert planner.plan(model, floor) is not None
    assert planner.plan(model, floor - 1) is None


def test_room_is_not_wasted():
    n = np.ones(100)
    model = planner.Bundles(
        np.zeros(100, int), np.full(100, 4096), n > 0, np.full(100, 4), n, np.zeros(100, int)
    )
    plan = planner.plan(model, 50 * 4096 + 4095)
    assert plan.slots(50 * 4096 + 4095) == {0: 50}


def test_room_goes_where_tokens_want_more():
    """A table of which a token takes one row gets little beside layers that it takes whole."""
    layouts = np.repeat([0, 1], [1000, 20])
    use = np.repeat([1 / 1000, 1.0], [1000, 20])
    sizes = np.full(1020, 4096)
    model = planner.Bundles(layouts, sizes, sizes > 0, np.ones(1020, int), use, np.zeros(1020, int))
    slots = planner.plan(model, 15 * 4096).slots(15 * 4096)
    assert slots[1] >= 11 and slots[0] <= 4
    slots = planner.plan(model, 500 * 4096).slots(500 * 4096)
    assert slots == {0: 480, 1: 20}, "and the rest, once there is enough of the others"
