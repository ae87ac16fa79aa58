"""The law on a large model: `python -m bench.law STORE --memory 3GiB --memory 4GiB [-p P] [-n N]`.

Each budget runs in a process of its own, in several ways (policy, lookahead, I/O engine, threads,
prefill chunk): P random tokens at once, N one by one. The bytes of all logits must be the same.
"""

import argparse
import hashlib
import json
import subprocess
import sys

import numpy as np

import edgemem
from edgemem.policies import DEFAULT

WAYS = (
    {},
    {"lookahead": False, "io_engine": "threads"},
    {"policy": "lru", "threads": 1},
    {"policy": "lfu", "chunk": 7},
)
"""Options of `edgemem.load`, and `chunk`: the tokens of a prefill step."""


def digest(store: str, memory: str, prompt: int, generated: int, chunk: int | None, **way) -> str:
    """Of the logits after the prompt and after each token that follows."""
    with edgemem.load(store, memory, prompt + generated, **way) as engine:
        if chunk:
            engine.chunk_tokens = chunk
        ids = np.random.default_rng(0).integers(2, engine.spec.vocab_size, prompt + generated)
        found = hashlib.sha256()
        with engine.session() as session:
            found.update(session.feed(ids[:prompt]).tobytes())
            for i in range(prompt, len(ids)):
                found.update(session.feed(ids[i : i + 1]).tobytes())
        return found.hexdigest()


def child(job: dict) -> str:
    """`digest` in a process of its own: memory is counted by process."""
    argv = [sys.executable, "-m", "bench.law", "--job", json.dumps(job)]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("store", nargs="?")
    parser.add_argument("--memory", action="append", default=[], metavar="SIZE", help="repeatable")
    parser.add_argument("-p", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("-n", type=int, default=16, help="tokens after it")
    parser.add_argument("--predict", action="store_true", help="foretell neurons")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(digest(**json.loads(args.job)))
        return
    if args.store is None:
        parser.error("give a store")
    found = set()
    for memory in args.memory or ["auto"]:
        for way in WAYS:
            job = {"store": args.store, "memory": memory, "prompt": args.p, "generated": args.n}
            job["predict"] = args.predict
            answer = child(job | {"chunk": None} | way)
            found.add(answer)
            print(f"| {memory} | { ({'policy': DEFAULT} | way) } | {answer[:16]} |", flush=True)
    print("one answer" if len(found) == 1 else f"{len(found)} DIFFERENT ANSWERS")
    sys.exit(len(found) != 1)


if __name__ == "__main__":
    main()
