"""`edgemem bench`: how fast a model runs inside each of some budgets, and how fast it could."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import click

from ..errors import BudgetError
from . import options
from .signals import handled, main_code, unwind

_HELP = """Measure prefill and decode inside one or several memory budgets.

Each repetition feeds a prompt of random tokens and then more of them one by one, in a session of
its own that starts from empty slots (--warm: with those of the one before, after one that does not
count). Each budget is measured in a process of its own.

In the table, plan is the tok/s that 'edgemem plan' expects, where 'edgemem doctor' measured this
device before (and below the table, what it says of memory and flash as fast as they were in the
run); hits are of decode (what was read ahead in time is one, so that there may be more than
Belady's), stall is the share of its time in which products waited for bundles, and busy that in
which the device read. η is the share of the pace that is possible: reading each token's weights
once from DRAM, and from flash only what the best of all caches (Belady's, which knows the future)
misses, at the rates that are measured beside it.

--json prints one object with all that was measured. A budget below the floor is a row that says so,
and ends in exit code 1.
"""


@click.command(help=_HELP, short_help="Measure speed inside memory budgets.")
@options.model_options
@options.token_counts
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True,
    metavar="N", help="Sessions that are measured.",
)  # fmt: skip
@click.option("--warm", is_flag=True, help="Keep what is in the slots between repetitions.")
@options.engine_options(
    "Most tokens of a session.  [default: prompt and new tokens]", several_budgets=True
)
@click.option("--breakdown", is_flag=True, help="Show what the time of a decoded token goes into.")
@options.streaming_options
@options.comparing_options
@options.JSON
def bench(model, dtype, neurons, cache_dir, memory, trace, breakdown, as_json, **more):
    from ..store import Store
    from .cache import as_store

    if trace is not None and len(memory) > 1:
        raise click.UsageError("--trace records one budget; give --memory once")
    _check_sizes(memory)
    with options.usage_errors():
        store = as_store(model, cache_dir, dtype, neurons)
    with Store.open(store) as opened:
        facts = _facts(opened)
        options.fill_token_counts(more, opened.spec.max_positions)
    one = measured if len(memory) == 1 else measured_apart
    results = [one(store, size, trace=trace, cache_dir=cache_dir, **more) for size in memory]
    _show(facts, results, breakdown, as_json)
    if any("error" in result for result in results):
        sys.exit(1)


def _check_sizes(memory: list[str]) -> None:
    """A wrong one is told before the others are measured."""
    from ..budget import Budget

    with options.usage_errors():
        for size in memory:
            Budget(size)


def _facts(store) -> dict:
    from .. import benchmark, inventory

    return {
        "store": str(store.path),
        "model_type": store.spec.model_type,
        "parameters": inventory.parameter_count(store),
        "file_bytes": store.file_bytes,
        "host": benchmark.host(),
    }


def measured(
    store: Path, memory: str, prompt_tokens: int, new_tokens: int, repetitions: int, warm: bool,
    context: int | None, threads: int | None, cache_dir: Path | None = None, **streaming,
) -> dict:  # fmt: skip
    """What this process measures inside one budget, or why the model does not fit it; `expected`
    is what a plan says, None where the cache folder has no figures of the device, or it streams in
    another way than is usual; and `expected_in_hindsight` what it says of memory and flash as fast
    as they were measured with the run."""
    from .. import benchmark, doctor, plan
    from ..arguments import Streaming
    from .cache import default_folder

    counts = (prompt_tokens, new_tokens, repetitions)
    context = context or prompt_tokens + new_tokens

    def ready(engine):
        with options.usage_errors():
            benchmark.check(engine, *counts)

    label = f"measuring in {memory}"
    folder = default_folder() if cache_dir is None else cache_dir
    device = doctor.known(store, folder)
    try:
        opened = options.load_engine(store, memory, context, threads, ready, **streaming)
        with opened as engine, options.progress_bar(label, " tokens") as progress:
            as_usual = dataclasses.replace(engine._streaming, trace=None) == Streaming()
            rates = device if as_usual else None
            told = plan.outlook(engine._needs, engine.budget, *counts[:2], rates)
            report = benchmark.measure(engine, *counts, warm=warm, progress=progress)
            rates = rates and plan.hindsight(rates, told.expected, report)
            hindsight = plan.outlook(engine._needs, engine.budget, *counts[:2], rates)
            how = {name: getattr(engine._streaming, name) for name in _COMPARED}
    except BudgetError as error:
        options.note(f"edgemem: {error}")
        return {"memory": memory, "error": "does not fit", "message": str(error)}
    plans = {"expected": told, "expected_in_hindsight": hindsight}
    plans = {name: p.expected and dataclasses.asdict(p.expected) for name, p in plans.items()}
    return {"memory": memory} | plans | how | dataclasses.asdict(report)


_COMPARED = ("loading", "windowing", "bundling")


def measured_apart(
    store: Path, memory: str, warm: bool, lookahead: bool, predict: bool, sparse: bool,
    windowing: bool, bundling: bool, trace: None, **values: str | int | None,
) -> dict:  # fmt: skip
    """The same from a process of its own, whose memory is all that counts. It dies with us."""
    named = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    arguments = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    arguments += ["--warm"] * warm + ["--no-lookahead"] * (not lookahead)
    arguments += ["--predict"] * predict + ["--sparse"] * sparse
    arguments += ["--no-windowing"] * (not windowing) + ["--no-bundling"] * (not bundling)
    command = [sys.executable, "-c", main_code(), "bench", "--memory", memory, "--json", *arguments]
    # Ctrl-C is for this process to hear, and to pass on as it leaves.
    with (
        handled(unwind, "SIGTERM", "SIGHUP"),
        subprocess.Popen(
            [*command, "--", str(store)], stdout=subprocess.PIPE, start_new_session=True
        ) as child,
    ):
        try:
            output, _ = child.communicate()
        finally:
            child.kill()
    try:
        return json.loads(output)["results"][0]
    except ValueError:  # it has said why, unless it was killed
        status = child.returncode
        reason = f"ended by {signal.Signals(-status).name}" if status < 0 else "failed"
        message = f"measuring in {memory}: the process {reason} (exit code {status})"
        options.note(f"edgemem: {message}")
        return {"memory": memory, "error": reason, "message": message}


def _show(facts: dict, results: list[dict], breakdown: bool, as_json: bool) -> None:
    from .bench_table import breakdowns, heading, legend, table

    if as_json:
        options.print_json(facts | {"results": results})
        return
    parts = [heading(facts), table(results), legend(results)]
    parts += [breakdowns(results)] * breakdown
    print("\n\n".join(filter(None, parts)))
