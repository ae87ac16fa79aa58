"""edgemem beside transformers with accelerate's disk offload: the same checkpoint, tokens, budgets.

`python -m bench.offload SHAPE_OR_FOLDER [--memory SIZE]... [-p N] [-n N] [--json FILE]`

A folder is a Hugging Face checkpoint; a shape (`bench.shapes`) is drawn in bf16. Both are converted
as they are, whole and, where that is possible, with their FFNs taken apart (`--neurons`). Every
measurement is a process of its own that starts with its files out of the page cache. Resident runs
are warm, runs inside a budget are cold: a memory control group of exactly that size, page cache
counted, without swap. The tokens are fixed and random, since greedy text of random weights repeats
one token; what each engine would choose after each of them, and its logits, are compared.
Wants torch, transformers and accelerate.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.harness import busy_cores, fingerprint, spread
from bench.peers import Case, Outcome, files_of, measured, notes_of, rate, warnings
from bench.shapes import config_of
from bench.synth import write
from edgemem.budget import MIB, fast_cpus, parse_size, show_size
from edgemem.converters import convert
from edgemem.errors import EdgeMemError, UnsupportedError
from edgemem.store import Store

WANTED = ("torch", "transformers", "accelerate")
FIRST_STEPS = 2
"""Steps after the prompt that are not counted."""
PROCESS_BYTES = 512 * MIB
"""What a process with torch takes beside weights, rounded up: in one of two runs of accelerate the
budget is what its user promises it for weights, in the other there is room for these as well."""
APART = 0.05
"""Logits further apart than so much of the largest are another model's. bf16 takes 1 or 2 %."""


@dataclass(frozen=True)
class Models:
    """One checkpoint in its forms; without `neurons` where it cannot be taken apart."""

    folder: Path
    store: Path
    neurons: Path | None

    @property
    def weight_bytes(self) -> int:
        """Of all tensors, and the little that is around them."""
        return sum(p.stat().st_size for p in files_of(self.folder) if p.suffix == ".safetensors")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", metavar="SHAPE_OR_FOLDER")
    parser.add_argument(
        "--memory", action="append", help="a budget; again for more; default: half the weights"
    )
    parser.add_argument("-p", "--prompt", type=int, default=16, help="tokens of prefill")
    parser.add_argument("-n", "--tokens", type=int, default=8, help="tokens of decode, counted")
    parser.add_argument("--threads", type=int, default=fast_cpus())
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="of each phase")
    parser.add_argument("--work", type=Path, help="for three copies of the model, while it runs")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    args = parser.parse_args()
    if args.prompt < 1 or args.tokens < 3:
        parser.error("at least 1 token of prompt, and 3 of decode")
    try:
        args.memory = [parse_size(size) for size in args.memory or ()]
    except ValueError as error:
        parser.error(str(error))
    return args


def prepare(model: str, work: Path) -> tuple[Models, list[str]]:
    """The checkpoint, drawn if a shape is named, and its stores; notes of what could not be made.

    Raises what `config_of` and `convert` raise.
    """
    folder, notes = Path(model), []
    if not folder.is_dir():
        folder = work / "checkpoint"
        print(f"drawing {model} …", file=sys.stderr)
        write(config_of(model), folder, "bf16")
    store, neurons = work / "whole.edgemem", work / "neurons.edgemem"
    print("converting …", file=sys.stderr)
    convert(folder, store)
    try:
        convert(folder, neurons, neurons=True)
    except UnsupportedError as error:
        notes.append(f"edgemem with neurons: {error}")
        neurons = None
    return Models(folder.resolve(), store, neurons), notes


def cases(models: Models, budgets: list[int], base: dict, work: Path) -> list[Case]:
    """Resident runs, the ceiling first; then in each budget transformers, which maps its weights,
    accelerate, and edgemem."""
    folder = {"engine": "transformers", "path": str(models.folder), "keep": None}
    folder |= {"offload": str(work / "offload")}
    ours = {"engine": "edgemem", "path": str(models.store), "memory": None}
    found = [Case("transformers", "resident", base | folder | {"warm": True})]
    found.append(Case("edgemem", "resident", base | ours | {"warm": True}))
    for budget in budgets:
        inside = {"warm": False}
        found.append(Case("transformers", "mapped", base | folder | inside, budget))
        for keep in (budget, budget - PROCESS_BYTES):
            if keep > 0:
                setting = f"disk offload, {show_size(keep)} in memory"
                run = base | folder | inside | {"keep": keep}
                found.append(Case("accelerate", setting, run, budget))
        inside |= {"memory": budget}
        found.append(Case("edgemem", "whole FFNs", base | ours | inside, budget))
        if models.neurons:
            run = base | ours | inside | {"path": str(models.neurons)}
            found.append(Case("edgemem", "neurons", run, budget))
    return [Case(c.engine, c.setting, c.run | logits_of(work, i), c.budget)
            for i, c in enumerate(found)]  # fmt: skip


def logits_of(work: Path, number: int) -> dict:
    return {"logits": str(work / f"logits-{number}.npy")}


# --- the report -----------------------------------------------------------------------------------


def counted(outcome: Outcome) -> list[float]:
    """Seconds of the steps that count."""
    return outcome.steps[FIRST_STEPS:]


def read_per_token(outcome: Outcome) -> float | None:
    """Bytes from the device, the median step; None where it is not known."""
    reads = outcome.facts.get("step_reads", [])[FIRST_STEPS:]
    return statistics.median(reads) if reads else None


def row(case: Case, outcome: Outcome, resident: float | None) -> str:
    """`resident` are the seconds that a step takes where the ratio is 1."""
    steps, read = counted(outcome), read_per_token(outcome)
    budget = case.budget_name() or "none"
    if case.budget and not outcome.limited:
        budget += " (not enforced)"
    took = spread([1000 * step for step in steps]) if steps else None
    cells = [
        case.engine, case.setting, budget,
        f"{rate(case.run['prompt'], outcome.prefill):.2f}" if outcome.prefill else "—",
        f"{1000 / took.median:.2f}" if took else "—",
        f"{took:.0f}" if took else "—",
        f"{1000 * resident / took.median:.3f}" if took and resident else "—",
        show_size(round(read)) if read is not None else "—",
        show_size(outcome.peak_rss),
        show_size(outcome.group_peak) if outcome.group_peak else "—",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def gains(measured: list[tuple[Case, Outcome]]) -> list[str]:
    """In each budget: how much faster edgemem decodes than whatever of the others is fastest."""
    found, paces = [], {}
    for case, outcome in measured:
        if case.budget and counted(outcome):
            entry = statistics.median(counted(outcome)), case
            paces.setdefault(case.budget, []).append(entry)
    for entries in paces.values():
        others = [entry for entry in entries if entry[1].engine != "edgemem"]
        if not others:
            continue
        pace, best = min(others, key=lambda entry: entry[0])
        found += [
            f"{case.name}: {pace / own:.2f} times as fast as {best.name}"
            for own, case in entries
            if case.engine == "edgemem"
        ]
    return found


def answers(case: Case, reference: np.ndarray, logits: np.ndarray) -> str:
    """How near an answer is to the reference's, both float32 [tokens, vocab]."""
    same = int((reference.argmax(-1) == logits.argmax(-1)).sum())
    apart = float(np.abs(reference - logits).max() / np.abs(reference).max())
    text = f"{case.name}: {same} of {len(logits)} choices are those of transformers resident, "
    text += f"logits within {100 * apart:.1f} % of the largest"
    return f"ANOTHER ANSWER: {text}" if not apart < APART else text


def compared(measured: list[tuple[Case, Outcome]]) -> list[str]:
    """`answers` of all that came to their end, beside the first."""
    ended = [case for case, outcome in measured if not outcome.ended]
    if not ended or ended[0] is not measured[0][0]:
        return ["NOTHING IS COMPARED: transformers with resident weights did not end"]
    reference = np.load(ended[0].run["logits"])
    return [answers(case, reference, np.load(case.run["logits"])) for case in ended[1:]]


def report(args, models: Models, measured: list[tuple[Case, Outcome]], notes: list[str]) -> None:
    facts = {k: v for _, outcome in measured for k, v in outcome.facts.items()}
    print(f"# {fingerprint()} {platform.release()}, {args.threads} threads")
    print(
        f"{args.model}, {show_size(models.weight_bytes)} of weights; edgemem: {facts.get('isa')}; "
        f"transformers {facts.get('version')}, accelerate {facts.get('accelerate')}, "
        f"torch {facts.get('torch')}\n{args.prompt} tokens of prefill, {args.tokens} of decode "
        f"after the first {FIRST_STEPS}: medians (least–most)\n"
    )
    print("| engine | setting | budget | prefill tok/s | decode tok/s | ms/token | ratio to "
          "transformers resident | read/token | peak RSS | group's peak |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    first = counted(measured[0][1])
    resident = statistics.median(first) if first else None
    for case, outcome in measured:
        print(row(case, outcome, resident))
    print()
    for note in notes:
        print(f"* {note}")


def compare(args: argparse.Namespace, work: Path) -> None:
    """Make all forms of the model, measure one after the other, and report."""
    models, notes = prepare(args.model, work)
    with Store.open(models.store) as store:
        spec = store.spec
    tokens = FIRST_STEPS + args.tokens
    base = {"context": args.prompt + tokens, "tokens": tokens, "vocab": spec.vocab_size}
    base |= {name: getattr(args, name) for name in ("threads", "seed", "prompt")}
    budgets = args.memory or [models.weight_bytes // 2]
    found, others = [], []
    for case in cases(models, budgets, base, work):
        others.append(busy_cores())
        found.append((case, measured(case, args.limit_seconds)))
    notes += warnings(budgets[0], others) + gains(found) + compared(found)
    notes += [note for case, o in found for note in notes_of(case, [o], args.limit_seconds)]
    report(args, models, found, notes)
    if args.json:
        rows = [asdict(case) | asdict(outcome) for case, outcome in found]
        host = {"host": fingerprint(), "kernel": platform.release(), "notes": notes}
        args.json.write_text(json.dumps(host | {"cases": rows}, indent=1))


def main() -> None:
    args = parse()
    absent = [name for name in WANTED if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(f"error: to compare with, this needs: pip install {' '.join(absent)}")
    try:
        with tempfile.TemporaryDirectory(prefix="offload-", dir=args.work) as work:
            compare(args, Path(work))
    except (OSError, ValueError, EdgeMemError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
