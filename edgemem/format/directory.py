"""The directory: one entry of 40 bytes for each bundle, in the order of the file."""

import numpy as np

from ..errors import CorruptError
from .bundles import check_bundles
from .layout import Kind
from .meta import Meta

ENTRY = np.dtype(
    [
        ("kind", "<u2"),
        ("layout", "<u2"),
        ("layer", "<u4"),
        ("index", "<u4"),
        ("page_count", "<u4"),
        ("page_first", "<u8"),
        ("payload_bytes", "<u8"),
        ("crc32c", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""One directory entry, 40 bytes. A bundle's id is its entry's position."""


def check_directory(entries: np.ndarray, meta: Meta, page_size: int, end: int) -> None:
    """Hold the directory to the spec and to the file.

    After this, `entries` are exactly the bundles of `meta.spec` in canonical order, each with the
    segments and shapes that the spec asks for, in page runs that tile [page_size, end). Raises
    CorruptError.
    """
    if len(entries) == 0:
        raise CorruptError("the directory is empty")
    if (entries["kind"] > max(Kind)).any() or entries["reserved"].any():
        raise CorruptError("the directory holds an entry of an unknown kind")
    if (entries["layout"] >= len(meta.layouts)).any():
        raise CorruptError("the directory refers to a layout that is not there")
    payload = np.array([layout.payload_bytes for layout in meta.layouts], np.uint64)
    pages = (payload + np.uint64(page_size - 1)) // np.uint64(page_size)
    counts = pages[entries["layout"]]
    firsts = np.cumsum(counts, dtype=np.uint64) - counts + np.uint64(1)
    if not (
        (entries["payload_bytes"] == payload[entries["layout"]]).all()
        and (entries["page_count"] == counts).all()
        and (entries["page_first"] == firsts).all()
        and int(firsts[-1] + counts[-1]) * page_size == end
    ):
        raise CorruptError("the directory's bundles do not lie back to back")
    check_bundles(entries, meta)
