"""`edgemem inspect`: what a store or a checkpoint holds."""

from __future__ import annotations

import click

from . import options

_HELP = """Show what a store or a checkpoint holds: model, sizes, number formats, tokenizer.

Of a checkpoint, a Hugging Face folder or a GGUF file, it says before any conversion what is dense
and what streams, and whether edgemem runs it. Reads no weights. --json prints one object with more
detail.
"""


@click.command(help=_HELP, short_help="Show what a store or a checkpoint holds.")
@click.argument("path", type=options.PATH)
@options.JSON
def inspect(path, as_json):
    from . import facts as told

    facts = told.of(path)
    if as_json:
        options.print_json(facts)
        return
    rows = told.summarize(facts)
    width = max(len(name) for name, _ in rows)
    print(facts["path"])
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
