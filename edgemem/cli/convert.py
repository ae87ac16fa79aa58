"""`edgemem convert`: make a store from a checkpoint."""

from __future__ import annotations

import dataclasses
import sys

import click

from . import options
from .signals import handled, unwind

_HELP = """Convert a checkpoint into a store, a single file that holds all that a run needs. A
checkpoint is a Hugging Face folder (config.json, tokenizer.json and safetensors) or a GGUF file
(of a split one, any part).

--dtype keep leaves the weights as they are; f16 rounds the matrices; q8_0 and q4_0 quantise them in
blocks of 32 columns, q6_k to q2_k in blocks of 256 whose scales are searched for, which takes
longer and keeps more: q4_k is as small as q4_0. Matrices whose rows are not whole blocks of 256
become q8_0 (for q6_k and q5_k), q5_0 (q4_k) or q4_0 (q3_k and q2_k), which is told. Beside blocks
embedding and output head become q8_0; routers stay as they are, norms and biases become f32.
Memory use stays within a small multiple of the largest tensor.
"""


@click.command(help=_HELP, short_help="Make a store from a checkpoint.")
@click.argument("source", type=options.PATH)
@click.option(
    "-o", "--output", type=options.PATH, required=True, metavar="OUT.edgemem",
    help="The store to write.",
)  # fmt: skip
@click.option(
    "--dtype", type=options.DTYPE, default="keep",
    show_default=True, help="Number format of the matrices.",
)  # fmt: skip
@click.option(
    "--page-size", type=int, default=4096, show_default=True, metavar="N",
    help="Bytes that bundles are aligned to: a power of two from 4096.",
)  # fmt: skip
@click.option(
    "--neurons", is_flag=True,
    help="Take FFNs apart, so that neurons which ReLU lets rest are neither read nor multiplied. "
    "The more of them rest, the more that brings, above all where memory is short; prompts are "
    "read more slowly where many do not. With other activations none rests, which is slower, but "
    "below thresholds from 'calibrate --cost' in runs with --sparse.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the store if it exists.")
@options.JSON
def convert(source, output, dtype, page_size, neurons, force, as_json):
    from .. import converters
    from ..budget import show_size

    with (
        handled(unwind, "SIGTERM", "SIGHUP"),
        options.usage_errors(),
        options.progress_bar("converting", "B") as progress,
    ):
        report = converters.convert(
            source, output, dtype=dtype, page_size=page_size, force=force, progress=progress,
            neurons=neurons,
        )  # fmt: skip
    for note in report.notes:
        print(f"edgemem: {note}", file=sys.stderr)
    if as_json:
        options.print_json(dataclasses.asdict(report))
        return
    print(
        f"{report.target}: {report.model_type}, {report.parameters / 1e6:,.1f} M parameters, "
        f"{show_size(report.store_bytes)}, in {report.seconds:.1f} s"
    )
