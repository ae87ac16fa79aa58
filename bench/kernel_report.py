"""The table of `bench.kernels`, and how two of its runs differ."""

from bench.harness import Spread, spread

NAME = ("op", "type", "shape", "tokens", "threads", "isa")
"""The fields of a record that say what was measured."""

COLUMNS = (
    *NAME, "µs a call", "rate", "bound", "share", "llama.cpp", "ratio to it",
)  # fmt: skip


def name_of(record: dict) -> str:
    """What a record, or a part of one, is of."""
    return " ".join(str(record[field]) for field in NAME if field in record)


def scaled(values: list[float], by: float) -> Spread:
    return spread([value * by for value in values])


def over(values: list[float], others: list[float]) -> Spread:
    """Ratios within each round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def show(value: float | Spread) -> str:
    """With about three digits."""
    size = value.median if isinstance(value, Spread) else value
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def heading(facts: dict) -> str:
    """The host, how it was measured, and the table's head."""
    llama = facts.get("llama_cpp")
    beside = f", beside llama-cpp-python {llama}" if llama else ""
    return (
        f"# {facts['host']}\n"
        f"medians of {facts['rounds']} (least–most), in turn{beside}; GB = 10⁹ bytes read, "
        "2 operations for a multiply-add\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    )


def row(record: dict) -> str:
    """One line of the table. Rates are in the unit of the bound: bytes or operations."""
    amount, unit = {
        "peak": (record["operations"] / 1e9, "GOP/s"),
        None: (1e-3, "k calls/s"),
    }.get(record["bound"], (record["bytes"] / 1e9, "GB/s"))
    calls, bounds, theirs = record["calls_per_s"], record["bound_calls_per_s"], record["llama_cpp"]
    cells = [str(record[field]) for field in NAME]
    cells += [show(spread([1e6 / rate for rate in calls]).median)]
    cells += [f"{show(scaled(calls, amount))} {unit}", "–", "–", "–", "–"]
    if bounds:
        cells[-4] = f"{record['bound']} {show(scaled(bounds, amount).median)}"
        cells[-3] = f"{over(calls, bounds).median:.0%}"
    if theirs:
        cells[-2] = f"{show(scaled(theirs['calls_per_s'], amount))} {theirs['layout']}"
        cells[-1] = f"{over(calls, theirs['calls_per_s']).median:.2f}"
    return f"| {' | '.join(cells)} |"


def ratio(new: Spread, old: Spread) -> Spread:
    """new / old, with the least and the most that both spreads allow."""
    return Spread(new.median / old.median, new.low / old.high, new.high / old.low)


def verdict(*ratios: Spread) -> str:
    """What all of these agree on: a spread that 1 lies in says nothing."""
    if all(r.low > 1 for r in ratios):
        return "FASTER"
    return "SLOWER" if all(r.high < 1 for r in ratios) else ""


def compare(old: dict, new: dict) -> tuple[list[str], int]:
    """Lines of a table of what two runs have in common, and how much of it is slower now.

    A case is faster or slower where neither its rates nor its shares of the bound overlap: rates
    alone would blame a kernel for what the machine had to do beside it.
    """
    before = {name_of(record): record for record in old["records"]}
    lines, marks = [], []
    if old["host"] != new["host"]:
        lines.append(f"ANOTHER HOST: before, {old['host']}; now, {new['host']}\n")
    head = (*NAME, "rate, new/old", "share of the bound, new/old", "")
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for record in new["records"]:
        then = before.pop(name_of(record), None)
        if then is None:
            continue
        ratios = [ratio(spread(record["calls_per_s"]), spread(then["calls_per_s"]))]
        if record["bound"] and record["bound"] == then["bound"]:
            shares = [over(r["calls_per_s"], r["bound_calls_per_s"]) for r in (record, then)]
            ratios.append(ratio(*shares))
        marks.append(verdict(*ratios))
        cells = [str(record[field]) for field in NAME] + [f"{r:.2f}" for r in ratios]
        cells += ["–"] * (2 - len(ratios)) + [marks[-1]]
        lines.append(f"| {' | '.join(cells)} |")
    slower, faster = marks.count("SLOWER"), marks.count("FASTER")
    lines.append(
        f"\n{len(marks)} compared: {slower} slower, {faster} faster, the others within the noise; "
        f"{len(new['records']) - len(marks)} are new, {len(before)} were not measured now"
    )
    return lines, slower
