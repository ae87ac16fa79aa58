"""`edgemem verify`: read every byte of a store and compare it with the checksums."""

from __future__ import annotations

import dataclasses

import click

from ..errors import CorruptError
from . import options

_HELP = """Read all of a store and check every bundle against its checksum, and all padding.

Exit code 0 if every byte is as it was written, 1 if not; --json prints ok, faults, bundle_count,
payload_bytes and file_bytes.
"""


@click.command(help=_HELP, short_help="Check every byte of a store.")
@options.STORE
@options.JSON
def verify(store, as_json):
    from ..budget import show_size
    from ..store import Store

    with Store.open(store) as opened, options.progress_bar("verifying", "B") as progress:
        report = opened.verify(progress)
    if as_json:
        options.print_json({"ok": report.ok} | dataclasses.asdict(report))
    elif report.ok:
        print(f"{store}: {report.bundle_count} bundles, {show_size(report.file_bytes)}, all intact")
    else:
        print("\n".join(report.faults))
    if not report.ok:
        count = len(report.faults)
        raise CorruptError(
            f"verifying {store}: {count} fault{'s' * (count != 1)}, first: {report.faults[0]}"
        )
