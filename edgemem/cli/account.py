"""What a run reports of itself: an object for programs, a line for people."""

from __future__ import annotations

from ..budget import peak_bytes, show_size
from ..engine import Engine
from ..generation import Generation


def account(engine: Engine, generation: Generation) -> dict:
    """What happened, in numbers."""
    phases = {"prefill": generation.prefill, "decode": generation.decode}
    return {
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        **{
            name: {
                "tokens": phase.tokens,
                "seconds": phase.seconds,
                "tokens_per_second": phase.tokens_per_second,
            }
            for name, phase in phases.items()
        },
        "peak_rss_bytes": peak_bytes(),
        "threads": engine.threads,
        "isa": engine.isa,
    }


def account_line(generation: Generation) -> str:
    """What happened, in a line."""
    decode, prefill = generation.decode, generation.prefill
    parts = [
        f"{len(generation.token_ids)} tokens at {decode.tokens_per_second:.1f} tok/s",
        f"prompt of {generation.prompt_tokens} at {prefill.tokens_per_second:.1f} tok/s",
        f"ended by {generation.finish_reason}",
        f"peak memory {show_size(peak_bytes())}",
    ]
    return "edgemem: " + " · ".join(parts)
