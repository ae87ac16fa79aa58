"""The governor: slots are given back on signs of short memory, and come back in calm."""

from edgemem import memory
from edgemem.governor import CALM_S, FAULTS_PER_S, INTERVAL_S, STEP, Governor, stalled_us

MOST = 1600


class World:
    """A machine whose clock and counters a test sets."""

    def __init__(self):
        self.now, self.faults, self.stalled, self.left = 100.0, 7, 9, 0.5
        self.governor = Governor(
            lambda: self.now, lambda: self.faults, lambda: self.stalled, lambda: self.left
        )

    def later(self, seconds: float = 1.0, faults: int = 0, stalled_s: float = 0.0) -> int:
        self.now += seconds
        self.faults += faults
        self.stalled += int(stalled_s * 1e6)
        return self.governor.withheld(MOST)


def test_a_calm_machine_gives_everything():
    world = World()
    assert [world.later(faults=1, stalled_s=0.001) for _ in range(50)] == [0] * 50


def test_what_was_before_is_no_sign():
    world = World()
    world.faults, world.stalled = 10**6, 10**9
    assert world.later() == 0


def test_pages_read_back_cost_slots_step_by_step_up_to_all():
    world = World()
    world.later()
    found = [world.later(faults=2 * FAULTS_PER_S) for _ in range(STEP + 3)]
    assert found[0] == MOST // STEP and found == sorted(found) and found[-1] == MOST


def test_waiting_for_memory_counts_where_little_is_left():
    world = World()
    world.later()
    assert world.later(stalled_s=0.5) == 0, "others may have limits of their own"
    world.left = 0.01
    assert world.later(stalled_s=0.5) == MOST // STEP


def test_calm_brings_slots_back_slowly():
    world = World()
    world.later()
    for _ in range(2):
        world.later(faults=2 * FAULTS_PER_S)
    assert world.later(CALM_S / 2) == 2 * MOST // STEP
    assert world.later(CALM_S) == MOST // STEP
    assert world.later(1) == MOST // STEP
    assert world.later(CALM_S) == 0


def test_it_looks_no_more_often_than_it_must():
    world = World()
    world.later()
    assert world.later(INTERVAL_S / 2, faults=10**6) == 0
    assert world.later(INTERVAL_S, faults=0) > 0


def test_it_never_withholds_more_than_there_is():
    world = World()
    world.later()
    world.later(faults=10**6)
    assert world.governor.withheld(10) == 10


def test_pressure_is_read_from_the_kernels_text(tmp_path):
    file = tmp_path / "memory"
    file.write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=123\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=45\n"
    )
    assert stalled_us(file) == 123
    assert stalled_us(tmp_path / "absent") == 0
    file.write_text("nonsense")
    assert stalled_us(file) == 0
    assert 0 < memory.available_share() <= 1
    assert memory.major_faults() >= 0
