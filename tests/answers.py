"""What a store answers, as a digest, to compare across processes, instruction sets and threads.

    EDGEMEM_ISA=scalar python tests/answers.py KV STORE...

prints a JSON list of [store, ISA, threads, chunk, digest], with a KV cache of that type. The digest
covers the bytes of the logits of every prompt position and the tokens generated after it.
"""

import hashlib
import json
import sys
from unittest import mock

import edgemem
import edgemem.needs
from edgemem.arguments import context_limit
from edgemem.store import Store

WAYS = ((1, 128), (1, 1), (2, 7), (3, 128))
"""(threads, tokens that a prefill step takes)"""
PROMPT_TOKENS, NEW_TOKENS = 61, 10
CONTEXT = PROMPT_TOKENS + NEW_TOKENS
"""More than attention takes at once."""


def prompt(engine, which: int = 0) -> list[int]:
    """Ids all over the vocabulary, others for another `which`; fewer where the context is short."""
    n, vocab_size = engine.context - NEW_TOKENS, engine.spec.vocab_size
    return [(7919 * i + 104729 * which + 11) % vocab_size for i in range(min(n, PROMPT_TOKENS))]


def opened(store, threads: int, chunk: int, kv: str = "f16"):
    """An engine of the store whose prefill takes `chunk` tokens a step."""
    patch = mock.patch.multiple(edgemem.needs, CHUNK_TOKENS=chunk, LARGE_CHUNK_TOKENS=chunk)
    with Store.open(store) as opened_store:
        context = min(CONTEXT, context_limit(opened_store.spec))
    with patch:
        return edgemem.load(store, context=context, threads=threads, kv=kv)


def greedy(session, ids, count: int = NEW_TOKENS) -> list[int]:
    """The likeliest tokens after ids, EOS or not."""
    out, logits = [], session.feed(ids)
    while True:
        out.append(int(logits.argmax()))
        if len(out) == count:
            return out
        logits = session.feed(out[-1:])


def digest(engine) -> str:
    """Of the prompt's logits, all of them, and the tokens that follow."""
    ids = prompt(engine)
    state = hashlib.sha256(engine.logits(ids).tobytes())
    with engine.session() as session:
        state.update(repr(greedy(session, ids)).encode())
    return state.hexdigest()


def main(kv: str, *stores: str) -> None:
    """Print one record for each store and way."""
    records = []
    for store in stores:
        for threads, chunk in WAYS:
            with opened(store, threads, chunk, kv) as engine:
                records.append([store, engine.isa, threads, chunk, digest(engine)])
    print(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
