"""`edgemem convert`: make a store from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator

import click

from . import options

_HELP = """Convert a checkpoint into a store, a single file that holds all that a run needs. A
checkpoint is a Hugging Face folder (config.json, tokenizer.json and safetensors) or a GGUF file
(of a split one, any part).

--dtype keep leaves the weights as they are; f16, q8_0 and q4_0 convert the matrices. Memory use
stays within a small multiple of the largest tensor.
"""


@contextlib.contextmanager
def _cleaned_up_when_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that no half of a store stays behind."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    # What is ignored (nohup) stays so, and only the main thread may ask for signals.
    is_main = threading.current_thread() is threading.main_thread()
    taken = [n for n in numbers if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame) -> None:
    with contextlib.suppress(OSError):  # a terminal that hung up takes no message
        os.write(2, f"\nedgemem: ended by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)


@click.command(help=_HELP, short_help="Make a store from a checkpoint.")
@click.argument("source", type=options.PATH)
@click.option(
    "-o", "--output", type=options.PATH, required=True, metavar="OUT.edgemem",
    help="The store to write.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["keep", "f16", "q8_0", "q4_0"]), default="keep",
    show_default=True, help="Number format of the matrices.",
)  # fmt: skip
@click.option(
    "--page-size", type=int, default=4096, show_default=True, metavar="N",
    help="Bytes that bundles are aligned to: a power of two from 4096.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the store if it exists.")
@options.JSON
def convert(source, output, dtype, page_size, force, as_json):
    from .. import converters
    from ..budget import show_size

    with (
        _cleaned_up_when_ended(),
        options.usage_errors(),
        options.progress_bar("converting", "B") as progress,
    ):
        report = converters.convert(
            source, output, dtype=dtype, page_size=page_size, force=force, progress=progress
        )
    for note in report.notes:
        print(f"edgemem: {note}", file=sys.stderr)
    if as_json:
        options.print_json(dataclasses.asdict(report))
        return
    print(
        f"{report.target}: {report.model_type}, {report.parameters / 1e6:,.1f} M parameters, "
        f"{show_size(report.store_bytes)}, in {report.seconds:.1f} s"
    )
