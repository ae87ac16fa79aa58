"""The command line: `edgemem` and `python -m edgemem`."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        from .cli import main as run  # takes a moment, in which Ctrl-C may fall

        run(arguments)
    except KeyboardInterrupt:
        print("\nedgemem: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
