"""edgemem beside llama.cpp, inside the same memory budgets: the same tokens, in one run.

`python -m bench.peers STORE GGUF [--memory SIZE]... [-p N] [-n N] [-r N] [--json FILE]`

STORE and GGUF hold the same model (`bench.synth`, or `edgemem convert`). Fixed random tokens:
prefill of p, then n single steps, no sampling. Every measurement is a process of its own, starts
with the file out of the page cache, and takes turns with all others; a budget is a memory control
group of exactly that size, page cache counted, without swap. Resident runs are warm: they have run
the same tokens once. Runs inside a budget start cold.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.cgroup import MemoryGroup, NoControlGroup, evict
from bench.harness import QUIET_CORES, Spread, busy_cores, fingerprint, spread
from bench.peer_models import peak_rss
from edgemem.budget import auto_bytes, parse_size, show_size, fast_cpus
from edgemem.errors import EdgeMemError
from edgemem.store import Store

MEMORY = ["3GiB", "4GiB", "8GiB"]


@dataclass(frozen=True)
class Case:
    """One thing to measure; `run` is what `bench.peer_models` takes."""

    engine: str
    setting: str
    run: dict
    budget: int | None = None

    @property
    def name(self) -> str:
        """What it is called in notes."""
        return f"{self.engine} {self.setting}" + self.budget_name(" in {}")

    def budget_name(self, text: str = "{}") -> str:
        """The budget for people, or nothing."""
        return text.format(show_size(self.budget)) if self.budget else ""


@dataclass
class Outcome:
    """How far one process came, and in what time. `ended` says why, where it was not at the end."""

    facts: dict = field(default_factory=dict)
    prefill: float | None = None
    steps: list[float] = field(default_factory=list)
    peak_rss: int = 0
    limited: bool = False
    group_peak: int | None = None
    ended: str = ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("store")
    parser.add_argument("gguf")
    parser.add_argument("--memory", action="append", help="a budget; again for more")
    parser.add_argument("-p", "--prompt", type=int, default=64, help="tokens of prefill")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="tokens of decode")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument(
        "--mapped-rounds", type=int, help="rounds of mapped runs inside budgets: they take long"
    )
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=fast_cpus())
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument(
        "--mmap-limit-seconds", type=float, default=170.0,
        help="of each phase (loading, prefill, decode) inside a budget: a mapped model may not end",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write everything measured there")
    args = parser.parse_args()
    if args.prompt + args.tokens > args.context or min(args.prompt, args.tokens, args.rounds) < 1:
        parser.error("prompt, tokens and rounds are at least 1, and the context holds both")
    try:
        args.memory = [parse_size(size) for size in args.memory or MEMORY]
    except ValueError as error:
        parser.error(str(error))
    return args


# --- one measurement ------------------------------------------------------------------------------


def measured(case: Case, limit_seconds: float | None) -> Outcome:
    """Run a case, within the limit if it has a budget; where prefill is cut, its decode is measured
    after a prompt of one token."""
    limit_seconds = limit_seconds if case.budget else None
    outcome = run(case, limit_seconds)
    if outcome.prefill is None and outcome.ended == "cut":
        short = run(replace(case, run=case.run | {"prompt": 1}), limit_seconds)
        outcome.steps, outcome.ended = short.steps, "cut in prefill"
    return outcome


def run(case: Case, limit_seconds: float | None) -> Outcome:
    """One process, in a control group where the case has a budget."""
    print(f"measuring {case.name} …", file=sys.stderr)
    files = files_of(case.run["path"])
    take_memory(case.budget or sum(map(os.path.getsize, files)))
    for file in files:
        evict(file)
    argv = [sys.executable, "-m", "bench.peer_models", json.dumps(case.run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with group_of(case) as group, tempfile.TemporaryFile("w+") as errors:
        argv = group.command(argv) if group else argv
        outcome = Outcome()
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            try:
                follow(process, outcome, limit_seconds)
            finally:
                process.kill()
        if group:
            outcome.limited, outcome.group_peak = True, group.peak_bytes()
        if group and group.kills():
            outcome.ended = "killed: out of memory"
        elif process.returncode and not outcome.ended:
            errors.seek(0)
            outcome.ended = reason(errors.read().strip().splitlines(), process.returncode)
    return outcome


def files_of(path: str) -> list[Path]:
    """A model is one file, or all files of a folder."""
    return [p for p in Path(path).iterdir() if p.is_file()] if os.path.isdir(path) else [Path(path)]


def take_memory(size: int) -> None:
    """Use so much memory, and let go of it: a virtual machine that has given memory back to its
    host waits for the host when it uses it again, and no engine is to be measured waiting."""
    code = f"import numpy; numpy.ones({min(size, auto_bytes())}, numpy.uint8)"
    subprocess.run([sys.executable, "-c", code], check=True)


def reason(lines: list[str], status: int) -> str:
    """Why a process failed: of all that it wrote, the exception's own line."""
    own = [line for line in lines if line[:1].isalpha() and "Error" in line.split(":")[0]]
    if status < 0:  # nothing that it wrote tells
        return f"ended by signal {-status}" + (": out of memory?" if status == -9 else "")
    return (own or lines or [f"exit status {status}"])[-1]


def group_of(case: Case):
    """A control group for a case with a budget; nothing for others, or where none can be made."""
    if case.budget is None:
        return nullcontext()
    try:
        return MemoryGroup(case.budget)
    except NoControlGroup:
        return nullcontext()


def follow(process: subprocess.Popen, outcome: Outcome, limit_seconds: float | None) -> None:
    """Read what the process tells until it ends; end it where a phase takes too long."""

    def cut() -> None:
        outcome.peak_rss, outcome.ended = peak_rss(process.pid), "cut"
        process.kill()

    def new_timer() -> threading.Timer:
        timer = threading.Timer(limit_seconds or threading.TIMEOUT_MAX, cut)
        timer.daemon = True
        timer.start()
        return timer

    timer = new_timer()
    try:
        for line in process.stdout:
            told = json.loads(line)
            if "step" in told:
                outcome.steps.append(told["step"])
                continue
            timer.cancel()
            timer = new_timer()
            outcome.facts |= told.pop("facts", {})
            outcome.prefill = told.get("prefill", outcome.prefill)
            outcome.peak_rss = told.get("peak_rss", outcome.peak_rss)
            outcome.facts |= {k: told[k] for k in ("device", "memory") if k in told}
    finally:
        timer.cancel()


# --- what is measured -----------------------------------------------------------------------------


def best_of_llama_cpp(args: argparse.Namespace, base: dict) -> tuple[dict, list[str]]:
    """The resident setting that decodes fastest, tried once each, and what the others gave."""
    found = {}
    for mapped in (False, True):
        for flash in (False, True):
            setting = {"mmap": mapped, "repack": not mapped, "flash": flash}
            case = Case("llama.cpp", describe(setting), base | setting | {"warm": True})
            outcome = measured(case, None)
            if outcome.ended:
                sys.exit(f"error: {case.name}: {outcome.ended}")
            # The median step: one that the system interrupted must not decide.
            found[case.setting] = setting, rate(1, statistics.median(outcome.steps)), outcome
    best = max(found.values(), key=lambda entry: entry[1])
    notes = [
        f"llama.cpp resident, {name}: {rate(args.prompt, outcome.prefill):.2f} prefill, "
        f"{decode:.2f} decode tok/s (one run, to choose)"
        for name, (_, decode, outcome) in found.items()
    ]
    return best[0], notes


def describe(setting: dict) -> str:
    weights = "mapped" if setting["mmap"] else "repacked" if setting["repack"] else "read"
    return f"{weights}, flash attention {'on' if setting['flash'] else 'off'}"


def cases(args: argparse.Namespace, ours: dict, theirs: dict, best: dict) -> list[Case]:
    """Both engines, resident and inside each budget."""
    mapped = best | {"mmap": True, "repack": False}
    found = [
        Case("llama.cpp", "resident, " + describe(best), theirs | best | {"warm": True}),
        Case("edgemem", "resident", ours | {"memory": None, "warm": True}),
    ]
    for size in args.memory:
        found.append(Case("llama.cpp", describe(mapped), theirs | mapped | {"warm": False}, size))
        found.append(Case("edgemem", "streaming", ours | {"memory": size, "warm": False}, size))
    return found


def rate(amount: float, seconds: float | None) -> float:
    return amount / seconds if seconds else 0.0


# --- the report -----------------------------------------------------------------------------------


def prefill_rates(case: Case, outcomes: list[Outcome], limit: float) -> tuple[list[float], bool]:
    """Tokens per second of each round, and whether they are upper bounds: a round was cut."""
    count = case.run["prompt"]
    started = [o for o in outcomes if o.prefill or o.ended.startswith("cut")]
    return [rate(count, o.prefill or limit) for o in started], any(not o.prefill for o in started)


def decode_rates(outcomes: list[Outcome], limit: float) -> tuple[list[float], bool]:
    """Likewise; of a round that was cut, the tokens that it reached count, or fewer than one."""
    ran = [o for o in outcomes if o.steps or o.ended.startswith("cut")]
    rates = [rate(len(o.steps), sum(o.steps)) if o.steps else rate(1, limit) for o in ran]
    return rates, any(o.ended for o in ran)


def show(rates: list[float], bound: bool) -> str:
    if not rates:
        return "—"
    return ("≤ " if bound else "") + f"{spread(rates):.2f}"


def row(case: Case, outcomes: list[Outcome], resident: Spread | None, limit: float) -> str:
    prefill, decode = prefill_rates(case, outcomes, limit), decode_rates(outcomes, limit)
    ratio = "—"
    if decode[0] and resident:
        ratio = f"{'≤ ' if decode[1] else ''}{spread(decode[0]).median / resident.median:.3f}"
    groups = [o.group_peak for o in outcomes if o.group_peak]
    peaks = show_size(max(o.peak_rss for o in outcomes)), show_size(max(groups)) if groups else "—"
    budget = case.budget_name() or "none"
    if case.budget and not any(o.limited for o in outcomes):
        budget += " (not enforced)"
    cells = [case.engine, case.setting, budget]
    return "| " + " | ".join([*cells, show(*prefill), show(*decode), ratio, *peaks]) + " |"


def notes_of(case: Case, outcomes: list[Outcome], limit: float) -> list[str]:
    """What a reader must know of a row: rounds that were cut, killed or refused, or that stream."""
    found = []
    for number, outcome in enumerate(outcomes, 1):
        text = outcome.ended
        if text.startswith("cut"):
            reached = f"{len(outcome.steps)} of {case.run['tokens']} tokens of decode"
            where = "prefill did not end" if outcome.prefill is None else "decode did not end"
            after = ", these after a prompt of 1" if outcome.prefill is None else ""
            text = f"{where} within {limit:g} s; reached {reached}{after}"
        if text:
            found.append(f"{case.name}, round {number}: {text}")
        elif case.setting == "resident" and outcome.facts.get("read_bytes"):
            found.append(f"{case.name}, round {number}: it does not fit this machine and streams")
    return found


def report(args, measured: list[tuple[Case, list[Outcome]]], ceilings, notes: list[str]) -> None:
    limit = args.mmap_limit_seconds
    reference = decode_rates(measured[0][1], limit)[0]
    resident = spread(reference) if reference else None
    facts = {k: v for _, outcomes in measured for o in outcomes for k, v in o.facts.items()}
    print(f"# {fingerprint()} {platform.release()}, {args.threads} threads")
    print(f"edgemem: {facts.get('isa')}; llama-cpp-python {facts.get('version')}: ", end="")
    print(facts.get("system_info"))
    print(
        f"{args.prompt} tokens of prefill, {args.tokens} of decode, context {args.context}, "
        f"medians of {args.rounds} (least–most), in turn\n"
    )
    print("| engine | setting | budget | prefill tok/s | decode tok/s | ratio to llama.cpp resident"
          " | peak RSS | group's peak |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for case, outcomes in measured:
        print(row(case, outcomes, resident, limit))
    print("\n* ceilings: ", end="")
    for name, text in (("device", "store read with O_DIRECT"), ("memory", "plain read of memory")):
        rates = [o.facts[name] / 1e9 for o in ceilings if name in o.facts]
        print(f"{text} {show(rates, False)} GB/s", end="; " if name == "device" else "\n")
    for note in notes + [n for case, outs in measured for n in notes_of(case, outs, limit)]:
        print(f"* {note}")


def check_room(args: argparse.Namespace) -> None:
    """Resident runs hold a whole model: end here rather than have the system end something else."""
    size, room = max(map(os.path.getsize, (args.store, args.gguf))), auto_bytes()
    if size > room:
        sys.exit(
            f"error: resident runs take {show_size(size)}, and {show_size(room)} are free here: "
            "end what else runs, or take a smaller model"
        )


def warnings(budget: int, others: list[float]) -> list[str]:
    """What makes figures doubtful: budgets that nothing enforces, a machine that was not quiet."""
    found = []
    try:
        with MemoryGroup(budget):
            pass
    except NoControlGroup as error:
        found.append(
            f"NO BUDGET WAS ENFORCED on any engine, and the page cache holds what one maps: {error}"
        )
    if max(others) > QUIET_CORES:
        found.append(
            f"NOT QUIET: up to {max(others):.1f} cores were busy with other work between rounds; "
            "threads that wait for each other, other engines' above all, suffer most"
        )
    return found


def compare(args: argparse.Namespace) -> None:
    """Choose llama.cpp's setting, then measure everything in turn, and report."""
    with Store.open(args.store) as store:
        vocab = store.spec.vocab_size
    check_room(args)
    names = ("context", "threads", "seed", "prompt", "tokens")
    base = {name: getattr(args, name) for name in names} | {"vocab": vocab}
    ours = base | {"engine": "edgemem", "path": os.path.abspath(args.store)}
    theirs = base | {"engine": "llama.cpp", "path": os.path.abspath(args.gguf)}
    others = [busy_cores()]
    best, tried = best_of_llama_cpp(args, theirs)
    todo = [(case, []) for case in cases(args, ours, theirs, best)]
    plain = Case("ceilings", "of this machine", ours | {"engine": "ceilings"}), []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        others.append(busy_cores())
        turn = [plain, *todo]
        for case, outcomes in turn if number % 2 == 0 else reversed(turn):
            slow = case.engine == "llama.cpp" and case.budget is not None
            if slow and args.mapped_rounds is not None and number >= args.mapped_rounds:
                continue
            case = replace(case, run=case.run | {"round": number})
            outcomes.append(measured(case, args.mmap_limit_seconds))
    notes = warnings(args.memory[0], others) + tried
    report(args, todo, plain[1], notes)
    if args.json:
        rows = [asdict(case) | {"rounds": list(map(asdict, outs))} for case, outs in [*todo, plain]]
        host = {"host": fingerprint(), "kernel": platform.release(), "notes": notes}
        args.json.write_text(json.dumps(host | {"cases": rows}, indent=1))


def main() -> None:
    args = parse()
    try:
        compare(args)
    except (OSError, EdgeMemError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
