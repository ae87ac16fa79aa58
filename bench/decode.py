"""Decode speed with weights resident, as a share of a plain read of the same bytes.

`python -m bench.decode STORE... [--tokens N] [--runs N] [--threads N] [--isa NAME]`
"""

import argparse
import os

import numpy as np


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each run")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of prefill in each run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", help="force an instruction set")
    return parser.parse_args()


def measure(path: str, args: argparse.Namespace) -> None:
    import edgemem
    from bench.harness import rates
    from edgemem.rates import resident_weights
    from edgemem.sequence import TokenSequence

    with edgemem.load(path, context=512, threads=args.threads) as engine:
        start, size = resident_weights(engine)
        # Fixed random tokens: greedy text of random weights falls into a loop.
        ids = np.random.default_rng(0).integers(2, engine.spec.vocab_size, 512).astype(np.int32)

        def read() -> int:
            engine._core.read_bytes(start, size)
            return size

        def decode() -> int:
            sequence = TokenSequence(engine)
            for id in ids[: args.tokens].tolist():
                sequence.append(id)
                sequence.logits()
            sequence.close()
            return args.tokens

        def prefill() -> int:
            with engine.session() as session:
                session.feed(ids[: args.prompt])
            return args.prompt

        found = rates({"read": read, "decode": decode, "prefill": prefill}, args.runs)
        weights = engine.trace.summary()["decode"]["demand_bytes_per_token"]
        rate, ceiling = found["decode"].median * weights, found["read"].median
        print(
            f"{os.path.basename(path)}: {weights / 1e9:.3f} GB a token, {engine.threads} threads, "
            f"{engine.isa}: decode {found['decode']:.2f} tok/s = {rate / 1e9:.2f} GB/s of weights; "
            f"plain read {ceiling / 1e9:.2f} GB/s ({found['read'].low / 1e9:.2f}–"
            f"{found['read'].high / 1e9:.2f}); {100 * rate / ceiling:.0f} %; "
            f"prefill of {args.prompt} {found['prefill']:.1f} tok/s"
        )


def main() -> None:
    args = parse()
    if args.isa:
        os.environ["EDGEMEM_ISA"] = args.isa
    from bench.harness import fingerprint

    print(f"# {fingerprint()}; medians of {args.runs} (least–most)")
    for path in args.stores:
        measure(path, args)


if __name__ == "__main__":
    main()
