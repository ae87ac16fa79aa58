"""`edgemem run`: generate text from a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from . import options

_HELP = """Generate text that continues a prompt.

MODEL is a store, or a checkpoint (a Hugging Face folder or a GGUF file): its store is made once, as
'edgemem convert' makes it, kept in a cache folder, and made again when the checkpoint has changed.

The prompt is -p TEXT, the contents of -f FILE, or what stdin gives; of the latter two, one newline
at the end is dropped. Text goes to stdout as it is made, an account of the run to stderr.

--json prints one object instead: text, token_ids, prompt_tokens, generated_tokens, finish_reason
(eos, stop, length or context), prefill and decode (each: tokens, seconds, tokens_per_second),
peak_rss_bytes, kv, threads, isa; and of a model that streams, in prefill and decode, hit_rate,
read_bytes_per_token, stall_share and device_share.
"""


@click.command(help=_HELP, short_help="Generate text from a prompt.")
@options.model_options
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", type=options.PATH, help="Read the prompt from a file.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=0), default=256, show_default=True, metavar="N",
    help="Generate at most N tokens.",
)  # fmt: skip
@options.sampling_options
@options.STOP
@options.engine_options()
@options.streaming_options
@options.JSON
def run(
    model, dtype, neurons, predict, sparse, cache_dir, prompt, file, max_tokens, stop, memory,
    context, kv, threads, policy, profile, lookahead, trace, as_json, **sampling,
):  # fmt: skip
    if prompt is not None and file is not None:
        raise click.UsageError("give the prompt with -p or with -f, not both")
    arguments = generation_arguments(max_tokens, stop, sampling)
    text = None

    def ready(engine):
        nonlocal text
        engine.check([0], **arguments)  # before anybody types a prompt
        text = read_prompt(prompt, file, engine.text_room(engine.context))
        engine.check(text, **arguments)

    opened = options.load_engine(
        model, memory, context, threads, ready, cache_dir, dtype, neurons, kv=kv, policy=policy,
        profile=profile, lookahead=lookahead, trace=trace, predict=predict, sparse=sparse,
    )  # fmt: skip
    with opened as engine:
        generate(engine, text, as_json, **arguments)


def generation_arguments(max_tokens: int, stop: Sequence[str], sampling: dict) -> dict:
    """The arguments of `Engine.generate` that were given."""
    from ..sampler import Sampling

    given = {name: value for name, value in sampling.items() if value is not None}
    with options.usage_errors():
        Sampling.of(given)  # before a checkpoint is converted, which may take long
    return {"max_tokens": max_tokens, "stop": list(map(options.argument_text, stop)), **given}


def read_prompt(prompt: str | None, file: Path | None, most: int) -> str:
    """The prompt from -p, from -f or from stdin; of one of over `most` bytes at least so many."""
    if prompt is not None:
        return options.argument_text(prompt)
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        options.note("edgemem: type the prompt, then Ctrl-D (or give it with -p TEXT)")
    return options.read_text(file, most).removesuffix("\n")


def generate(engine, prompt: str, as_json: bool, **arguments) -> None:
    """Generate and print, and account for it."""
    from .account import account, account_line

    with options.usage_errors():
        generation = engine.generate(prompt, stream=True, **arguments)
    if as_json:
        text = "".join(generation)
        options.print_json({"text": text} | account(engine, generation))
        return
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    if not generation.text.endswith("\n"):
        print(flush=True)
    options.note(account_line(engine, generation))
