"""The command line: `edgemem` and `python -m edgemem`."""

from .cli import main

if __name__ == "__main__":
    main()
