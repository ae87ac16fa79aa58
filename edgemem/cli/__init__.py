"""The commands of `edgemem`: results on stdout, everything else on stderr.

Exit codes: 0 done, 1 an error that edgemem explains in its message, 2 wrong usage, 130 interrupted.
What takes a model is imported when a command runs, so that `edgemem --help` answers at once.
"""

from __future__ import annotations

import os
import sys

import click

from .. import __version__
from ..errors import EdgeMemError
from .convert import convert
from .demo import demo
from .inspect import inspect
from .perplexity import perplexity
from .run import run
from .verify import verify

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a program that its reader left (128 + SIGPIPE)."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgemem", message="%(prog)s %(version)s")
def cli() -> None:
    """Run language models that are bigger than memory, inside a memory budget that you set."""


for command in (convert, run, inspect, verify, perplexity, demo):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    # Text of a model may hold anything; a terminal that cannot show it gets a "?" instead.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    """Run a command; translate what it raises into messages and an exit code."""
    try:
        code = cli.main(arguments, prog_name="edgemem", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EdgeMemError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(
            f"out of memory{': ' if str(error) else ''}{error}; see --memory and --context"
        )
    except (KeyboardInterrupt, click.Abort):
        print("\nedgemem: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain again when it flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _fail(message: str) -> int:
    print(f"edgemem: {message}", file=sys.stderr)
    return 1
