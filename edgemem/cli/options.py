"""What several commands share: their options, checked values, progress bars, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

STORE = click.argument("store", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

_ENGINE = (
    click.option(
        "--memory", metavar="SIZE", default="auto", show_default=True,
        help="Memory budget of the whole process: 4GiB, 512M, 50%, or auto (what is free here).",
    ),
    click.option(
        "--context", type=click.IntRange(min=1), metavar="N",
        help="Most tokens of prompt and text together.  [default: 4096, or the model's if less]",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N",
        help="Threads to compute with.  [default: the cores this process may use]",
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


def engine_options(command: Callable) -> Callable:
    """--memory, --context and --threads."""
    return _apply(_ENGINE, command)


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


def load_engine(store: Path, memory: str, context: int | None, threads: int | None):
    """The engine that the options ask for, with a progress bar while weights are read."""
    from .. import engine

    with usage_errors(), progress_bar("reading weights", "B") as progress:
        return engine.load(store, memory, context, threads, progress)


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
    """One object on one line of stdout; paths become strings."""
    print(json.dumps(data, ensure_ascii=False, default=str), flush=True)


def note(message: str) -> None:
    """A line on stderr, where it does not mix with results."""
    print(message, file=sys.stderr)


def read_text(path: Path | None) -> str:
    """All of a UTF-8 file, or of stdin (None or "-")."""
    path = None if str(path) == "-" else path
    name = "stdin" if path is None else str(path)
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise click.UsageError(f"reading {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"reading {name}: it is not UTF-8 text ({error})") from error
