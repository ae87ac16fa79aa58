"""Whether a synthetic model routes like a real one: `python -m bench.routing STORE TRACE`.

Feeds as many random tokens to the model as the recorded trace has, notes which experts each layer
picks for each of them, and compares hit rates of LRU and Belady with those of the trace, at equal
shares of all experts. (Greedy text of random weights falls into a loop; random tokens do not.)
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import edgemem
from bench.replay_cache import Belady, hit_rate, simulate
from bench.replay_traces import Routing, of_tokens, read
from edgemem.kvcache import KvCache
from edgemem.models.decoder import Layer
from edgemem.policies import Lru

SHARES = (0.10, 0.25, 0.50)
WITHIN = 0.05


def record(store: str, n_tokens: int, seed: int = 0) -> Routing:
    """The routing of a store's model over random tokens, as if decoded one by one."""
    picked, run = [], Layer.run

    def noted(layer: Layer, kv: KvCache, n: int) -> None:
        run(layer, kv, n)
        if layer.experts is not None:
            work = layer.experts._work
            logits, k = work.scratch.routing.logits.array[:n], work.spec.top_k
            picked.append(np.argpartition(logits, -k, axis=1)[:, -k:].copy())

    with edgemem.load(store, context=max(64, n_tokens)) as engine, engine.session() as session:
        spec = engine.spec
        ids = np.random.default_rng(seed).integers(2, spec.vocab_size, n_tokens)
        Layer.run = noted
        try:
            session.feed(ids)
        finally:
            Layer.run = run
    n_layers = sum(spec.routed)
    chunks = [np.stack(picked[i : i + n_layers], 1) for i in range(0, len(picked), n_layers)]
    return of_tokens(Path(store).name, np.concatenate(chunks), spec.n_experts)


def hit_rates(routing: Routing) -> dict[tuple[str, float], float]:
    """Hit rates by policy and share of the experts, after the first third of the steps."""
    found = {}
    for share in SHARES:
        for policy in (Lru(routing.layer_of, routing.n_layers), Belady(routing)):
            hits = simulate(routing, policy, routing.slots_of(share))
            found[policy.name, share] = hit_rate(routing, hits, routing.n_steps // 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("store")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    args = parser.parse_args()
    trace = read(args.trace)
    real = hit_rates(trace)
    synthetic = hit_rates(record(args.store, trace.n_steps, args.seed))
    print(f"| policy | share | {trace.name} | {Path(args.store).name} | difference |")
    print("|---|---|---|---|---|")
    for (policy, share), rate in real.items():
        other = synthetic[policy, share]
        print(f"| {policy} | {share:.0%} | {rate:.3f} | {other:.3f} | {other - rate:+.3f} |")
    worst = max(abs(synthetic[key] - real[key]) for key in real)
    print(f"largest difference {worst:.3f}; {WITHIN} is allowed")
    sys.exit(worst > WITHIN)


if __name__ == "__main__":
    main()
