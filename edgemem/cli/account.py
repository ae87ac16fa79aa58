"""What a run reports of itself: an object for programs, a line for people."""

from __future__ import annotations

from ..budget import peak_bytes, show_size
from ..engine import Engine
from ..generation import Generation

STREAMING_FACTS = ("hit_rate", "read_bytes_per_token", "stall_share", "device_share")


def account(engine: Engine, generation: Generation) -> dict:
    """What happened, in numbers."""
    phases = {"prefill": generation.prefill, "decode": generation.decode}
    streamed = streaming(engine)
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
                **streamed.get(name, {}),
            }
            for name, phase in phases.items()
        },
        "peak_rss_bytes": peak_bytes(),
        "kv": engine.kv,
        "predict": engine.predict,
        "sparse": engine.sparse,
        "threads": engine.threads,
        "isa": engine.isa,
    }


def streaming(engine: Engine) -> dict[str, dict]:
    """What streaming did in each phase so far; nothing of a phase in which nothing streamed."""
    phases = engine.trace.summary().items()
    return {
        name: {fact: phase[fact] for fact in STREAMING_FACTS}
        for name, phase in phases
        if phase["hit_rate"] is not None
    }


def account_line(engine: Engine, generation: Generation) -> str:
    """What happened, in a line."""
    decode, prefill = generation.decode, generation.prefill
    parts = [
        f"{len(generation.token_ids)} tokens at {decode.tokens_per_second:.1f} tok/s",
        f"prompt of {generation.prompt_tokens} at {prefill.tokens_per_second:.1f} tok/s",
        f"ended by {generation.finish_reason}",
        *_streaming_words(streaming(engine).get("decode")),
        f"peak memory {show_size(peak_bytes())}",
    ]
    return "edgemem: " + " · ".join(parts)


def _streaming_words(decode: dict | None) -> list[str]:
    if decode is None:
        return []
    return [
        f"{show_size(decode['read_bytes_per_token'])} read per token",
        f"{decode['hit_rate']:.0%} hits",
        f"{decode['stall_share']:.0%} stalled",
    ]
