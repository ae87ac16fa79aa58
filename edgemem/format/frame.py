"""The frame of a store: its first page (header), its last (footer) and where the sections lie."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..dtypes import round_up
from ..errors import CorruptError, StoreError, UnsupportedError
from .directory import ENTRY

MAJOR, MINOR = 1, 0
"""A reader refuses a newer major; a newer minor only adds keys to the meta section."""

MIN_PAGE, MAX_PAGE = 4096, 1 << 20

# magic, major, minor, page_size, crc32c of the 16 bytes before it
_HEADER = struct.Struct("<8sHHII")
# magic, file_bytes, bundle_count, 3 × (offset, bytes, crc32c, 0), crc32c of the 96 bytes before it
_FOOTER = struct.Struct("<8sQQ" + 3 * "QQII" + "I")
HEADER_BYTES, FOOTER_BYTES = _HEADER.size, _FOOTER.size
"""What the header and footer pages say; zeros fill the rest of each page."""

MAGIC = b"EDGEMEM\0"
_FOOTER_MAGIC = b"EDGEFOOT"
_MAX_META_BYTES = 64 << 20
_MAX_TOKENIZER_BYTES = 256 << 20

Checksum = Callable[[bytes], int]


@dataclass(frozen=True)
class Section:
    """One of the three parts between the bundles and the footer."""

    offset: int
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Footer:
    """What the last page says: the size of everything before it, and where the sections are."""

    file_bytes: int
    bundle_count: int
    meta: Section
    tokenizer: Section
    directory: Section


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless it is a power of two from 4 KiB to 1 MiB."""
    if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
        raise ValueError(
            f"page size {page_size} is not a power of two from {MIN_PAGE} to {MAX_PAGE}"
        )


def encode_header(page_size: int, crc32c: Checksum) -> bytes:
    """The first page of a store."""
    check_page_size(page_size)
    body = _HEADER.pack(MAGIC, MAJOR, MINOR, page_size, 0)[:-4]
    return (body + crc32c(body).to_bytes(4, "little")).ljust(page_size, b"\0")


def decode_header(data: bytes, crc32c: Checksum) -> int:
    """The page size that the first bytes of a store declare."""
    if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise StoreError("this is not an edgemem store; make one with 'edgemem convert'")
    _, major, minor, page_size, crc = _HEADER.unpack_from(data)
    if crc32c(data[: _HEADER.size - 4]) != crc:
        raise CorruptError("the header does not match its checksum")
    if major > MAJOR:
        raise UnsupportedError(
            f"the store is of a newer version ({major}.{minor}; this edgemem reads {MAJOR}.x): "
            "upgrade edgemem, or convert the checkpoint with this version"
        )
    try:
        check_page_size(page_size)
    except ValueError as error:
        raise CorruptError(f"the header is wrong: {error}") from None
    if major != MAJOR:
        raise CorruptError(f"the header is wrong: there is no version {major}.{minor}")
    return page_size


def encode_footer(footer: Footer, page_size: int, crc32c: Checksum) -> bytes:
    """The last page of a store."""
    sections = (footer.meta, footer.tokenizer, footer.directory)
    fields = [value for s in sections for value in (s.offset, s.bytes, s.crc32c, 0)]
    body = _FOOTER.pack(_FOOTER_MAGIC, footer.file_bytes, footer.bundle_count, *fields, 0)[:-4]
    return (body + crc32c(body).to_bytes(4, "little")).ljust(page_size, b"\0")


def decode_footer(data: bytes, page_size: int, file_bytes: int, crc32c: Checksum) -> Footer:
    """Check the last page against the size of the file; every section then lies inside it."""
    if len(data) < _FOOTER.size or data[: len(_FOOTER_MAGIC)] != _FOOTER_MAGIC:
        raise CorruptError("the end of the store is missing: it was truncated, or never finished")
    _, size, bundle_count, *fields, crc = _FOOTER.unpack_from(data)
    if crc32c(data[: _FOOTER.size - 4]) != crc:
        raise CorruptError("the footer does not match its checksum")
    if size != file_bytes:
        raise CorruptError(f"the footer declares {size} bytes, the file has {file_bytes}")
    sections = [Section(*fields[i : i + 3]) for i in (0, 4, 8)]
    footer = Footer(size, bundle_count, *sections)
    if any(fields[3::4]) or not _sections_fit(footer, page_size):
        raise CorruptError("the footer describes sections that do not fit together")
    return footer


def _sections_fit(footer: Footer, page_size: int) -> bool:
    """Sections follow one another page by page, and the footer page follows the last."""
    end = footer.meta.offset
    if end % page_size or end < 2 * page_size:
        return False
    sections = (footer.meta, footer.tokenizer, footer.directory)
    limits = (_MAX_META_BYTES, _MAX_TOKENIZER_BYTES, footer.file_bytes)
    for section, limit in zip(sections, limits, strict=True):
        if section.offset != end or not 1 <= section.bytes <= limit:
            return False
        end = round_up(end + section.bytes, page_size)
    return (
        end + page_size == footer.file_bytes
        and 1 <= footer.bundle_count <= footer.meta.offset // page_size
        and footer.directory.bytes == footer.bundle_count * ENTRY.itemsize
    )
