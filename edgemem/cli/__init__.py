"""The commands of `edgemem`: results on stdout, everything else on stderr.

Exit codes: 0 done, 1 an error that its message explains, 2 wrong usage, 128 + n ended by signal n:
130 interrupted, 141 the reader of stdout left. What runs a model is imported when a command runs,
so that `edgemem --help` answers at once.
"""

from __future__ import annotations

import os
import sys

import click

from .. import __version__
from ..errors import EdgeMemError
from .bench import bench
from .calibrate import calibrate
from .convert import convert
from .demo import demo
from .doctor import doctor
from .inspect import inspect
from .perplexity import perplexity
from .plan import plan
from .run import run
from .verify import verify

_LESS = "a smaller --context, or a store converted with a smaller --dtype"
_ENOUGH_MEMORY = {
    "convert": "a machine with more memory, or a checkpoint whose largest tensor is smaller",
    "run": _LESS,
    "demo": "a smaller --context",
    "plan": _LESS,
    "bench": _LESS,
    "calibrate": "a smaller --limit",
    "perplexity": f"a shorter text (--limit), {_LESS}",
}
"""What each command can do about a lack of memory."""

FAILED, INTERRUPTED, READER_LEFT = 1, 130, 141


class Commands(click.Group):
    """Commands that end with a message and an exit code, whatever they raise on purpose."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are needed, not of the alphabet

    def invoke(self, context: click.Context) -> None:
        try:
            super().invoke(context)
            sys.stdout.flush()
        except EdgeMemError as error:
            _fail(context, str(error))
        except MemoryError as error:
            _fail(context, _out_of_memory(context.invoked_subcommand, error))
        except (KeyboardInterrupt, EOFError, click.Abort):
            print("\nedgemem: interrupted", file=sys.stderr)
            context.exit(INTERRUPTED)
        except BrokenPipeError:
            _drop_output()
            context.exit(READER_LEFT)
        except OSError as error:
            # Stores and checkpoints turn theirs into EdgeMemError: this is a stream of our own.
            _drop_output()
            _fail(context, f"writing the output: {error.strerror or error}")


def _out_of_memory(command: str | None, error: MemoryError) -> str:
    reason = f" ({error})" if str(error) else ""
    advice = _ENOUGH_MEMORY.get(command, "a machine with more memory")
    return f"{command}: the system has no more memory{reason}; try {advice}"


def _fail(context: click.Context, message: str) -> None:
    print(f"edgemem: {message}", file=sys.stderr)
    context.exit(FAILED)


def _drop_output() -> None:
    """Let what is still buffered for stdout go nowhere, else Python fails again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="edgemem", message="%(prog)s %(version)s")
def cli() -> None:
    """Run language models inside a memory budget that you set; stores are ready for streaming."""


for command in (
    convert, run, inspect, verify, perplexity, plan, bench, doctor, calibrate, demo,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # A model's text may hold anything; what a terminal cannot show becomes a "?".
        getattr(sys, name).reconfigure(errors="replace")
    try:
        cli.main(arguments, prog_name="edgemem")
    except OSError as error:  # of what click itself prints: help, and errors of usage
        _drop_output()
        print(f"edgemem: writing the output: {error.strerror or error}", file=sys.stderr)
        sys.exit(FAILED)
