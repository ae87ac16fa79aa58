"""Trace: totals by phase, and the recent steps."""

import threading

from edgemem.trace import RECENT_STEPS, Step, Trace

NOTHING_STREAMED = {
    "hits": 0, "misses": 0, "hit_rate": None, "read_bytes_per_token": 0.0, "stall_seconds": 0.0,
    "stall_share": 0.0, "device_seconds": 0.0, "device_share": 0.0, "withheld_bytes": 0,
}  # fmt: skip


def test_an_empty_trace_has_no_rates():
    summary = Trace().summary()
    assert summary["decode"] == {
        "steps": 0, "tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0,
        "demand_bytes_per_token": 0.0, **NOTHING_STREAMED,
    }  # fmt: skip


def test_phases_are_summed_apart():
    trace = Trace()
    trace.record("prefill", 8, 2.0, 800)
    trace.record("prefill", 2, 3.0, 0)
    trace.record("decode", 1, 0.5)
    summary = trace.summary()
    assert summary["prefill"] == {
        "steps": 2, "tokens": 10, "seconds": 5.0, "tokens_per_second": 2.0,
        "demand_bytes_per_token": 80.0, **NOTHING_STREAMED,
    }  # fmt: skip
    assert summary["decode"]["tokens_per_second"] == 2.0
    assert trace.recent[-1] == Step("decode", 1, 0.5, 0)
    trace.clear()
    assert trace.summary() == Trace().summary() and not trace.recent


def test_streaming_is_counted():
    trace = Trace()
    trace.record("decode", 2, 1.0, 50, hits=3, misses=1, read_bytes=40, stall_us=500000)
    trace.record("decode", 2, 1.0, 50, hits=4, busy_us=250000)
    assert trace.summary()["decode"].items() >= {
        "hits": 7, "misses": 1, "hit_rate": 0.875, "read_bytes_per_token": 10.0,
        "stall_seconds": 0.5, "stall_share": 0.25, "device_seconds": 0.25, "device_share": 0.125,
    }.items()  # fmt: skip


def test_old_steps_live_on_in_the_totals():
    trace = Trace()
    for _ in range(RECENT_STEPS + 5):
        trace.record("decode", 1, 0.1)
    assert len(trace.recent) == RECENT_STEPS
    assert trace.summary()["decode"]["steps"] == RECENT_STEPS + 5


def test_threads_lose_no_step():
    trace = Trace()
    threads = [
        threading.Thread(target=lambda: [trace.record("decode", 1, 1.0) for _ in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trace.summary()["decode"]["tokens"] == 2000
