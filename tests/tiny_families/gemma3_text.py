"""Gemma 3: Gemma 2 with norms of queries and keys, no caps of scores, and two ropes."""

from dataclasses import replace

from tiny_config import spell_rope

from edgemem.spec import RopeSpec

from . import gemma2
from .drawing import gguf_rope, with_rope

ARCHITECTURE = "Gemma3ForCausalLM"
GGUF = "gemma3"


def spec(draw, vocab_size: int):
    plain, step = gemma2.shape(draw, "gemma3_text", vocab_size), draw.one((1, 2, 3))
    layers, window = draw.whole(1, 4), draw.one((1, 3, 8, 16, 4096))
    local = RopeSpec(theta=draw.one((100.0, 10000.0)))
    plain = replace(
        plain, qk_norm="head", n_layers=layers, routed=(False,) * layers,
        windows=tuple(window * bool((i + 1) % step) for i in range(layers)),
        logit_cap=draw.one((0.0, 0.0, 30.0, draw.real(6.0, 15.0))),
    )  # fmt: skip
    return replace(with_rope(draw, plain), local_rope=local)


biases = gemma2.biases


def config(draw, spec, biases: dict):
    rope, spelled = spell_rope(draw, spec)
    if "rope_parameters" in rope:  # transformers 5
        full = rope.pop("rope_parameters")
        full["rope_theta"] = spec.rope.theta
        if "original_max_position_embeddings" in rope:
            full["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        local = {"rope_type": "default", "rope_theta": spec.local_rope.theta}
        rope = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    else:
        inner = rope.get("rope_scaling")
        if "original_max_position_embeddings" in rope:
            inner["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        if inner and "type" in inner:  # which transformers does not read here
            inner["rope_type"] = inner.pop("type")
        rope |= {"rope_local_base_freq": spec.local_rope.theta, "rope_theta": spec.rope.theta}
    sliding = {} if spec.n_layers < 6 else {"sliding_window_pattern": 6}
    rule = [bool((i + 1) % 6) for i in range(spec.n_layers)]
    more = rope | sliding | gemma2.sliding(draw, spec, rule)
    return gemma2.common_config(draw, spec, biases, ARCHITECTURE, more), spelled


tensors, gguf_tensors = gemma2.tensors, gemma2.gguf_tensors


def gguf_facts(seed: int) -> dict:
    return gemma2.gguf_facts(seed) | {
        "n_layers": 7, "windows": (5,) * 5 + (0, 5), "routed": (False,) * 7,
        "rope": gguf_rope(seed if seed % 4 != 1 else 0), "local_rope": RopeSpec(),
    }  # fmt: skip


def gguf_keys(writer, spec) -> None:
    if spec.logit_cap:
        writer.add_final_logit_softcapping(spec.logit_cap)
