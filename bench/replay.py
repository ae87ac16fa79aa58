"""Hit rates of every policy on recorded routing: `python -m bench.replay TRACE... [--share S]`.

TRACE is a file that `--trace` wrote, or a published one (`*.route.csv.xz`). A cache of each share
of all bundles starts empty, and hits count after the first third of the steps. "closed" is how far
the default comes from LRU towards Belady, which knows the future. For a trace of our own, the run
that wrote it is replayed as well: its policy, its slots, and every step (not "static", whose
profile the trace does not hold). Its hits are those of the live run, one by one. What was read
ahead (a dense layer's bundle, the head's, and with lookahead all) was there or still on its way by
chance: such hits are compared apart, and in replay count what stayed from earlier demand.

Where neurons streamed, a second table says the same of their rows, with room for that share of each
layer's: "heat" is what the engine goes by (native/row_places.c).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from bench import replay_rows
from bench.replay_cache import Belady, hit_rate, simulate
from bench.replay_traces import Routing, read
from edgemem.errors import EdgeMemError
from edgemem.policies import POLICIES, Policy, Static, build

SHARES = (0.10, 0.25, 0.50)

PUBLISHED = {
    "qwen": {0.10: (0.49, 0.75), 0.25: (0.84, 0.94), 0.50: (0.98, 0.98)},
    "gemma": {0.10: (0.49, 0.74), 0.25: (0.80, 0.92), 0.50: (0.97, 0.98)},
    "gptoss": {0.10: (0.57, 0.77), 0.25: (0.79, 0.86), 0.50: (0.86, 0.86)},
}
"""LRU and Belady as they were published with these traces."""


def policies(routing: Routing) -> list[Policy]:
    """One of each kind. The static one knows the popularity of the first third, as a profile of
    the same model would."""
    known = routing.steps < routing.n_steps // 3
    popularity = routing.popularity(known)
    found = [build(name, routing.layer_of, routing.n_layers, popularity) for name in POLICIES]
    return [*found, Belady(routing)]


def compare(routing: Routing, share: float) -> dict[str, float]:
    """The hit rate of each policy by name."""
    slots, first = routing.slots_of(share), routing.n_steps // 3
    return {
        p.name: hit_rate(routing, simulate(routing, p, slots), first) for p in policies(routing)
    }


def again(routing: Routing) -> np.ndarray:
    """Replay the run that wrote this trace: hits of each event, int64 [events]."""
    policy = build(routing.policy, routing.layer_of, routing.n_layers)
    return simulate(routing, policy, routing.slots, routing.resized)


def show(routing: Routing, shares: list[float], names: list[str]) -> None:
    """Print one table row for each share of the experts."""
    for share in shares:
        rates = compare(routing, share)
        low, high = rates["lru"], rates["belady"]
        cells = [f"{rates[name]:.3f}" for name in names]
        gap = rates[names[0]] - low
        cells.append(f"{gap / (high - low):.0%}" if high - low > 0.01 else "–")
        published = PUBLISHED.get(routing.name, {}).get(share)
        cells.append("{:.2f} / {:.2f}".format(*published) if published else "–")
        print(f"| {routing.name} | {share:.0%} | " + " | ".join(cells) + " |")


def show_again(routing: Routing) -> None:
    """Print whether a replay finds the hits that the live run recorded."""
    hits = again(routing)
    line = f"{routing.name}: {routing.policy}, {sum(routing.slots)} slots: "
    line += f"hit rate {hit_rate(routing, hits, 0):.4f} in replay"
    if routing.hits is not None:
        line += f", {hit_rate(routing, routing.hits, 0):.4f} live"
        ahead, equal = routing.read_ahead, hits == routing.hits
        for name, events in (("layers", ~ahead), ("layers read ahead", ahead)):
            if events.any():
                line += (
                    f"; hits are equal in {equal[events].sum()} of {events.sum()} {name} of steps"
                )
    print(line)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give one above 0, up to 1")
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument(
        "--share", action="append", type=_share, help="of all bundles, as 0.25; repeatable"
    )
    args = parser.parse_args()
    names = [*POLICIES, "belady"]
    try:
        routings = [read(path) for path in args.traces]
        apart = [rows for path in args.traces if (rows := replay_rows.read(path)) is not None]
    except EdgeMemError as error:
        sys.exit(f"error: {error}")
    shares = args.share or list(SHARES)
    print("| trace | cache | " + " | ".join(names) + " | closed | published LRU / Belady |")
    print("|---" * (len(names) + 4) + "|")
    for routing in routings:
        show(routing, shares, names)
    if apart:
        print("\n| trace | rows | heat | lru | belady | closed |\n" + "|---" * 6 + "|")
    for rows in apart:
        replay_rows.show(rows, shares)
    print()
    for routing in routings:
        if routing.policy in POLICIES and routing.policy != Static.name:
            show_again(routing)
    for rows in apart:
        replay_rows.show_again(rows)


if __name__ == "__main__":
    main()
