"""DeepSeek-V3: DeepSeek-V2 with experts chosen in groups by biased sigmoids."""

from dataclasses import replace

from .deepseek_v2 import ABSENT, experts, latent_config, latent_spec
from .deepseek_v2 import GGUF as GGUF
from .deepseek_v2 import biases as biases
from .deepseek_v2 import gguf_facts as gguf_facts
from .deepseek_v2 import gguf_keys as gguf_keys
from .deepseek_v2 import gguf_tensors as gguf_tensors
from .deepseek_v2 import tensors as tensors

ARCHITECTURE = "DeepseekV3ForCausalLM"


def spec(draw, vocab_size: int):
    plain = latent_spec(draw, "deepseek_v3", vocab_size)
    sizes = draw.one(((4, 0, 0), (5, 0, 0), (8, 2, 1), (8, 4, 2), (9, 3, 2), (12, 3, 3)))
    return replace(
        plain, **experts(draw, *sizes), scoring="sigmoid", router_bias=True,
        normalize_top_k=draw.maybe(0.6),
    )  # fmt: skip


def config(draw, spec, biases: dict):
    more = {
        "n_group": spec.n_groups or 1, "topk_group": spec.top_groups or 1,
        "norm_topk_prob": spec.normalize_top_k, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "rope_interleave": True,
    }  # fmt: skip
    absent = ABSENT | {
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "rope_interleave": True,
    }  # fmt: skip
    return latent_config(draw, spec, biases, ARCHITECTURE, more, absent)
