"""`edgemem inspect`: what a store holds."""

from __future__ import annotations

import click

from . import options

_HELP = """Show what a store holds: model, sizes, number formats, bundles, tokenizer, origin.

Reads the directory only, no weights. --json prints one object with more detail.
"""


@click.command(help=_HELP, short_help="Show what a store holds.")
@options.STORE
@options.JSON
def inspect(store, as_json):
    from ..store import Store
    from .facts import describe, summarize

    with Store.open(store) as opened:
        facts = describe(opened)
    if as_json:
        options.print_json(facts)
        return
    rows = summarize(facts)
    width = max(len(name) for name, _ in rows)
    print(facts["path"])
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
