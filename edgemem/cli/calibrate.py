"""`edgemem calibrate`: give a store predictors, or thresholds."""

from __future__ import annotations

import dataclasses
import sys

import click

from . import options
from .signals import handled, unwind

_HELP = """Train what foretells which neurons of a store are active, or choose thresholds.

STORE was converted with --neurons. It runs TEXT, and from what its feed-forward networks read in
the text's first half, predictors are made; the second half judges them. With --predict, 'run',
'bench' and 'perplexity' then read and multiply only what is predicted: the whole of a feed-forward
network streams, and no matrix of it need be in memory. Predictors are for ReLU.

With --cost, which is for every activation, thresholds are chosen instead: in runs with --sparse
neurons with less activation rest too. One matrix of each network still decides and is multiplied
whole. That pays where a quarter of the neurons or fewer is used. With SiLU and its like most are at
a small cost, and a store made without --neurons is faster.

Both change the answer; by how much is printed here and whenever such a run begins. Without
--predict and --sparse the new store's answers are the old one's.

The store is replaced, when all is done, or written anew where -o is given.
"""


@click.command(help=_HELP, short_help="Train predictors or choose thresholds of neurons.")
@click.argument("store", type=options.PATH)
@click.option(
    "-f", "--file", type=options.PATH, required=True, metavar="TEXT",
    help="The text, in UTF-8; - for stdin. It should be like what the model will read.",
)  # fmt: skip
@click.option("-o", "--output", type=options.PATH, metavar="OUT.edgemem", help="Write a new store.")
@click.option(
    "--recall", type=float, metavar="F", show_default="0.98",
    help="The share of all activation that is to be predicted.",
)  # fmt: skip
@click.option(
    "--cost", type=float, metavar="F",
    help="Choose thresholds: by so much may perplexity rise, 0.01 for 1 %.",
)  # fmt: skip
@click.option(
    "--limit", type=int, metavar="N", show_default="12288", help="Use so many tokens of the text."
)
@click.option("--force", is_flag=True, help="Replace OUT.edgemem if it exists.")
@options.MEMORY
@options.THREADS
@options.JSON
def calibrate(store, file, output, recall, cost, limit, force, memory, threads, as_json):
    from .. import calibration, thresholds
    from ..perplexity import text_bytes
    from ..store import Store
    from ..tokenizer import Tokenizer

    if recall is not None and cost is not None:
        raise click.UsageError("--recall is for predictors, --cost for thresholds: choose one")
    named = (("recall", recall), ("cost", cost), ("limit", limit))
    given = {name: value for name, value in named if value is not None}
    work = calibration.calibrate if cost is None else thresholds.choose_thresholds
    with Store.open(store) as opened:
        tokenizer = Tokenizer(opened.tokenizer_json, opened.tokenizer_config)
    text = options.read_text(file, text_bytes(tokenizer, limit or calibration.TOKENS))
    with handled(unwind, "SIGTERM", "SIGHUP"), options.usage_errors(), _Bars() as bars:
        report = work(
            store, text, output, memory=memory, threads=threads, force=force, progress=bars, **given
        )
    if as_json:
        options.print_json(dataclasses.asdict(report) | {"cost": report.cost})
        return
    for line in _predictors(report) if cost is None else _thresholds(report):
        print(line)
    print(
        f"edgemem: {report.target}: {report.tokens} tokens to learn from, {report.judged_tokens} "
        f"to judge by, in {report.seconds:.0f} s",
        file=sys.stderr,
    )
    if report.judged_tokens < _FEW:
        options.note(
            f"edgemem: so few tokens judge by chance; give {2 * _FEW} and more to judge by"
        )


class _Bars:
    """A bar for each thing that is done, one after another."""

    def __init__(self):
        self._doing, self._stack, self._bar = None, None, None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exc) -> None:
        if self._stack is not None:
            self._stack.__exit__(*exc)

    def __call__(self, doing: str, done: int, total: int) -> None:
        if doing != self._doing:
            self.__exit__(None, None, None)
            self._doing, self._stack = doing, options.progress_bar(doing, _UNITS.get(doing, "it"))
            self._bar = self._stack.__enter__()
        self._bar(done, total)


_FEW = 256
"""Fewer tokens than these judge by chance."""
_UNITS = {
    "recording": " tokens", "measuring": " tokens", "trying": " tokens", "writing": "B"
}  # fmt: skip


def _thresholds(report) -> list[str]:
    """One line for each layer, and their mean: a Markdown table; and what they cost."""
    lines = ["| layer | threshold | used | without |", "|" + "---:|" * 4]
    of_all = report.sparsity
    rows = [(one.layer, f"{one.threshold:.4g}", one) for one in report.layers]
    for layer, threshold, one in (*rows, ("mean", "", of_all)):
        lines.append(
            f"| {layer} | {threshold} | {100 * one.used:.1f} % | {100 * one.active:.1f} % |"
        )
    return [*lines, options.sparsity_cost({"sparse": dataclasses.asdict(of_all)})]


def _predictors(report) -> list[str]:
    """One line for each layer, and their mean: a Markdown table; and what they cost."""
    head = "| layer | rank | active | predicted | recall | found | precision |"
    rows = [(str(one.layer), str(one.rank), one.quality) for one in report.layers]
    rows.append(("mean", "", report.quality))
    lines = [head, "|" + "---:|" * 7]
    for layer, rank, q in rows:
        shares = (q.active, q.predicted, q.recall, q.found, q.precision)
        cells = [layer, rank, *(f"{100 * share:.1f} %" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, options.prediction_cost({"predictor": report.told})]
