"""Random model specs, and the ways in which a checkpoint's config.json may spell them.

The spec is drawn first and is the truth; `spell` writes it down as transformers 4 or 5 would,
leaves out what has a default, and picks among equal names. A converter that reads the spelling
back must find the spec again.
"""

import math
from dataclasses import replace

import numpy as np

from edgemem.spec import ModelSpec, RopeSpec

DENSE_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROUTED_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
ROPE_TYPES = DENSE_TYPES + ROUTED_TYPES
"""Gated, with RMSNorm and rotary positions; GGUF files may hold them."""
UNGATED_TYPES = ("opt", "falcon")
MODEL_TYPES = ROPE_TYPES + UNGATED_TYPES

_ARCHITECTURES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
}  # fmt: skip
_HAS_HEAD_DIM = ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe")
"""Types whose configuration class knows `head_dim`; olmoe cannot have one of its own."""
ACTIVATION_NAMES = {
    "silu": ("silu", "swish"), "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_quick": ("quick_gelu",),
    "relu": ("relu",), "relu2": ("relu2",),
}  # fmt: skip
_DEFAULTS = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "norm_topk_prob": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "qkv_bias": True, "clip_qkv": None, "rope_scaling": None,
}  # fmt: skip
"""Values that a config may leave out: the defaults of the classes that know the key."""


class Draw:
    """Words for a seeded generator: `draw.one(...)`, `draw.maybe(0.3)`, `draw.whole(1, 4)`."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def one(self, options):
        """One of the options, each as likely."""
        return options[int(self.rng.integers(len(options)))]

    def maybe(self, chance: float) -> bool:
        """True with this chance."""
        return bool(self.rng.random() < chance)

    def whole(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def real(self, low: float, high: float) -> float:
        """A number with few digits, so that it survives JSON as it is."""
        return round(float(self.rng.uniform(low, high)), 3)


def draw_spec(draw: Draw, model_type: str, vocab_size: int) -> ModelSpec:
    """A random spec that `model_type` can express."""
    if model_type in UNGATED_TYPES:
        return _draw_ungated(draw, model_type, vocab_size)
    n_layers = draw.whole(1, 4)
    kv_heads = draw.whole(1, 3)
    heads = kv_heads * draw.whole(1, 4)
    head_dim = draw.one((4, 6, 8, 10, 16, 18, 32))
    while heads * head_dim < 24:  # so small, one weight's rounding shows in every logit
        heads += kv_heads
    hidden = heads * head_dim
    if model_type in _HAS_HEAD_DIM and draw.maybe(0.6):
        hidden = heads * draw.whole(1 + 16 // heads, 1 + 96 // heads)
    max_positions = draw.one((64, 100, 512))
    rope = draw_rope(draw, model_type, max_positions)
    if rope.type == "dynamic":  # a sequence of `tiny.IDS_COUNT` grows past max_positions
        max_positions, factor = draw.one(((8, 8.0), (12, 4.0), (17, 2.5), (24, 1.5)))
        rope = replace(rope, factor=factor)
    routed = _draw_routed(draw, model_type, n_layers)
    moe = _draw_experts(draw, model_type) if any(routed) else {}
    plain = model_type in ("mixtral", "olmoe")
    return ModelSpec(
        model_type=model_type,
        n_layers=n_layers,
        hidden=hidden,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        intermediate=moe["expert_intermediate"] if plain else draw.whole(20, 140),
        activation="silu" if draw.maybe(0.4) else draw.one(tuple(ACTIVATION_NAMES)),
        norm_eps=draw.one((1e-5, 1e-6, 1e-8, 1e-3)),
        rope=rope,
        windows=_draw_windows(draw, model_type, n_layers),
        max_positions=max_positions,
        tied=draw.maybe(0.4),
        routed=routed,
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(model_type, "none"),
        clip_qkv=draw.real(0.8, 2.5) if model_type == "olmoe" and draw.maybe(0.5) else 0.0,
        bos_id=draw.one((None, 0, 1)),
        eos_ids=draw.one(((), (1,), (0, 1))),
        **moe,
    )


def _draw_ungated(draw: Draw, model_type: str, vocab_size: int) -> ModelSpec:
    n_layers, head_dim = draw.whole(3, 5), draw.one((4, 6, 16, 18, 32))
    heads = max(draw.whole(2, 6), -(-24 // head_dim))
    plain = ModelSpec(
        model_type=model_type,
        n_layers=n_layers,
        hidden=heads * head_dim,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        intermediate=draw.whole(20, 140),
        activation="relu" if draw.maybe(0.5) else draw.one(tuple(ACTIVATION_NAMES)),
        norm_eps=1e-5,
        rope=RopeSpec(),
        windows=(0,) * n_layers,
        max_positions=draw.one((64, 100, 512)),
        tied=draw.maybe(0.6),
        routed=(False,) * n_layers,
        bos_id=draw.one((None, 0, 1)),
        eos_ids=draw.one(((), (1,), (0, 1))),
        norm="layer",
        gated=False,
    )
    if model_type == "opt":
        return replace(plain, positions="learned")
    kv_heads, parallel = draw.one((1, heads)), draw.maybe(0.8)
    shared = parallel and draw.maybe(0.6)
    if parallel:
        kv_heads = draw.one([n for n in range(1, heads + 1) if heads % n == 0])
    return replace(
        plain, n_kv_heads=kv_heads, parallel=parallel, shared_norm=shared,
        rope=RopeSpec(theta=draw.one((100.0, 10000.0, 500000.0))),
        norm_eps=draw.one((1e-5, 1e-6, 1e-3)),
    )  # fmt: skip


def draw_rope(draw: Draw, model_type: str, max_positions: int) -> RopeSpec:
    kind = draw.one(("default", "linear", "dynamic", "llama3", "yarn"))
    theta = draw.one((100.0, 10000.0, 500000.0, 1000000.0))
    factor = draw.one((1.0, 1.5, 2.0, 4.0, 8.0))
    original = draw.one((16, 32, 48, max_positions))
    if kind in ("linear", "dynamic"):
        return RopeSpec(kind, theta, factor)
    if kind == "llama3":
        low = draw.one((1.0, 0.5))
        high = low + draw.real(0.5, 4.0)
        return RopeSpec(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return RopeSpec(
            kind, theta, factor, original, beta_fast=draw.one((32.0, 8.0, 4.5)),
            beta_slow=draw.one((1.0, 0.5, 2.0)), truncate=draw.maybe(0.7),
        )  # fmt: skip
    return RopeSpec(theta=theta)


def _draw_routed(draw: Draw, model_type: str, n_layers: int) -> tuple[bool, ...]:
    if model_type in DENSE_TYPES:
        return (False,) * n_layers
    if model_type in ("mixtral", "olmoe") or draw.maybe(0.4):
        return (True,) * n_layers
    step = draw.one((1, 2))
    off = {draw.whole(0, n_layers - 1)} if draw.maybe(0.5) else set()
    routed = tuple((i + 1) % step == 0 and i not in off for i in range(n_layers))
    return routed if any(routed) else (True,) * n_layers


def _draw_experts(draw: Draw, model_type: str) -> dict:
    n_experts = draw.one((2, 3, 4, 8, 12, 17))
    shared = model_type == "qwen2_moe"
    return {
        "n_experts": n_experts,
        "top_k": draw.whole(1, min(n_experts, 4)),
        "expert_intermediate": draw.whole(8, 70),
        "shared_intermediate": draw.whole(8, 70) if shared else 0,
        "normalize_top_k": model_type == "mixtral" or draw.maybe(0.5),
    }


def _draw_windows(draw: Draw, model_type: str, n_layers: int) -> tuple[int, ...]:
    window = draw.one((1, 3, 8, 16, 23))
    if model_type in ("llama", "olmoe") or draw.maybe(0.4):
        return (0,) * n_layers
    if model_type in ("qwen2", "qwen3", "qwen2_moe"):
        return tuple(window * draw.maybe(0.5) for _ in range(n_layers))
    return (window,) * n_layers


# ---- spelling ----------------------------------------------------------------------------------


def spell(draw: Draw, spec: ModelSpec, biases: dict[str, bool]) -> tuple[dict, ModelSpec]:
    """One config.json for `spec`, and the spec with what the spelling settles (yarn's scale).

    `biases` says which of "qkv", "o", "mlp" there are; it comes from `draw_biases`.
    """
    ends = spell_ends(spec)
    if spec.model_type == "opt":
        return _spell_opt(draw, spec, biases["o"]) | ends, spec.rope
    if spec.model_type == "falcon":
        return _spell_falcon(draw, spec) | ends, spec.rope
    rope_keys, rope = spell_rope(draw, spec)
    config = {
        "architectures": [_ARCHITECTURES[spec.model_type] + "ForCausalLM"],
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "hidden_act": draw.one(ACTIVATION_NAMES[spec.activation]),
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        **ends,
        **rope_keys,
        **_spell_heads(draw, spec),
        **_spell_biases(spec.model_type, biases),
        **_spell_windows(draw, spec),
        **(_spell_experts(draw, spec) if any(spec.routed) else {}),
    }
    for key, default in _DEFAULTS.items():
        if key in config and config[key] == default and draw.maybe(0.4):
            del config[key]
    return config, rope


def spell_ends(spec: ModelSpec) -> dict:
    """The special tokens' keys."""
    eos = list(spec.eos_ids)
    return {
        "bos_token_id": spec.bos_id,
        "eos_token_id": eos if len(eos) > 1 else (eos or [None])[0],
        "pad_token_id": None,
    }


def _spell_opt(draw: Draw, spec: ModelSpec, biases: bool) -> dict:
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "ffn_dim": spec.intermediate,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "activation_function": draw.one(ACTIVATION_NAMES[spec.activation]),
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied,
        "enable_bias": biases,
        "word_embed_proj_dim": spec.hidden,
    }
    absent = {"tie_word_embeddings": True, "enable_bias": True, "activation_function": "relu",
              "word_embed_proj_dim": spec.hidden}  # fmt: skip
    for key, default in absent.items():
        if config[key] == default and draw.maybe(0.4):
            del config[key]
    return config


def _spell_falcon(draw: Draw, spec: ModelSpec) -> dict:
    """The same layers may be of the old decoder architecture or of the new one."""
    heads, kv_heads = spec.n_heads, spec.n_kv_heads
    old = not spec.parallel or (spec.shared_norm and kv_heads in (1, heads) and draw.maybe(0.7))
    theta = {"rope_theta": spec.rope.theta}
    config = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.intermediate,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": heads,
        "activation": draw.one(ACTIVATION_NAMES[spec.activation]),
        "max_position_embeddings": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "alibi": False,
        "bias": False,
        "new_decoder_architecture": not old,
        "parallel_attn": spec.parallel,
        **draw.one((theta, {"rope_parameters": {"rope_type": "default", **theta}})),
    }
    if old:
        config["multi_query"] = kv_heads == 1
    else:
        config["num_kv_heads"] = kv_heads
        if spec.shared_norm or draw.maybe(0.5):
            config["num_ln_in_parallel_attn"] = 1 if spec.shared_norm else 2
    absent = {"alibi": False, "bias": False, "parallel_attn": True, "multi_query": True}
    for key, default in absent.items():
        if config.get(key) == default and draw.maybe(0.4):
            del config[key]
    return config


def draw_biases(draw: Draw, model_type: str) -> dict[str, bool]:
    """Which projections have a bias, among the combinations that the type allows."""
    some, mlp = draw.maybe(0.5), draw.maybe(0.5)
    if model_type in ("mistral", "mixtral"):
        return {"qkv": False, "o": False, "mlp": False}
    if model_type in ("qwen2", "qwen2_moe"):
        return {"qkv": model_type == "qwen2" or some, "o": False, "mlp": False}
    if model_type in UNGATED_TYPES:
        some = some and model_type == "opt"
        return {"qkv": some, "o": some, "mlp": some}
    return {"qkv": some, "o": some, "mlp": mlp and model_type == "llama"}


def _spell_biases(model_type: str, biases: dict[str, bool]) -> dict:
    keys = {}
    if model_type in ("llama", "qwen3", "olmoe", "qwen3_moe"):
        keys["attention_bias"] = biases["qkv"]
    if model_type == "llama":
        keys["mlp_bias"] = biases["mlp"]
    if model_type == "qwen2_moe":
        keys["qkv_bias"] = biases["qkv"]
    return keys


def _spell_heads(draw: Draw, spec: ModelSpec) -> dict:
    """head_dim: always said for qwen3 (default 128); elsewhere not if the hidden size tells."""
    told = spec.hidden == spec.n_heads * spec.head_dim
    rare = spec.model_type in ("qwen2", "qwen2_moe")
    if spec.model_type == "olmoe" or (rare and draw.maybe(0.7)):
        return {}
    # transformers cannot scale mixtral's rope without a head size of its own
    needed = spec.model_type in ("qwen3", "qwen3_moe") or spec.rope.type in ("dynamic", "yarn")
    if told and not needed and draw.maybe(0.5):
        null = spec.model_type in ("llama", "mistral", "mixtral") and draw.maybe(0.5)
        return {"head_dim": None} if null else {}
    return {"head_dim": spec.head_dim}


def _spell_windows(draw: Draw, spec: ModelSpec) -> dict:
    window, kind = max(spec.windows), spec.model_type
    if kind in ("llama", "olmoe"):
        return {}
    if kind == "mistral":  # its default is a window of 4096, so none must be said
        return {"sliding_window": window or None}
    if kind == "mixtral":
        return {"sliding_window": window} if window else {}
    keys = {"use_sliding_window": bool(window), "sliding_window": window or draw.one((4096, 3))}
    if kind == "qwen3_moe":
        return keys
    rule = (lambda i, m: i % 2 == 0 and i < m) if kind == "qwen2_moe" else (lambda i, m: i >= m)
    layers = range(spec.n_layers)
    fits = [m for m in range(spec.n_layers + 1)
            if spec.windows == tuple(window * rule(i, m) for i in layers)]  # fmt: skip
    if not window:
        return keys | {"max_window_layers": draw.one((0, 28))}
    if fits and draw.maybe(0.6):
        return keys | {"max_window_layers": draw.one(fits)}
    names = {False: "full_attention", True: "sliding_attention"}
    return keys | {"layer_types": [names[bool(w)] for w in spec.windows]}


def _spell_experts(draw: Draw, spec: ModelSpec) -> dict:
    kind = spec.model_type
    keys = {
        "num_local_experts" if kind == "mixtral" else "num_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
    }
    if kind != "mixtral":
        keys["norm_topk_prob"] = spec.normalize_top_k
    if kind == "olmoe" and (spec.clip_qkv or draw.maybe(0.5)):
        keys["clip_qkv"] = spec.clip_qkv or None
    if kind in ("qwen2_moe", "qwen3_moe"):
        keys["moe_intermediate_size"] = spec.expert_intermediate
        alternate = draw.maybe(0.5) and not any(spec.routed[0::2])
        keys["decoder_sparse_step"] = 2 if alternate else 1
        due = (lambda i: i % 2 == 1) if alternate else (lambda i: True)
        keys["mlp_only_layers"] = [i for i, on in enumerate(spec.routed) if due(i) and not on]
    if kind == "qwen2_moe":
        keys["shared_expert_intermediate_size"] = spec.shared_intermediate
    return keys


def spell_rope(draw: Draw, spec: ModelSpec) -> tuple[dict, RopeSpec]:
    rope, outer = spec.rope, {}
    inner = {} if rope.type == "default" else {"factor": rope.factor}
    if rope.type in ("llama3", "yarn"):
        if rope.original_positions == spec.max_positions and draw.maybe(0.5):
            pass  # the default
        elif draw.maybe(0.1):
            outer["original_max_position_embeddings"] = rope.original_positions
        else:
            inner["original_max_position_embeddings"] = rope.original_positions
    if rope.type == "llama3":
        inner |= {name: getattr(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if rope.type == "yarn":
        options, rope = _spell_yarn(draw, spec)
        inner |= options
    default_theta = {"mixtral": 1e6, "gpt_oss": 150000.0}.get(spec.model_type, 1e4)
    say_theta = rope.theta != default_theta or draw.maybe(0.7)
    if draw.maybe(0.5):  # as transformers 4 has it
        outer |= {"rope_theta": rope.theta} if say_theta else {}
        kind = {draw.one(("type", "rope_type")): rope.type}
        return outer | {"rope_scaling": inner and kind | inner or None}, rope
    inner = {"rope_type": rope.type} | inner
    if say_theta:
        (outer if draw.maybe(0.1) else inner)["rope_theta"] = rope.theta
    return outer | {"rope_parameters": inner}, rope


def _spell_yarn(draw: Draw, spec: ModelSpec) -> tuple[dict, RopeSpec]:
    """Yarn's options, and the attention factor that follows from them."""
    rope, options = spec.rope, {}
    factor = rope.factor
    if spec.max_positions % rope.original_positions == 0 and draw.maybe(0.2):
        factor = spec.max_positions / rope.original_positions
        options["factor"] = None  # means just that ratio
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = getattr(rope, name)
        if value != default or draw.maybe(0.5):
            options[name] = int(value) if value == int(value) and draw.maybe(0.5) else value
        elif draw.maybe(0.3):
            options[name] = None
    if not rope.truncate or draw.maybe(0.3):
        options["truncate"] = rope.truncate

    def scale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    how, attention = draw.one(("plain", "given", "both", "one")), scale()
    if how == "given":
        attention = options["attention_factor"] = draw.real(0.8, 1.4)
    elif how == "both":
        options |= {"mscale": draw.one((0.707, 1.0, 1.3)), "mscale_all_dim": draw.one((0.707, 1.0))}
        attention = scale(options["mscale"]) / scale(options["mscale_all_dim"])
    elif how == "one":  # counts for nothing without the other
        options["mscale"] = 0.707
    values = rope.__dict__ | {"factor": float(factor), "attention_factor": attention}
    return options, RopeSpec(**values)
