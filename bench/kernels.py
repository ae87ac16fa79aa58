"""How fast each kernel is, beside what bounds it, and beside llama.cpp's own product.

`python -m bench.kernels [--op OP...] [--type TYPE...] [--shape SHAPE...] [--isa ISA...]
[--tokens N...] [--threads N...] [--rounds N] [--quick] [--json FILE] [--compare OLD.json]`

A call must read its weights, or its keys and values, from memory, and do its multiply-adds: what
would take longer at the pace of a plain read of memory, or of multiply-adds without it, is its
bound, and its share is how near it comes. Operations on a few rows are held to a plain read of the
caches. A case's instruction sets, bounds and llama.cpp take turns in every round, so that drift of
the machine falls on all alike. All there is takes about an hour: name what matters, or `--quick`.
llama.cpp takes as much memory as `--memory` again. `--compare` ends with status 1 if something is
slower than it was.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from bench.ggml import Ggml, GgmlProduct, NoGgml
from bench.harness import QUIET_CORES, busy_cores, fingerprint, rounds
from bench.kernel_cases import (
    PRODUCTS,
    SCRATCH_BYTES,
    Case,
    ColdMemory,
    Work,
    cases,
    prepare,
    weight_bytes,
)
from bench.kernel_report import compare, heading, name_of, row
from edgemem.arguments import MAX_THREADS
from edgemem._native import isa_names, lib
from edgemem.budget import parse_size, show_size, fast_cpus
from edgemem.errors import EdgeMemError
from edgemem.kernels import Core

ROUND_SECONDS = 0.02
"""What one measurement takes at the least: of the shortest calls as many as it needs."""
LONGEST_SECONDS = 5.0
"""Cases of which one call takes longer are left out: portable code with many tokens."""
CACHED_BYTES, COLD_BYTES = 1 << 20, 64 << 20
"""Of each thread in one piece of a plain read: what a core's own caches hold, and far more."""
MEMORY = "1GiB"
ROUNDS = 7
QUICK_TYPES = ("q8_0", "q4_0")
QUICK_SHAPES = ("qwen3-30b-a3b/expert-up", "qwen3-30b-a3b/8-experts", "llama-3.1-8b/ffn-up")
QUICK_TOKENS = (1, 512)


class Bench:
    """One core for each instruction set and number of threads, and the memory that all read."""

    def __init__(self, memory: int, runs: int, beside_llama: bool):
        self.memory, self._runs = ColdMemory(memory), runs
        self._cores, self.notes = {}, []
        self._beside_llama = beside_llama

    @cached_property
    def ggml(self) -> Ggml | None:
        """llama.cpp's functions, or a note why there are none."""
        if not self._beside_llama:
            return None
        try:
            return Ggml()
        except NoGgml as error:
            self.notes.append(f"no llama.cpp: {error}")
            return None

    def core(self, threads: int, isa: str | None = None) -> Core:
        """A core whose scratch is reserved; made once. Without a name the best."""
        if (threads, isa) not in self._cores:
            self._cores[threads, isa] = Core(threads, isa)
            self._cores[threads, isa].reserve(SCRATCH_BYTES)
        return self._cores[threads, isa]

    def measure(self, case: Case, threads: list[int], isas: list[str]) -> list[dict]:
        """A record for each number of threads and instruction set, all sets measured in turn; none
        for those left out, of which a note tells."""
        if weight_bytes(case) > len(self.memory.bytes):
            self.notes.append(
                f"left out: {name_of(asdict(case))}: its {show_size(weight_bytes(case))} are more "
                "than --memory"
            )
            return []
        theirs = self._llama_cpp(case) if case.op == "product" else None
        try:
            return [found for n in threads for found in self._in_turn(case, n, isas, theirs)]
        finally:
            if theirs:
                theirs.close()

    def _in_turn(
        self, case: Case, threads: int, isas: list[str], theirs: GgmlProduct | None
    ) -> list[dict]:
        ours = {isa: self._prepare(case, threads, isa) for isa in isas}
        ours = {isa: work for isa, work in ours.items() if work}
        if not ours:
            return []
        works = {isa: work.run for isa, work in ours.items()} | self._bounds(ours, threads)
        if theirs:
            works["llama.cpp"] = partial(theirs.run, threads=threads)
        found = rounds({name: counted(run) for name, run in works.items()}, self._runs)
        layout = theirs.layout if theirs else None
        return [self._record(case, isa, threads, w, found, layout) for isa, w in ours.items()]

    def _record(self, case, isa: str, threads: int, work: Work, found: dict, layout) -> dict:
        """What was measured, as it is written: calls per second in each round, and those of what
        bounds them."""
        limits = {}
        if work.bytes:
            factor = self._read_bytes(work, threads) / work.bytes
            limits["cached read" if work.cached else "read"] = [r * factor for r in found["read"]]
        if work.operations:
            factor = peak_operations(self.core(threads, isa), work) / work.operations
            limits["peak"] = [r * factor for r in found["peak " + isa]]
        bound = min(limits, key=lambda name: statistics.median(limits[name]), default=None)
        return asdict(case) | {
            "isa": isa,
            "threads": threads,
            "bytes": work.bytes,
            "operations": work.operations,
            "calls_per_s": found[isa],
            "bound": bound,
            "bound_calls_per_s": limits.get(bound, []),
            "llama_cpp": layout and {"layout": layout, "calls_per_s": found["llama.cpp"]},
        }

    def _prepare(self, case: Case, threads: int, isa: str) -> Work | None:
        """The work of an instruction set, unless one call of it would take too long."""
        core = self.core(threads, isa)
        work = prepare(case, core, self.memory)
        items = counted(partial(lib.em_peak, core.handle, work.dtype))
        pace = next(iter(rounds({"peak": items}, 1)["peak"])) * peak_operations(core, work)
        seconds = work.operations / pace
        if seconds <= LONGEST_SECONDS:
            return work
        name = name_of(asdict(case) | {"threads": threads, "isa": isa})
        self.notes.append(f"left out: {name}: one call would take {seconds:.0f} s")
        return None

    def _bounds(self, ours: dict[str, Work], threads: int) -> dict[str, Callable[[int], None]]:
        """Pieces of a plain read by the best instruction set, and of each one's multiply-adds."""
        some, core = next(iter(ours.values())), self.core(threads)
        read = self.memory.read_again if some.cached else self.memory.read
        size = self._read_bytes(some, threads)
        found = {"read": lambda calls: [read(core, size) for _ in range(calls)]}
        for isa, work in ours.items() if some.operations else ():
            found["peak " + isa] = partial(lib.em_peak, self.core(threads, isa).handle, work.dtype)
        return found

    def _read_bytes(self, work: Work, threads: int) -> int:
        """Of one piece of a plain read."""
        piece = CACHED_BYTES if work.cached else COLD_BYTES
        return min(threads * piece, len(self.memory.bytes))

    def _llama_cpp(self, case: Case) -> GgmlProduct | None:
        """llama.cpp's product of the same form, on as much memory of its own."""
        if not self.ggml:
            return None
        rows, cols = PRODUCTS[case.shape]
        places = len(self.memory.bytes) // weight_bytes(case)
        try:
            theirs = GgmlProduct(self.ggml, case.type, rows, cols, case.tokens, places)
        except NoGgml as error:
            self.notes.append(f"no llama.cpp for {name_of(asdict(case))}: {error}")
            return None
        x = np.random.default_rng(1).standard_normal((case.tokens, cols), np.float32)
        theirs.fill(self.memory.bytes, x)
        return theirs


def peak_operations(core: Core, work: Work) -> int:
    """Operations of one item of em_peak: two for a multiply-add."""
    return 2 * lib.em_peak(core.handle, work.dtype, 1)


def counted(run: Callable[[int], None]) -> Callable[[], int]:
    """Runs as many calls as take ROUND_SECONDS, which it finds out when it is run first."""
    calls = 0

    def work() -> int:
        nonlocal calls
        if not calls:
            calls = 1
            run(1)  # memory may be touched, graphs built: not what a call takes
            while True:
                started = time.perf_counter()
                run(calls)
                seconds = time.perf_counter() - started
                if seconds >= ROUND_SECONDS / 2:
                    break
                calls *= 2
            calls = max(1, round(calls * ROUND_SECONDS / seconds))
        run(calls)
        return calls

    return work


# ---- the command ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__.split("\n\n")[0]
    )
    every = list(cases())
    for name in ("op", "type", "shape"):
        choices = list(dict.fromkeys(getattr(case, name) for case in every))
        parser.add_argument(f"--{name}", nargs="+", choices=choices, metavar=name.upper(),
                            help=f"of {', '.join(choices)}")  # fmt: skip
    isas = isa_names()
    parser.add_argument("--isa", nargs="+", choices=isas, help="by default all that run here")
    parser.add_argument("--tokens", nargs="+", type=int, help="1 is decode, the others prefill")
    parser.add_argument("--threads", nargs="+", type=int, help="by default 1 and all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--memory", default=MEMORY, help="larger than the caches (default: 1GiB)")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--quick", action="store_true", help="fewer of all that is not named")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    parser.add_argument("--compare", type=Path, help="such a file of an earlier run")
    args = parser.parse_args(argv)
    try:
        args.memory = parse_size(args.memory)
    except ValueError as error:
        parser.error(str(error))
    if args.rounds is None:
        args.rounds = 3 if args.quick else ROUNDS
    if args.rounds < 1 or min(args.threads or [1]) < 1:
        parser.error("rounds and threads are at least 1")
    args.threads = args.threads or sorted({fast_cpus()} if args.quick else {1, fast_cpus()})
    args.isa = args.isa or (isas[:1] if args.quick else isas)
    args.cases = [case for case in every if wanted(case, args)]
    if not args.cases:
        parser.error("no case is all of that; see --help")
    return args


def wanted(case: Case, args: argparse.Namespace) -> bool:
    """Whether the filters let a case through; --quick is a filter of those that are not given."""
    quick = {"type": QUICK_TYPES, "shape": QUICK_SHAPES, "tokens": QUICK_TOKENS}
    for name in ("op", "type", "shape", "tokens"):
        some = getattr(args, name)
        if some is None and args.quick and case.op in ("product", "ffn"):
            some = quick.get(name)
        if some is not None and getattr(case, name) not in some:
            return False
    return True


def run(args: argparse.Namespace) -> dict:
    """Measure all cases and print each as soon as it is known; what `--json` writes."""
    bench = Bench(args.memory, args.rounds, beside_llama=not args.alone)
    facts = {"host": fingerprint(), "memory": args.memory, "rounds": args.rounds}
    if bench.ggml:
        facts["llama_cpp"] = bench.ggml.version
    print(heading(facts), flush=True)
    records, others = [], [busy_cores()]
    for case in args.cases:
        for found in bench.measure(case, args.threads, args.isa):
            print(row(found), flush=True)
            records.append(found)
    others.append(busy_cores())
    if max(others) > QUIET_CORES:
        bench.notes.append(
            f"NOT QUIET: up to {max(others):.1f} cores were busy with other work before or after; "
            "threads that wait for each other, llama.cpp's above all, suffer most"
        )
    for note in bench.notes:
        print(f"* {note}")
    return facts | {"notes": bench.notes, "records": records}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        old = json.loads(args.compare.read_text()) if args.compare else None
        if old is not None and not (isinstance(old, dict) and "records" in old):
            raise ValueError(f"{args.compare} is not what --json writes")
        if args.threads and not all(1 <= n <= MAX_THREADS for n in args.threads):
            raise ValueError(f"--threads are from 1 to {MAX_THREADS}")
        new = run(args)
        if args.json:
            args.json.write_text(json.dumps(new, indent=1) + "\n")
    except (OSError, ValueError, MemoryError, EdgeMemError, NoGgml) as error:
        sys.exit(f"error: {error}")
    if old is None:
        return 0
    lines, slower = compare(old, new)
    print("\n" + "\n".join(lines))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
