"""What several commands share: their options, checked values, progress bars, JSON."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from ..dtypes import CONVERSIONS, KV_TYPES

PATH = click.Path(path_type=Path, readable=False)
"""Any path: what cannot be opened is for the library to say."""

DTYPE = click.Choice(CONVERSIONS)

STORE = click.argument("store", type=PATH)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
STOP = click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."
)

PREDICT = click.option(
    "--predict", is_flag=True,
    help="Use only neurons that are predicted to be active, of a store that was calibrated; "
    "changes the answer.",
)  # fmt: skip
SPARSE = click.option(
    "--sparse", is_flag=True,
    help="Let neurons below their thresholds rest, of a store that was calibrated with --cost; "
    "changes the answer.",
)  # fmt: skip
CACHE_DIR = click.option(
    "--cache-dir", type=PATH, metavar="DIR",
    help="Where stores of checkpoints, and what was measured, are kept.  [default: "
    "$EDGEMEM_CACHE, or the system's folder for caches]",
)  # fmt: skip

_MORE_BYTES = 16
"""A byte order mark, a newline at the end and the part of a character leave more than `most`."""

_MEMORY = "Memory budget of the whole process: 4GiB, 512M, 50%, or auto (what is free here)"
THREADS = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N",
    help="Threads to compute with.  [default: the process's cores, of mixed ones the fast]",
)  # fmt: skip

MEMORY = click.option(
    "--memory", metavar="SIZE", default="auto", show_default=True, help=f"{_MEMORY}."
)

_PAYS = 0.25
"""Where more neurons than this share are used, FFNs that are whole are faster (bench/LOG.md)."""

_KV_COSTS = {
    "q8_0": "perplexity by -0.01 % and +0.05 % where it was measured (tiny-moe, stories260k)",
    "f32": "keys and values are not rounded, where f16 costs less than 0.002 % of perplexity",
}
_KV = click.option(
    "--kv", type=click.Choice(KV_TYPES), default=KV_TYPES[0], show_default=True,
    help="Type of the KV cache; changes the answer. q8_0 takes about half the memory of f16 and is "
    "less exact, f32 takes twice and rounds nothing.",
)  # fmt: skip

POLICIES = ("next-use", "lru", "lfu", "static")
"""Those of edgemem.policies, the default first."""

_STREAMING = (
    click.option(
        "--policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True,
        help="Which of what streams stays in memory.",
    ),
    click.option(
        "--profile", type=PATH, metavar="FILE",
        help="A trace that says what is popular, for the static policy.",
    ),
    click.option(
        "--lookahead/--no-lookahead", default=True, show_default=True,
        help="Read ahead what the next layers will likely want.",
    ),
    click.option(
        "--trace", type=PATH, metavar="FILE",
        help="Record what streamed layers demand in every step.",
    ),
)  # fmt: skip

_COMPARING = (
    click.option(
        "--loading", type=click.Choice(("stream", "hybrid", "naive")), default="stream",
        show_default=True, help="hybrid: what does not fit is read in its turn, nothing ahead. "
        "naive: all weights are read again in each step. Both are there to compare with.",
    ),
    click.option(
        "--windowing/--no-windowing", default=True, show_default=True,
        help="Keep neurons of earlier tokens.",
    ),
    click.option(
        "--bundling/--no-bundling", default=True, show_default=True,
        help="Read all parts of a neuron at once.",
    ),
)  # fmt: skip

_MODEL = (
    click.argument("model", type=PATH),
    click.option(
        "--dtype", type=DTYPE,
        help="Number format of the matrices, of a checkpoint.  [default: keep]",
    ),
    click.option("--neurons", is_flag=True, help="Take the FFNs of a checkpoint apart (convert)."),
    PREDICT,
    SPARSE,
    CACHE_DIR,
)  # fmt: skip

_TOKENS = (
    click.option(
        "-p", "--prompt-tokens", type=click.IntRange(min=1), metavar="N",
        help="Tokens of each prompt.  [default: 512, or as many as fit]",
    ),
    click.option(
        "-n", "--new-tokens", type=click.IntRange(min=1), metavar="N",
        help="Tokens after it, one by one.  [default: 128, or fewer as they fit]",
    ),
)  # fmt: skip

_SAMPLING = (
    click.option("--temperature", type=float, metavar="F", help="0 takes the likeliest token."),
    click.option("--top-k", type=int, metavar="N", help="Keep the N likeliest tokens; 0: all."),
    click.option(
        "--top-p", type=float, metavar="F", help="Keep the likeliest of this joint share."
    ),
    click.option(
        "--min-p", type=float, metavar="F", help="Drop those below this share of the top."
    ),
    click.option("--repetition-penalty", type=float, metavar="F", help="Above 1: repeat less."),
    click.option(
        "--seed", type=int, metavar="N", help="Equal seeds give equal text.  [default: 0]"
    ),
)


def engine_options(
    help: str = "Most tokens of prompt and text together.  [default: 4096, or the model's if less]",
    several_budgets: bool = False,
) -> Callable:
    """--memory, --context, --kv and --threads; `help` is that of --context."""
    memory = MEMORY
    if several_budgets:
        memory = click.option(
            "--memory", metavar="SIZE", multiple=True, default=("auto",),
            help=f"{_MEMORY}; repeatable.  [default: auto]",
        )  # fmt: skip
    context = click.option("--context", type=click.IntRange(min=1), metavar="N", help=help)
    return lambda command: _apply((memory, context, _KV, THREADS), command)


def token_counts(command: Callable) -> Callable:
    """--prompt-tokens and --new-tokens."""
    return _apply(_TOKENS, command)


def fill_token_counts(values: dict, max_positions: int) -> None:
    """Those that were not given are what a model of so many positions, and the --context that was
    given, leave room for."""
    from ..benchmark import NEW_TOKENS, PROMPT_TOKENS

    fits = min(values["context"] or max_positions, max_positions)
    prompt, new = values["prompt_tokens"], values["new_tokens"]
    if new is None:
        new = max(1, min(NEW_TOKENS, fits // 4 if prompt is None else fits - prompt))
    if prompt is None:
        prompt = max(1, min(PROMPT_TOKENS, fits - new))
    values.update(prompt_tokens=prompt, new_tokens=new)


def streaming_options(command: Callable) -> Callable:
    """--policy, --profile, --lookahead and --trace."""
    return _apply(_STREAMING, command)


def comparing_options(command: Callable) -> Callable:
    """--loading, --windowing and --bundling: what streaming is made of, one by one."""
    return _apply(_COMPARING, command)


def model_options(command: Callable) -> Callable:
    """MODEL, a store or a checkpoint, how the latter is converted (--dtype, --neurons and
    --cache-dir), --predict and --sparse."""
    return _apply(_MODEL, command)


def sampling_options(command: Callable) -> Callable:
    """--temperature, --top-k, --top-p, --min-p, --repetition-penalty and --seed."""
    return _apply(_SAMPLING, command)


def _apply(options, command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What the library says of arguments (ValueError, TypeError) is an error of usage here."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def load_engine(
    model: Path, memory: str, context: int | None, threads: int | None, ready: Callable,
    cache_dir: Path | None = None, dtype: str | None = None, neurons: bool = False, **more,
):  # fmt: skip
    """The engine that the options ask for, with a progress bar while weights are read.

    A checkpoint is converted first, unless its store is in the cache. `ready(engine)` is called
    before weights are read, and may refuse what comes later. `more` are other arguments of
    `edgemem.load`. What changes the answer is told, with what it costs.
    """
    from .. import budget, engine
    from .cache import as_store

    with usage_errors():
        budget.Budget(memory)  # a wrong size is told before a long conversion
        store = as_store(model, cache_dir, dtype, neurons)
    kv = more.get("kv", KV_TYPES[0])
    if kv in _KV_COSTS:
        note(f"edgemem: --kv {kv} changes the answer: {_KV_COSTS[kv]}")

    def told(loading) -> None:
        if loading.predict:
            note(f"edgemem: --predict changes the answer: {prediction_cost(loading.store.recipe)}")
        if loading.sparse:
            note(f"edgemem: --sparse changes the answer: {sparsity_cost(loading.store.recipe)}")
        ready(loading)

    with usage_errors(), progress_bar("reading weights", "B") as progress:
        return engine.load(store, memory, context, threads, progress, told, **more)


def prediction_cost(recipe: dict) -> str:
    """What `edgemem calibrate` found it to cost, and wrote into the store."""
    try:
        said = _numbers(recipe["predictor"])
        cost = said["predicted_perplexity"] / said["perplexity"] - 1
        missed = 1 - said["recall"]
        return (
            f"{100 * said['predicted']:.1f} % of neurons are predicted and have "
            f"{100 * said['recall']:.1f} % of the activation ({100 * missed:.1f} % is missed; "
            f"precision {100 * said['precision']:.0f} %), perplexity changes by "
            f"{100 * cost:+.2f} % ({said['perplexity']:.5g} to {said['predicted_perplexity']:.5g}) "
            "on the text that it was calibrated with"
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return "the store does not say what that costs; calibrate it again"


def _numbers(said: dict) -> dict[str, float]:
    """What a store says, which may be anything."""
    found = {name: float(value) for name, value in said.items()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError("numbers that cannot be")
    return found


def sparsity_cost(recipe: dict) -> str:
    """What `edgemem calibrate --cost` found it to bring and to cost, and wrote into the store."""
    try:
        said = _numbers(recipe["sparse"])
        cost = said["sparse_perplexity"] / said["perplexity"] - 1
        percent = {name: f"{100 * value:.1f} %" for name, value in said.items()}
        slow = "; with so many a store made without --neurons is faster"
        return (
            f"{percent['used']} of neurons are used instead of {percent['active']}, and so "
            f"{percent['weights']} of the feed-forward weights instead of "
            f"{percent['active_weights']}; perplexity changes by {100 * cost:+.2f} % "
            f"({said['perplexity']:.5g} to {said['sparse_perplexity']:.5g}) on the text that it "
            f"was calibrated with{slow if said['used'] > _PAYS else ''}"
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return "the store does not say what that costs; calibrate it again"


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A callback(done, total); it draws a bar on stderr if that is a terminal and it takes long."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(
        desc=label, unit=unit, unit_scale=True, unit_divisor=1024 if unit == "B" else 1000,
        leave=False, delay=0.5, disable=hidden, dynamic_ncols=True,
    ) as bar:  # fmt: skip

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def print_json(data: dict) -> None:
    """One object on one line of stdout; paths become strings, and nothing becomes a "?"."""
    is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(data, ensure_ascii=not is_utf8, default=str), flush=True)


def note(message: str) -> None:
    """A line on stderr, where it does not mix with results."""
    print(message, file=sys.stderr)


def argument_text(text: str) -> str:
    """A text of the command line, which Python may have taken for another encoding than UTF-8."""
    if text.isascii():
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where they are known only once it is read, like those of stdin."""
    return path.stat().st_size if str(path) != "-" and path.is_file() else 0


def read_text(path: Path | None, most: int | None = None) -> str:
    """A UTF-8 file, or stdin (None or "-"): all, or a little more than its first `most` bytes."""
    path = None if str(path) == "-" else path
    name = "stdin" if path is None else str(path)
    if path is None and sys.stdin is None:
        raise click.UsageError("reading stdin: it is closed; give the text with an option")
    size = -1 if most is None else most + _MORE_BYTES
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if path is None else stack.enter_context(path.open("rb"))
            data = file.read(size)
        # A character that is cut by the end of what is read is no fault of the text's.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) != size)
    except OSError as error:
        raise click.UsageError(f"reading {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"reading {name}: it is not UTF-8 text ({error})") from error
