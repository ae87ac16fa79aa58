"""GGUF files byte by byte, for tests that need wrong ones: the format as its document has it."""

import struct

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    """A string: u64 length, bytes."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, code: int, value: bytes) -> bytes:
    """One key of the metadata, its value already in bytes."""
    return text(name) + struct.pack("<I", code) + value


def u32(name: str, value: int) -> bytes:
    """A key with a 32-bit number."""
    return key(name, U32, struct.pack("<I", value))


def array(name: str, code: int, count: int, items: bytes) -> bytes:
    """A key with an array that claims `count` items."""
    return key(name, ARRAY, struct.pack("<IQ", code, count) + items)


def tensor(name: str | bytes, dims, code: int, offset: int) -> bytes:
    """One entry of the list of tensors."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def file(
    keys=(), tensors=(), data: bytes = b"", version: int = 3, alignment: int = 32,
    magic: bytes = b"GGUF", n_tensors: int | None = None, n_keys: int | None = None,
) -> bytes:  # fmt: skip
    """A whole file; counts are those of what is given unless they are to be wrong."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % alignment) + data
