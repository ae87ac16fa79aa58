"""`edgemem demo`: a first text, from the small model that comes with the package."""

from __future__ import annotations

import importlib.resources

import click

from ..errors import StoreError
from . import options
from .run import generate, generation_arguments

DEMO_STORE = "demo.edgemem"
DEMO_PROMPT = "Natasha opened the door."
DEMO_SAMPLING = {"temperature": 0.5, "top_p": 0.9}

_HELP = """Generate text with the small model that comes with edgemem.

It has 22 M parameters, so its English is rough; what makes the text is what runs any other model.
Sampling options that are not given are chosen to suit it. Prints the prompt and the text on stdout,
and an account of the run on stderr; --json prints one object instead, as 'edgemem run' does.
"""


@click.command(help=_HELP, short_help="Generate text with the model that comes along.")
@click.option(
    "-p", "--prompt", metavar="TEXT", default=DEMO_PROMPT, show_default=True, help="The prompt."
)
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=0), default=120, show_default=True, metavar="N",
    help="Generate at most N tokens.",
)  # fmt: skip
@options.sampling_options
@options.STOP
@options.engine_options()
@options.JSON
def demo(prompt, max_tokens, stop, memory, context, kv, threads, as_json, **sampling):
    arguments = DEMO_SAMPLING | generation_arguments(max_tokens, stop, sampling)
    prompt = options.argument_text(prompt)
    resource = importlib.resources.files("edgemem") / DEMO_STORE
    if not resource.is_file():
        raise StoreError(
            f"the demo's store {DEMO_STORE} is not in this installation; reinstall edgemem, or "
            "convert a checkpoint with 'edgemem convert'"
        )
    with importlib.resources.as_file(resource) as store:
        opened = options.load_engine(
            store, memory, context, threads, lambda engine: engine.check(prompt, **arguments), kv=kv
        )
        with opened as engine:
            if not as_json:
                print(prompt, end="", flush=True)
            generate(engine, prompt, as_json, **arguments)
