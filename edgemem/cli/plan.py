"""`edgemem plan`: what a store does inside each of some budgets, before it is loaded."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ..errors import BudgetError
from . import options

_HELP = """Say what a store does inside one or several memory budgets, before it is loaded.

For each budget: what stays in memory, what streams into how many slots, or the sum that does not
fit; and with the figures of 'edgemem doctor', what a decoded token takes: reading flash, managing
memory and computing, in ms, and all of it, in which some of that is done together.

What is expected is of the default policy. How often experts and neurons hit depends on the model
and the text: it is what models like it showed. It is of the middle of -n tokens, after -p;
'edgemem bench' measures the same, and says beside it what was expected.

--json prints one object. A budget below the floor is a row that says so, and ends in exit code 1.
"""


@click.command(help=_HELP, short_help="Say what memory budgets would do.")
@options.STORE
@options.token_counts
@options.engine_options(
    "Most tokens of a session.  [default: prompt and new tokens]", several_budgets=True
)
@options.PREDICT
@options.SPARSE
@options.CACHE_DIR
@options.JSON
def plan(store, memory, cache_dir, as_json, **more):
    from .. import doctor
    from ..store import Store
    from .cache import default_folder

    folder = default_folder() if cache_dir is None else cache_dir
    device = doctor.known(store, folder)
    with Store.open(store) as opened:
        facts = {"store": str(store), "model_type": opened.spec.model_type}
        options.fill_token_counts(more, opened.spec.max_positions)
    with options.usage_errors():
        results = [_look(store, size, device, **more) for size in memory]
    if device is None:
        options.note(
            "edgemem: nothing is known of this device's speed: measure it once, "
            f"with 'edgemem doctor {store}'"
        )
    if as_json:
        options.print_json(facts | {"device": _rates(device), "results": results})
    else:
        print(_text(facts, device, results))
    if any("error" in result for result in results):
        sys.exit(1)


def _look(store: Path, memory: str, device, **more) -> dict:
    from .. import plan as planning

    try:
        found = planning.look(store, memory, device=device, **more)
    except BudgetError as error:
        options.note(f"edgemem: {error}")
        return {"memory": memory, "error": "does not fit", "message": str(error)}
    return {"memory": memory} | dataclasses.asdict(found)


def _rates(device) -> dict | None:
    """What expectations are made of, without the single readings."""
    if device is None:
        return None
    return {name: value for name, value in dataclasses.asdict(device).items() if name != "flash"}


def _text(facts: dict, device, results: list[dict]) -> str:
    from .bench_table import aligned

    head = (
        "budget", "resident", "streams", "slots", "read/token", "hits", "flash ms", "manage ms",
        "compute ms", "ms/token", "tok/s",
    )  # fmt: skip
    parts = [f"{facts['store']}: {facts['model_type']}"]
    parts.append(aligned([head, *(_row(result, len(head)) for result in results)]))
    if device is not None:
        knee = device.knee()
        parts.append(
            f"Memory {device.dram_bytes_per_second / 1e9:.1f} GB/s, flash up to "
            f"{knee.bytes_per_second / 1e9:.2f} GB/s ('edgemem doctor')."
        )
    return "\n\n".join(parts)


def _row(result: dict, columns: int) -> tuple[str, ...]:
    from ..budget import show_size
    from .bench_table import share, slots_text

    if "error" in result:
        return (result["memory"], result["error"], *[""] * (columns - 2))
    streams, said = result["streamed_bytes"] > 0, result["expected"]
    cells = [
        result["memory"], show_size(result["resident_bytes"]),
        show_size(result["streamed_bytes"]) if streams else "–",
        slots_text(result) if streams else "all resident",
    ]  # fmt: skip
    if said is None:
        return (*cells, *["–"] * (columns - len(cells)))
    names = ("flash_seconds", "management_seconds", "compute_seconds", "seconds")
    return (
        *cells, show_size(said["read_bytes"]) if streams else "–", share(said["hit_rate"]),
        *(f"{1e3 * said[name]:.1f}" for name in names), f"{said['tokens_per_second']:.1f}",
    )  # fmt: skip
