"""What each part of streaming neurons brings.

`python -m bench.ablation PLAIN CALIBRATED --memory SIZE`: PLAIN is a store with FFNs as
a whole, CALIBRATED one of the same shape whose FFNs are taken apart and which has predictors. The
rows are those of LLM in a flash (arXiv 2312.11514, table 3), and
edgemem's own ring of dense layers and exact neurons beside them:

    naive        all weights are read again for each token
    hybrid       what fits stays, the rest is read in its turn
    dense ring   the same, and what comes next is read while something is computed
    exact        which neurons are active is computed, their rows stay while there is room
    + predictor  which neurons are active is foretold; rows are read in parts and leave at once
    + windowing  rows of earlier tokens stay
    + bundling   rows are read in one piece: the whole system

Each row is `edgemem bench` in a process of its own, with empty slots, --rounds times in turn. Time
is of a decoded token: in which it waited for reads, in which rows and bundles were found places,
and all else.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass

from .harness import Spread, busy_cores, fingerprint, spread

ROWS = (
    ("naive", "plain", ("--loading", "naive")),
    ("hybrid", "plain", ("--loading", "hybrid")),
    ("dense ring", "plain", ()),
    ("exact", "calibrated", ()),
    ("+ predictor", "calibrated", ("--predict", "--no-windowing", "--no-bundling")),
    ("+ windowing", "calibrated", ("--predict", "--no-bundling")),
    ("+ bundling", "calibrated", ("--predict",)),
)
HEAD = (
    "", "DRAM GiB", "read/token MiB", "read GB/s", "I/O ms", "memory ms", "compute ms", "total ms",
    "tok/s", "× naive", "× hybrid",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One system; times in seconds per token, medians of rounds, `total` with its spread."""

    name: str
    peak_rss_bytes: int
    read_bytes: float
    device_seconds: float
    waiting: float
    memory: float
    total: Spread


def measured(store: str, memory: str, options: tuple[str, ...], counts: list[str]) -> dict:
    """One budget's result of `edgemem bench --json`."""
    argv = [sys.executable, "-m", "edgemem", "bench", store, "--memory", memory, "--json"]
    done = subprocess.run([*argv, *options, *counts], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"measuring {' '.join(options) or store} failed; see above")
    return json.loads(done.stdout)["results"][0]


def row_of(name: str, results: list[dict]) -> Row:
    """The medians of a system's rounds."""

    def middle(value) -> float:
        return statistics.median(map(value, results))

    def seconds(result: dict) -> float:
        return 1 / result["decode"]["tokens_per_second"]["median"]

    return Row(
        name=name,
        peak_rss_bytes=max(result["peak_rss_bytes"] for result in results),
        read_bytes=middle(lambda r: r["decode"]["read_bytes_per_token"]),
        device_seconds=middle(lambda r: r["decode"]["device_share"] * seconds(r)),
        waiting=middle(lambda r: r["breakdown"]["waiting for bundles"]),
        memory=middle(lambda r: r["breakdown"]["taking bundles"]),
        total=spread([seconds(result) for result in results]),
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    total = {row.name: row.total.median for row in rows}
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    for row in rows:
        middle = row.total.median
        rate = row.read_bytes / row.device_seconds / 1e9 if row.device_seconds else 0.0
        compute = max(0.0, middle - row.waiting - row.memory)
        span = f"{1000 * middle:.0f} ({1000 * row.total.low:.0f}–{1000 * row.total.high:.0f})"
        cells = [
            row.name, f"{row.peak_rss_bytes / 2**30:.2f}", f"{row.read_bytes / 2**20:.1f}",
            f"{rate:.2f}", f"{1000 * row.waiting:.0f}", f"{1000 * row.memory:.1f}",
            f"{1000 * compute:.0f}", span, f"{1 / middle:.2f}",
        ]  # fmt: skip
        cells += [f"{total[name] / middle:.2f}" if name in total else "" for name in _BASELINES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_BASELINES = ("naive", "hybrid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("plain")
    parser.add_argument("calibrated")
    parser.add_argument("--memory", required=True, metavar="SIZE")
    parser.add_argument("-p", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("-n", type=int, default=16, help="tokens after it")
    parser.add_argument("-r", type=int, default=2, help="repetitions of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="ROW", help="repeatable")
    args = parser.parse_args()
    stores = {"plain": args.plain, "calibrated": args.calibrated}
    counts = ["-p", str(args.p), "-n", str(args.n), "-r", str(args.r)]
    wanted = [row for row in ROWS if not args.only or row[0] in args.only]
    busy, found = busy_cores(), {name: [] for name, _, _ in wanted}
    for turn in range(args.rounds):
        for name, which, options in wanted:
            result = measured(stores[which], args.memory, options, counts)
            found[name].append(result)
            seconds = 1000 / result["decode"]["tokens_per_second"]["median"]
            print(f"round {turn + 1}: {name}: {seconds:.0f} ms", file=sys.stderr, flush=True)
    print(f"{fingerprint()}; other work kept {busy:.1f} cores busy; --memory {args.memory}\n")
    print(table([row_of(name, results) for name, results in found.items()]))


if __name__ == "__main__":
    main()
