"""`edgemem perplexity`: how well a model predicts a text."""

from __future__ import annotations

import dataclasses

import click

from . import options

_HELP = """Measure the perplexity of a text.

MODEL is a store, or a checkpoint, whose store is made once and kept (see 'edgemem run').

The text is encoded without special tokens and cut into windows that do not overlap (the last may be
shorter). In each window every token but the first is predicted from those before it. Perplexity is
e to the mean negative log likelihood of all predicted tokens.

All of the text is encoded at once, which takes 512 bytes of memory for each of its bytes, out of
the budget; with --limit only about as much of it as so many of the longest tokens have.
"""


@click.command(help=_HELP, short_help="Measure how well a model predicts a text.")
@options.model_options
@click.option(
    "-f", "--file", type=options.PATH, required=True, metavar="TEXT",
    help="The text, in UTF-8; - for stdin.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
    help="Tokens per window.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=2), metavar="N", help="Use the first N tokens of the text."
)
@options.engine_options("Most tokens of a window.  [default: --window]")
@options.JSON
def perplexity(
    model, dtype, neurons, predict, sparse, cache_dir, file, window, limit, memory, context, kv,
    threads, as_json,
):  # fmt: skip
    from .. import perplexity as measure

    text = None

    def ready(engine):
        nonlocal text
        most = measure.text_bytes(engine.tokenizer, limit)
        size = options.file_size(file) if most is None else min(most, options.file_size(file))
        engine.promise_text(size)  # of a file, before it is read
        fits = max(size, engine.text_room())
        text = options.read_text(file, fits if most is None else min(fits, most))
        measure.check(engine, text, window, limit)

    opened = options.load_engine(
        model, memory, context or window, threads, ready, cache_dir, dtype, neurons, kv=kv,
        predict=predict, sparse=sparse,
    )  # fmt: skip
    with opened as engine, options.usage_errors():
        with options.progress_bar("measuring", " tokens") as progress:
            report = measure.perplexity(engine, text, window, limit, progress)
    if as_json:
        how = {"kv": kv, "predict": predict, "sparse": sparse}
        options.print_json(dataclasses.asdict(report) | how)
        return
    print(f"perplexity {report.perplexity:.4f} ± {report.standard_error:.4f}")
    options.note(
        f"edgemem: {report.tokens} tokens in {report.windows} windows of {window} · "
        f"{report.tokens_per_second:.1f} tok/s"
    )
