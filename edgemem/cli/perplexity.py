"""`edgemem perplexity`: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from . import options

_HELP = """Measure the perplexity of a text.

The text is encoded without special tokens and cut into windows that do not overlap (the last may be
shorter). In each window every token but the first is predicted from those before it. Perplexity is
e to the mean negative log likelihood of all predicted tokens.
"""


@click.command(help=_HELP, short_help="Measure how well a model predicts a text.")
@options.STORE
@click.option(
    "-f", "--file", type=click.Path(path_type=Path), required=True, metavar="TEXT",
    help="The text, in UTF-8; - for stdin.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
    help="Tokens per window.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=2), metavar="N", help="Use the first N tokens of the text."
)
@options.engine_options
@options.JSON
def perplexity(store, file, window, limit, memory, context, threads, as_json):
    text = options.read_text(file)
    engine = options.load_engine(store, memory, context or window, threads)
    from .. import perplexity as measure

    with options.usage_errors(), options.progress_bar("measuring", " tokens") as progress:
        report = measure.perplexity(engine, text, window, limit, progress)
    if as_json:
        options.print_json(dataclasses.asdict(report))
        return
    print(f"perplexity {report.perplexity:.4f} ± {report.standard_error:.4f}")
    options.note(
        f"edgemem: {report.tokens} tokens in {report.windows} windows of {window} · "
        f"{report.tokens_per_second:.1f} tok/s"
    )
