"""A small store with painted weights, for tests of the store itself rather than of a model.

    painted.write(path)                       # four bundles of a one-layer model; a few dozen KiB
    painted.rewrite(path, meta=change)        # a hostile store: changed, with checksums that fit

Payload bytes are painted: they count up in a cycle whose length is prime, so that no two places
that a fault could swap look alike.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from boundaries import CYCLE

from edgemem import dtypes
from edgemem import format as fmt
from edgemem._native import crc32c
from edgemem.format import NO_LAYER, Kind, Layout
from edgemem.spec import ModelSpec, RopeSpec
from edgemem.store import Store
from edgemem.writer import StoreWriter

SPEC = ModelSpec(
    model_type="llama", n_layers=1, hidden=16, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=40,
    intermediate=24, activation="silu", norm_eps=1e-5, rope=RopeSpec(), windows=(0,),
    max_positions=64, tied=True, routed=(False,), bos_id=1, eos_ids=(2,),
)  # fmt: skip
ROUTED = replace(
    SPEC, model_type="qwen2_moe", n_layers=2, tied=False, windows=(0, 0), routed=(True, False),
    n_experts=3, top_k=2, expert_intermediate=20, shared_intermediate=18,
)  # fmt: skip
APART = replace(SPEC, hidden=32, head_dim=16, activation="relu", neurons=True)
FORETOLD = replace(APART, ranks=(32,))
RESTING = replace(APART, activation="silu", thresholds=(0.25,))
TOKENIZER = b'{"model": {"type": "none"}}'


def bundles(spec: ModelSpec = SPEC, dtype=dtypes.Q8_0) -> list[tuple[Kind, int, int, Layout]]:
    """(kind, layer, index, layout) of every bundle, in file order."""
    found = [] if spec.tied else _table(spec, Kind.EMBED, 1, dtype)
    for kind, layer, index in fmt.bundle_order(spec, range(spec.n_layers + 1)):
        shapes = [
            (p.name, p.dtype or dtype, p.lanes, p.rows, p.cols)
            for p in fmt.bundle_parts(spec, kind, layer)
            if not p.optional
        ]
        found.append((kind, layer, index, Layout.build(shapes)))
    return found + _table(spec, Kind.HEAD, dtypes.LANES, dtype)


def _table(spec: ModelSpec, kind: Kind, lanes: int, dtype) -> list:
    step, cols = fmt.table_rows(kind, dtype, spec.hidden), spec.hidden
    counts = [min(step, spec.vocab_size - first) for first in range(0, spec.vocab_size, step)]
    return [
        (kind, NO_LAYER, i, Layout.build([("rows", dtype, lanes, rows, cols)]))
        for i, rows in enumerate(counts)
    ]


def payload(bundle_id: int, layout: Layout) -> bytes:
    """What `write` puts into a bundle: gaps between segments are zero, checksums of rows true."""
    paint = (np.arange(layout.payload_bytes) * 7 + bundle_id * 31) % CYCLE + 1
    data, end = paint.astype(np.uint8), 0
    for segment in layout.segments:
        data[end : segment.offset] = 0
        end = segment.end
    if "checksums" in layout:
        rows = data[: layout["neurons"].bytes].reshape(layout["neurons"].rows, -1)
        sums, at = [crc32c(row.tobytes()) for row in rows], layout["checksums"]
        data[at.offset : at.end] = np.array(sums, "<u4").view(np.uint8)
    return data.tobytes()


def write(path: Path, spec: ModelSpec = SPEC, dtype=dtypes.Q8_0, **options) -> Path:
    """A whole store at `path`; `options` go to StoreWriter."""
    with StoreWriter(path, **options) as writer:
        for i, (kind, layer, index, layout) in enumerate(bundles(spec, dtype)):
            with writer.bundle(kind, layer, index, layout) as bundle:
                bundle.write(payload(i, layout))
        writer.finish(spec, TOKENIZER, chat_template="{{ text }}", provenance={"by": "painted"})
    return path


def read_all(path: Path) -> tuple:
    """Everything that a reader gets from a store."""
    with Store.open(path) as store:
        payloads = []
        for i in range(len(store.entries)):
            buffer = bytearray(store.layout_of(i).payload_bytes)
            store.read(i, buffer)
            payloads.append(bytes(buffer))
        about = (store.spec, store.layouts, store.chat_template, store.generation, store.recipe)
        more = (store.tokenizer_config, store.tokenizer_json, store.provenance, store.page_size)
        return payloads, *about, *more


def rewrite(
    path: Path,
    meta: Callable[[bytes], bytes] = bytes,
    directory: Callable[[np.ndarray], np.ndarray] = np.copy,
    footer: Callable[[fmt.Footer], fmt.Footer] = lambda f: f,
) -> None:
    """Change what a store says about itself, keeping all its checksums right."""
    data = path.read_bytes()
    page = fmt.decode_header(data[:64], crc32c)
    old = fmt.decode_footer(data[-page:], page, len(data), crc32c)
    parts = [data[s.offset : s.offset + s.bytes] for s in (old.meta, old.tokenizer, old.directory)]
    entries = directory(np.frombuffer(parts[2], fmt.ENTRY))
    body, sections = bytearray(data[: old.meta.offset]), []
    for part in (meta(parts[0]), parts[1], entries.tobytes()):
        sections.append(fmt.Section(len(body), len(part), crc32c(part)))
        body += part + bytes(-len(part) % page)
    new = footer(fmt.Footer(len(body) + page, len(entries), *sections))
    path.write_bytes(bytes(body) + fmt.encode_footer(new, page, crc32c))
