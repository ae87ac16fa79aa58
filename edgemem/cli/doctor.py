"""`edgemem doctor`: what this device gives, measured once."""

from __future__ import annotations

import dataclasses
from datetime import datetime

import click

from . import options

_HELP = """Measure what this device gives: flash, memory, and multiply-adds.

PATH says which flash: a folder, in which a file without a name is written for a while (up to 256
MiB, at most a quarter of what is free), or a store or any other large file, which is only read, and
leaves the page cache. By default it is the cache folder. The first time takes about 25 seconds;
what was measured is kept in the cache folder, and told from there as long as the machine and the
file system are the same.

Flash is read in random order, by either engine: past the page cache (direct) and through it, after
it was told to forget the file (buffered). From these figures 'edgemem plan' says how fast models
will be.
"""


@click.command(help=_HELP, short_help="Measure flash, memory and processor.")
@click.argument("path", type=options.PATH, required=False)
@options.CACHE_DIR
@click.option("--again", is_flag=True, help="Measure, whatever was measured before.")
@options.JSON
def doctor(path, cache_dir, again, as_json):
    from .. import doctor as device_doctor
    from .cache import default_folder, made_folder

    folder = default_folder() if cache_dir is None else cache_dir
    place = made_folder(folder) if path is None else path
    with options.progress_bar("measuring", " figures") as progress:
        device = device_doctor.examine(place, folder, again, progress)
    if device_doctor.lies_in_memory(place):
        options.note(f"edgemem: {place} lies in memory: its figures are not those of any flash")
    if as_json:
        knee = dataclasses.asdict(device.knee())
        options.print_json(dataclasses.asdict(device) | {"knee": knee})
    else:
        print(_text(device))


def _text(device) -> str:
    when = datetime.fromtimestamp(device.measured_at).isoformat(" ", "minutes")
    parts = [f"{device.place}: {device.cpu}, {device.threads} threads; measured {when}"]
    ways = dict.fromkeys((r.engine, r.direct) for r in device.flash)
    parts += [_table(device, *way) for way in ways]
    products = ", ".join(f"{name} {n / 1e9:.0f}" for name, n in device.multiply_adds.items())
    knee = device.knee()
    parts.append(
        f"memory      {device.dram_bytes_per_second / 1e9:.1f} GB/s read by all threads\n"
        f"processor   {products} thousand million multiply-adds a second\n"
        f"flash       {_size(knee.bytes)} × {knee.depth} in flight suffice: "
        f"{knee.bytes_per_second / 1e9:.2f} GB/s, {knee.engine}, {_way(knee.direct)}"
    )
    return "\n\n".join(parts)


def _table(device, engine: str, direct: bool) -> str:
    """Rates by size and depth, of one engine and way."""
    from .bench_table import aligned

    found = {
        (r.bytes, r.depth): r.bytes_per_second
        for r in device.flash if (r.engine, r.direct) == (engine, direct)
    }  # fmt: skip
    depths = sorted({depth for _, depth in found})
    rows = [(f"{engine}, {_way(direct)}: MB/s", *(f"{depth} in flight" for depth in depths))]
    for size in sorted({size for size, _ in found}):
        rates = [found.get((size, depth)) for depth in depths]
        rows.append((_size(size), *("–" if r is None else f"{r / 1e6:.0f}" for r in rates)))
    return aligned(rows)


def _way(direct: bool) -> str:
    return "direct" if direct else "buffered"


def _size(size: int) -> str:
    return f"{size >> 10} KiB"
