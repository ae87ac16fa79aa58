"""Converting a checkpoint to a store, from end to end."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgemem import __version__
from edgemem.dtypes import CONVERSIONS
from edgemem.errors import StoreError, UnsupportedError
from edgemem.format import MAGIC, check_page_size
from edgemem.memory import peak_bytes
from edgemem.spec import ModelSpec
from edgemem.tokenizer import Tokenizer
from edgemem.writer import StoreWriter, check_target

from . import bundler
from .checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from .configuration import describe


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `peak_rss_bytes` is the whole process's, 0 where it is not known.

    `notes` are lines for people: what the checkpoint says and the store leaves out, and which
    matrices are in another number format than was asked for.
    """

    source: str
    target: str
    model_type: str
    dtype: str
    parameters: int
    tensors: int
    bundles: int
    source_bytes: int
    store_bytes: int
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: str = "keep",
    page_size: int = 4096,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    neurons: bool = False,
) -> ConversionReport:
    """Convert a checkpoint, a Hugging Face folder or a GGUF file, into the store `target`.

    `dtype` is "keep" (weights as they are), "f16", or blocks: "q8_0", "q4_0", or "q6_k" to "q2_k",
    whose scales are searched for (kquants.py). It applies to the matrices of attention and FFN;
    those whose rows are no whole blocks become what `notes` say; norms and biases become f32,
    routers stay as they are, vocabulary tables become f16 or q8_0. With `neurons` FFNs are taken
    apart, so that neurons that rest are neither read nor multiplied: with ReLU of themselves, else
    below thresholds that are to be calibrated.
    `progress(done_bytes, total_bytes)` is called as it goes. Everything that can be checked is
    checked before the first byte is written, and a conversion that fails or is interrupted leaves
    nothing behind. Raises ValueError for a bad argument, CheckpointError, UnsupportedError and
    StoreError.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    if dtype not in CONVERSIONS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(CONVERSIONS)}")
    check_page_size(page_size)
    check_target(target, force)
    _check_apart(source, target)
    with open_checkpoint(source) as checkpoint:
        description = describe(checkpoint.config, checkpoint.generation)
        plan = bundler.plan(description, checkpoint.tensors, dtype, neurons)
        tokenizer_of(checkpoint)
        _check_space(target, plan.payload_bytes)
        with StoreWriter(target, page_size, force) as writer:
            bundler.write(plan, writer, progress)
            size = writer.finish(
                plan.spec,
                checkpoint.tokenizer_json,
                chat_template=checkpoint.chat_template,
                generation=checkpoint.generation,
                tokenizer_config=checkpoint.tokenizer_config,
                provenance=_provenance(checkpoint, plan),
                recipe={"dtype": dtype, "page_size": page_size, "edgemem": __version__},
            )
        return ConversionReport(
            source=str(source),
            target=str(target),
            model_type=plan.spec.model_type,
            dtype=dtype,
            parameters=plan.parameters,
            tensors=len(checkpoint.tensors),
            bundles=len(plan.bundles),
            source_bytes=plan.source_bytes,
            store_bytes=size,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_bytes(),
            notes=(*description.notes, *plan.notes, *_neuron_notes(plan.spec)),
        )


def _neuron_notes(spec: ModelSpec) -> list[str]:
    if not spec.neurons or spec.rests:
        return []
    return [
        f"with {spec.activation} no neuron rests of itself, so that a store made without --neurons "
        "is faster, unless thresholds let most of them rest (edgemem calibrate --cost, --sparse)"
    ]


def _check_apart(source: Path, target: Path) -> None:
    """What `force` replaces may be anything but what is converted."""
    if not (source.exists() and target.is_file()):
        return
    if source.is_dir():
        with target.open("rb") as file:
            is_store = file.read(len(MAGIC)) == MAGIC
        apart = is_store or not os.path.samefile(source, target.parent)
    else:
        apart = not os.path.samefile(source, target)
    if not apart:
        raise StoreError(
            f"writing {target}: it belongs to the checkpoint that is converted; choose another name"
        )


def tokenizer_of(checkpoint: Checkpoint | GgufCheckpoint) -> Tokenizer:
    """Raises UnsupportedError for what the tokenizers library does not understand."""
    try:
        return Tokenizer(checkpoint.tokenizer_json, checkpoint.tokenizer_config)
    except UnsupportedError as error:
        file = checkpoint.path / "tokenizer.json"
        raise UnsupportedError(f"reading {file}: {error.__cause__ or error}") from None


def _check_space(target: Path, needed_bytes: int) -> None:
    """Refuse what cannot fit before writing gigabytes of it; the writer meets other full disks."""
    try:
        disk = shutil.disk_usage(target.parent)
    except OSError:
        return
    if needed_bytes > disk.free and disk.total > 0:  # /proc and its like have no size
        raise StoreError(
            f"writing {target}: it needs {needed_bytes:,} bytes, the disk has {disk.free:,} free; "
            "free some space, choose another disk, or a smaller --dtype"
        )


def _provenance(checkpoint: Checkpoint | GgufCheckpoint, plan: bundler.Plan) -> dict:
    types = Counter(tensor.type_name for tensor in checkpoint.tensors.values())
    return {
        "checkpoint": checkpoint.path.resolve().name,
        "tensors": dict(types),
        "parameters": plan.parameters,
        "config_sha256": hashlib.sha256(checkpoint.config_bytes).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(checkpoint.tokenizer_json).hexdigest(),
    }
