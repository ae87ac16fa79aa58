"""The bytes of a store: how they are encoded, decoded and checked. FORMAT.md draws them.

Everything here is a function of bytes and values; files are opened by `store` and `writer`, which
also pass in the checksum `crc32c(data) -> int`, so that this package needs numpy and nothing
native. Bytes that come from a file are hostile: every field is checked against what surrounds it
before it is used, and what is wrong is said in a StoreError, CorruptError or UnsupportedError
without the file's name, which the caller adds.
"""

from .bundles import Part, bundle_order, bundle_parts, neuron_parts, table_rows
from .directory import ENTRY, check_directory
from .frame import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAGIC,
    MAJOR,
    MAX_PAGE,
    MIN_PAGE,
    MINOR,
    Footer,
    Section,
    check_page_size,
    decode_footer,
    decode_header,
    encode_footer,
    encode_header,
)
from .layout import NO_LAYER, SEGMENT_ALIGN, STREAMABLE, Kind, Layout, Segment
from .meta import Meta, decode_meta, encode_meta, parse_json

EMBED, DENSE, FFN, EXPERT, SHARED, HEAD, NEURONS, PREDICTOR = Kind

__all__ = [
    "DENSE", "EMBED", "ENTRY", "EXPERT", "FFN", "FOOTER_BYTES", "HEAD", "HEADER_BYTES",
    "MAGIC", "MAJOR", "MAX_PAGE", "MINOR", "MIN_PAGE", "NEURONS", "NO_LAYER", "SEGMENT_ALIGN",
    "PREDICTOR", "SHARED", "STREAMABLE", "Footer", "Kind", "Layout", "Meta", "Part", "Section",
    "Segment",
    "bundle_order", "bundle_parts", "check_directory", "check_page_size", "decode_footer",
    "decode_header", "decode_meta", "encode_footer", "encode_header", "encode_meta", "neuron_parts",
    "parse_json", "table_rows",
]  # fmt: skip
