"""Checkpoints of real shapes with random weights that behave: `python -m bench.synth SHAPE TARGET`.

The target's name says which form is written: `*.edgemem` a store, `*.gguf` a GGUF file, anything
else a Hugging Face folder. All forms of one shape, seed and dtype hold the same values (a folder
has bf16 or f16 only; opt, phimoe and glm4_moe have no GGUF file; falcon, gemma2, deepseek and
gpt-oss, whose experts are in MXFP4, come as stores alone). Nothing is held but a few tiles, so size
is bounded by the disk alone.
"""

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.shapes import SHAPES, config_of
from bench.synth_checkpoint import write_folder, write_gguf
from bench.synth_tokenizer import tokenizer_json
from bench.weights import WEIGHTS, Weights, ahead
from edgemem.converters.configuration import describe
from edgemem.converters.neurons import checksums
from edgemem.errors import EdgeMemError
from edgemem.format import Kind
from edgemem.writer import StoreWriter


def write_store(
    config: dict, target: Path, dtype: str, seed: int = 0, force: bool = False,
    neurons: bool = False,
) -> int:  # fmt: skip
    """Write a store straight away, without a checkpoint; returns its size in bytes. With `neurons`
    FFNs are taken apart, and what down holds is drawn anew."""
    weights = Weights(describe(config, {}), seed, dtype, neurons)
    tiles = (
        tile
        for kind, layer, index, layout in weights.bundles()
        for segment in layout.segments
        for tile in weights.tiles(kind, layer, index, segment)
    )
    with StoreWriter(target, force=force) as writer, closing(ahead(tiles, weights.draw)) as drawn:
        for kind, layer, index, layout in weights.bundles():
            with writer.bundle(kind, layer, index, layout) as out:
                sums = []
                for segment in layout.segments:
                    out.begin(segment.name)
                    for _ in weights.tiles(kind, layer, index, segment):
                        data = next(drawn)
                        out.write(data)
                        if kind == Kind.NEURONS:
                            sums.append(checksums(data))
                    if segment.name == "checksums":
                        out.write(np.concatenate(sums))
        return writer.finish(
            weights.spec, tokenizer_json(), recipe={"dtype": dtype, "synthetic": True, "seed": seed}
        )


def write(
    config: dict, target: Path, dtype: str, seed: int = 0, force: bool = False,
    neurons: bool = False,
) -> int:  # fmt: skip
    """Write the form that the target's name asks for; returns its size in bytes."""
    if target.suffix == ".edgemem":
        return write_store(config, target, dtype, seed, force, neurons)
    if neurons:
        raise ValueError("only stores have neurons: let the target's name end in .edgemem")
    if target.suffix == ".gguf":
        return write_gguf(config, target, dtype, seed, force)
    return write_folder(config, target, dtype, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=WEIGHTS, help="default: q4_0; of a folder: bf16")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neurons", action="store_true", help="take FFNs apart (opt, falcon)")
    parser.add_argument("--force", action="store_true", help="replace the target")
    args = parser.parse_args()
    dtype = args.dtype or ("q4_0" if args.target.suffix in (".edgemem", ".gguf") else "bf16")
    started = time.perf_counter()
    try:
        config = config_of(args.shape, args.layers)
        size = write(config, args.target, dtype, args.seed, args.force, args.neurons)
    except (ValueError, OSError, EdgeMemError) as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - started
    print(f"{args.target}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
