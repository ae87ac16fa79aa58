"""What `edgemem bench` prints for people: a Markdown table with a row for each budget."""

from __future__ import annotations

from ..budget import show_size

COLUMNS = (
    "budget", "slots", "prefill tok/s", "first token", "decode tok/s", "plan", "read/token",
    "hits", "Belady", "stall", "busy", "η", "peak RSS",
)  # fmt: skip


def heading(facts: dict) -> str:
    """What all rows have in common: the model and the machine."""
    host = facts["host"]
    return (
        f"{facts['store']}: {facts['model_type']}, {facts['parameters'] / 1e6:,.1f} M parameters, "
        f"{show_size(facts['file_bytes'])}\n{host['cpu']}, {host['usable_cores']} cores, "
        f"{show_size(host['memory_bytes'])}, {host['system']}"
    )


def table(results: list[dict]) -> str:
    """A row for each result, padded so that it is a table on a terminal too."""
    return aligned([COLUMNS, *map(_row, results)])


def breakdowns(results: list[dict]) -> str:
    """What the time of a decoded token goes into, in ms and shares: a column for each budget."""
    done = [result for result in results if "error" not in result]
    if not done:
        return ""
    totals = [sum(result["breakdown"].values()) for result in done]
    names = sorted(done[0]["breakdown"], key=lambda name: -done[0]["breakdown"][name])
    rows = [("ms of a decoded token", *(result["memory"] for result in done))]
    for name in names:
        parts = [result["breakdown"][name] for result in done]
        if any(parts):
            rows.append((name, *map(_part, parts, totals)))
    return aligned([*rows, ("all", *map(_part, totals, totals))])


def _part(seconds: float, of: float) -> str:
    return f"{1e3 * seconds:.3f} ({100 * seconds / of:.1f} %)"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, the first row its head; padded, columns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(result: dict) -> tuple[str, ...]:
    if "error" in result:
        return (result["memory"], result["error"], *[""] * (len(COLUMNS) - 2))
    decode, streams = result["decode"], _streams(result)
    expected = result["expected"]
    return (
        result["memory"],
        slots_text(result) if streams else "all resident",
        _rate(result["prefill"]["tokens_per_second"]),
        _seconds(result["first_token_seconds"]["median"]),
        _rate(decode["tokens_per_second"]),
        _number(expected["tokens_per_second"]) if expected else "–",
        show_size(decode["read_bytes_per_token"]) if streams else "–",
        share(decode["hit_rate"]),
        share(result["belady_hit_rate"]),
        share(decode["stall_share"] if streams else None),
        share(min(1, decode["device_share"]) if streams else None),
        f"{result['efficiency']:.2f}",
        show_size(result["peak_rss_bytes"]),
    )


def _streams(result: dict) -> bool:
    return result["streamed_bundles"] > 0 or result["neurons"] > 0


def slots_text(result: dict) -> str:
    """How many slots there are for how many bundles, and neurons."""
    parts = [f"{result['slots']}/{result['streamed_bundles']}"] * (result["streamed_bundles"] > 0)
    if result["neurons"]:
        parts.append(f"{result['neuron_room']}/{result['neurons']} neurons")
    return ", ".join(parts)


def legend(results: list[dict]) -> str:
    """How the rows were measured, and the rates that η is made of."""
    done = [result for result in results if "error" not in result]
    if not done:
        return ""
    one = done[0]
    start = "slots kept between them" if one["warm"] else "each from empty slots"
    parts = [
        f"Prompts of {_count(one['prompt_tokens'], 'token')} and {one['new_tokens']} more, one by "
        f"one; medians of {_count(one['repetitions'], 'repetition')} (least–most), {start}",
        f"{_count(one['threads'], 'thread')}, {one['isa']}, KV cache at {one['kv']}; "
        f"memory {_span(done, 'dram_bytes_per_second')}",
    ]
    streaming = [result for result in done if _streams(result)]
    if streaming:
        one = streaming[0]
        of_bundles = [result for result in streaming if result["record_bytes"]]
        of_neurons = [result for result in streaming if result["neurons"]]
        if of_bundles:
            parts[1] += (
                f", flash {_span(of_bundles, 'flash_bytes_per_second')} at reads of "
                f"{show_size(of_bundles[0]['record_bytes'])}"
            )
        if of_neurons:
            parts[1] += f", {_span(of_neurons, 'neurons_bytes_per_second')} at reads of neurons"
        parts[1] += f"; {one['io_engine']}, policy {one['policy']}"
    hindsight = [result["expected_in_hindsight"] for result in done]
    if all(hindsight):
        rates = ", ".join(_number(plan["tokens_per_second"]) for plan in hindsight)
        parts += [f"With memory and flash as fast as they were, a plan says {rates} tok/s"]
    return ".\n".join(parts) + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _span(results: list[dict], name: str) -> str:
    texts = [f"{f(result[name] for result in results) / 1e9:.2f}" for f in (min, max)]
    return "–".join(dict.fromkeys(texts)) + " GB/s"


def _rate(spread: dict) -> str:
    digits = _digits(spread["median"])
    median, low, high = (f"{spread[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def share(part: float | None) -> str:
    """A share in per cent, or a dash where there is none."""
    return "–" if part is None else f"{100 * part:.0f} %"
