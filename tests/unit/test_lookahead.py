"""Lookahead: how much is read ahead, from what the layers before left of the device's time."""

from edgemem.lookahead import FIRST_PAUSE, FIRST_PRECISION, MEMORY, Lookahead

LAYER = (1000, 500_000, 400)
"""Idle microseconds, bytes read and busy microseconds of each layer."""


class Run:
    """Counters as a residency keeps them, layer after layer."""

    def __init__(self):
        self.lookahead, self._counters = Lookahead(), (0, 0, 0)

    def layer(self, *more: int) -> int:
        self._counters = tuple(a + b for a, b in zip(self._counters, more or LAYER, strict=True))
        return self.lookahead.admit(*self._counters)


def settled() -> Run:
    run = Run()
    for _ in range(10 * MEMORY):
        run.layer()
    return run


def test_what_is_read_in_vain_fits_the_idle_time():
    idle_us, read, busy_us = LAYER
    admitted = settled().layer()
    in_vain = admitted * (1 - FIRST_PRECISION)
    assert 0.98 < in_vain / (idle_us * read / busy_us) < 1.02


def test_nothing_is_admitted_before_the_device_has_shown_its_rate():
    run = Run()
    assert run.layer(1000, 0, 0) == run.layer(1000, 0, 0) == 0


def test_a_pause_between_steps_is_not_idle_time_of_a_layer():
    run = settled()
    before = run.layer()
    run.layer(3_600_000_000, 0, 0)
    assert run.layer() < 5 * before
    for _ in range(4 * MEMORY):
        run.layer()
    assert run.layer() < 1.1 * before


def test_where_it_does_not_pay_it_pauses_and_tries_again():
    run = settled()
    while run.layer():
        run.lookahead.learn(8, 0)
    paused = [run.layer() for _ in range(FIRST_PAUSE - 1)]
    assert not any(paused) and run.layer() > 0
