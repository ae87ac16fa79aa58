"""A Hugging Face config → ModelSpec, by the rules of transformers' own configuration classes.

Configs of transformers 4 (`rope_theta`, `rope_scaling` with "type" or "rope_type") and 5
(`rope_parameters`) are read alike. A key that is absent has the default of the model type's
configuration class; so has one that is null, unless null has a meaning of its own.
"""

from dataclasses import dataclass

from edgemem.errors import CheckpointError, CorruptError, UnsupportedError
from edgemem.spec import ModelSpec, RopeSpec

from .families import OWN
from .rope import finite, rope_of

_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_LLAMA = _COMMON | {
    "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_QWEN_MOE = _QWEN | {
    "hidden_size": 2048, "num_hidden_layers": 24, "decoder_sparse_step": 1, "norm_topk_prob": False,
}  # fmt: skip

DEFAULTS = {
    "llama": _LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "mixtral": _LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "olmoe": _COMMON | {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "eos_token_id": 50279, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen2_moe": _QWEN_MOE | {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "qkv_bias": True,
    },
    "qwen3_moe": _QWEN_MOE | {
        "intermediate_size": 6144, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    **{name: family.DEFAULTS for name, family in OWN.items()},
}  # fmt: skip
"""The defaults of each supported model type's configuration class, where they are not None."""

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "quick_gelu": "gelu_quick",
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
"""Names in transformers' ACT2FN → ours; the tanh forms of GELU differ only in rounding."""

_ALIASES = {"num_experts": "num_local_experts"}
_QKV = frozenset({"q_bias", "k_bias", "v_bias"})
_FFN = frozenset({"gate_bias", "up_bias", "down_bias"})


@dataclass(frozen=True)
class Description:
    """What a config says: the spec, and which biases the model has (names of segments).

    `notes` are lines for people, about what the config says and the spec does not.
    """

    spec: ModelSpec
    biases: frozenset[str]
    notes: tuple[str, ...] = ()


def describe(config: dict, generation: dict) -> Description:
    """Raises UnsupportedError for an unknown kind of model, CheckpointError for a bad value."""
    keys = _Keys(_model_type(config), config)
    _check_quantization(keys)
    try:
        spec = _spec(keys, generation)
        return Description(spec, _biases(keys), tuple(dict.fromkeys(keys.notes)))
    except CorruptError as error:
        said = str(error).removeprefix("model spec: ")
        raise CheckpointError(f"config.json: {said}; correct it, or fetch the file again") from None


def _model_type(config: dict) -> str:
    """The model type, which must be supported, and so must the architecture if one is named."""
    model_type, names = config.get("model_type"), config.get("architectures") or []
    wanted = {f"{t.replace('_', '')}forcausallm": t for t in DEFAULTS}
    wanted |= {m.ARCHITECTURE.lower(): t for t, m in OWN.items() if hasattr(m, "ARCHITECTURE")}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: architectures = {names!r:.80} is not a list of names")
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"config.json: model_type = {model_type!r:.80} is not a name")
    types = {wanted.get(name.lower()) for name in names}
    if model_type is None and len(types) == 1:
        model_type = next(iter(types))
    if model_type not in DEFAULTS or (names and model_type not in types):
        named = f"{model_type or 'no model_type'} ({', '.join(names) or 'no architectures'})"
        raise UnsupportedError(
            f"config.json: {ascii(named)[1:-1]:.200} is not supported; "
            f"supported are causal language models of type {', '.join(DEFAULTS)}"
        )
    return model_type


class _Keys:
    """Typed access to a config's keys; every fault is a CheckpointError that names the key."""

    def __init__(self, model_type: str, config: dict):
        self.model_type = model_type
        self.config = config
        self.notes: list[str] = []

    def get(self, key: str, types, what: str, default=None):
        if self.model_type in OWN:
            key = OWN[self.model_type].KEYS.get(key, key)
        value = self.config.get(key)
        if value is None and key in _ALIASES:
            value = self.config.get(_ALIASES[key])
        if value is None:
            value = DEFAULTS[self.model_type].get(key, default)
        if value is None:
            return None
        if type(value) not in types:
            raise CheckpointError(f"config.json: {key} = {value!r:.80} is not {what}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, (int,), "a whole number", default)
        if value is None or not 0 <= value < 1 << 31:
            raise CheckpointError(f"config.json: {key} = {value!r:.80} is out of range")
        return value

    def number(self, key: str, default: float) -> float:
        return finite(key, self.get(key, (int, float), "a number", default))

    def flag(self, key: str) -> bool:
        return self.get(key, (bool,), "true or false", False)

    def rope(self, head_dim: int | None = None) -> RopeSpec:
        """`head_dim` is given where a part of a head may be rotated, and longrope may be."""
        return rope_of(self, head_dim)

    def window(self) -> int:
        """The sliding window of layers that have one: 0 where neither the config nor a default says
        how long it is."""
        named = self.get("sliding_window", (int,), "a whole number")
        return 0 if named is None else _window(self)

    def sliding_layers(self) -> list[bool] | None:
        """Which layers slide, where the config lists their types."""
        return _layer_types(self, self.count("num_hidden_layers"))

    def kv_heads(self, heads: int) -> int:
        """Those of the config, which null leaves to be as many as there are heads."""
        return self.count("num_key_value_heads", heads)


def _check_quantization(keys: _Keys) -> None:
    """Some types are published in a form that can be taken over."""
    told = keys.config.get("quantization_config")
    method = told.get("quant_method") if isinstance(told, dict) else None
    if told is not None and method not in getattr(OWN.get(keys.model_type), "QUANTIZED", ()):
        raise UnsupportedError(
            "config.json: the weights are already quantised (quantization_config); "
            "convert from the original checkpoint in f32, f16 or bf16"
        )


def _spec(keys: _Keys, generation: dict) -> ModelSpec:
    n_layers, hidden, heads = (
        keys.count(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not 1 <= n_layers <= 1 << 16 or heads < 1:
        raise CheckpointError(f"config.json: {n_layers} layers of {heads} heads are out of range")
    model_type, vocab = keys.model_type, keys.count("vocab_size")
    plain = {"routed": (False,) * n_layers, "windows": (0,) * n_layers}
    own = OWN[model_type].facts(keys, hidden, heads) if model_type in OWN else _facts(keys, hidden)
    return ModelSpec(
        **plain | {"activation": _activation(keys)} | own,
        model_type=model_type,
        n_layers=n_layers,
        hidden=hidden,
        n_heads=heads,
        vocab_size=vocab,
        max_positions=keys.count("max_position_embeddings"),
        tied=keys.flag("tie_word_embeddings"),
        bos_id=_token_ids(keys, "bos_token_id", vocab)[0],
        eos_ids=_eos_ids(keys, generation, vocab),
    )


def _facts(keys: _Keys, hidden: int) -> dict:
    """What a family's `facts` say, of the types that are spelled as Llama is."""
    model_type, heads = keys.model_type, keys.count("num_attention_heads")
    n_layers = keys.count("num_hidden_layers")
    return {
        "n_kv_heads": _kv_heads(keys, heads), "head_dim": keys.count("head_dim", hidden // heads),
        "rope": keys.rope(), "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "windows": _windows(keys, n_layers), **_experts(keys, n_layers),
        "qk_norm": {"olmoe": "full", "qwen3": "head", "qwen3_moe": "head"}.get(model_type, "none"),
        "clip_qkv": keys.number("clip_qkv", 0.0) if model_type == "olmoe" else 0.0,
    }  # fmt: skip


def _kv_heads(keys: _Keys, heads: int) -> int:
    """Null means as many as attention heads, for the types whose configuration class says so."""
    name = "num_key_value_heads"
    if name not in keys.config or keys.config[name] is not None:
        return keys.count(name, heads)
    if keys.model_type in ("qwen2_moe", "qwen3_moe"):
        raise CheckpointError(
            f"config.json: {name} = null has no meaning for {keys.model_type}; give a number"
        )
    return heads


def _activation(keys: _Keys) -> str:
    name = keys.get("hidden_act", (str,), "a name")
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: the activation {name!r:.80} is not supported; "
            f"supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _experts(keys: _Keys, n_layers: int) -> dict:
    """ModelSpec's fields about the FFN: which layers are routed, and how wide everything is."""
    intermediate = keys.count("intermediate_size")
    if "num_experts" not in DEFAULTS[keys.model_type]:
        return {"routed": (False,) * n_layers, "intermediate": intermediate}
    n_experts, routed = keys.count("num_experts"), (True,) * n_layers
    own_width = "moe_intermediate_size" in DEFAULTS[keys.model_type]
    if own_width:
        routed = _routed(keys, n_layers, n_experts)
    if not any(routed):
        return {"routed": routed, "intermediate": intermediate}
    return {
        "routed": routed,
        "intermediate": intermediate,
        "n_experts": n_experts,
        "top_k": keys.count("num_experts_per_tok"),
        "expert_intermediate": keys.count("moe_intermediate_size") if own_width else intermediate,
        "shared_intermediate": keys.count("shared_expert_intermediate_size", 0),
        "normalize_top_k": keys.model_type == "mixtral" or keys.flag("norm_topk_prob"),
    }


def _routed(keys: _Keys, n_layers: int, n_experts: int) -> tuple[bool, ...]:
    """Which layers of a Qwen MoE are mixtures; see Qwen2MoeDecoderLayer.__init__."""
    dense = keys.get("mlp_only_layers", (list,), "a list of layers", [])
    if not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"config.json: mlp_only_layers = {dense!r:.80} is no list of layers")
    step = keys.count("decoder_sparse_step")
    if step < 1:
        raise CheckpointError(
            "config.json: decoder_sparse_step = 0 is out of range; it is at least 1"
        )
    return tuple(
        n_experts > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(n_layers)
    )


def _windows(keys: _Keys, n_layers: int) -> tuple[int, ...]:
    """Each layer's sliding window, 0 for full attention, by the rules of its modeling file.

    Mistral and Mixtral slide in all layers or none, and null means none; qwen3_moe likewise, where
    `use_sliding_window` says so; the other Qwens slide in some layers.
    """
    model_type = keys.model_type
    if model_type in ("llama", "olmoe"):
        return (0,) * n_layers
    if model_type in ("mistral", "mixtral"):
        absent = "sliding_window" not in keys.config
        slides = keys.config.get("sliding_window") is not None or (
            model_type == "mistral" and absent
        )
        return (_window(keys) if slides else 0,) * n_layers
    slides = keys.flag("use_sliding_window")
    if "sliding_window" in keys.config and keys.config["sliding_window"] is None:
        slides = False
    if model_type == "qwen3_moe":
        return (_window(keys) if slides else 0,) * n_layers
    return tuple(
        _window(keys) if sliding else 0 for sliding in _sliding_layers(keys, n_layers, slides)
    )


def _window(keys: _Keys) -> int:
    window = keys.count("sliding_window")
    if window < 1:
        raise CheckpointError("config.json: sliding_window = 0 lets no token see any; use null")
    return window


def _sliding_layers(keys: _Keys, n_layers: int, slides: bool) -> list[bool]:
    """Qwen2, qwen3, qwen2_moe: `layer_types` if given, else the rule of the configuration class."""
    sliding = _layer_types(keys, n_layers)
    if sliding is None:
        until = keys.count("max_window_layers")
        if keys.model_type == "qwen2_moe":
            return [slides and layer % 2 == 0 and layer < until for layer in range(n_layers)]
        return [slides and layer >= until for layer in range(n_layers)]
    if any(sliding) and not slides:
        raise CheckpointError(
            "config.json: layer_types has sliding layers, but there is no sliding window to use"
        )
    return sliding


def _layer_types(keys: _Keys, n_layers: int) -> list[bool] | None:
    types = keys.get("layer_types", (list,), "a list")
    if types is None:
        return None
    if len(types) != n_layers or not all(
        t in ("full_attention", "sliding_attention") for t in types
    ):
        raise CheckpointError(
            f"config.json: layer_types does not say full_attention or sliding_attention "
            f"for each of the {n_layers} layers"
        )
    return [t == "sliding_attention" for t in types]


def _biases(keys: _Keys) -> frozenset[str]:
    model_type = keys.model_type
    if model_type == "qwen2":
        return _QKV
    if model_type in OWN:
        return OWN[model_type].biases(keys)
    if model_type == "qwen2_moe":
        return _QKV if keys.flag("qkv_bias") else frozenset()
    if model_type in ("mistral", "mixtral"):
        return frozenset()
    attention = _QKV | {"o_bias"} if keys.flag("attention_bias") else frozenset()
    return attention | (_FFN if model_type == "llama" and keys.flag("mlp_bias") else frozenset())


def _token_ids(keys: _Keys, name: str, vocab: int, source: dict | None = None) -> list:
    """The ids of the vocabulary under a key (one id or a list), in a list; [None] for none."""
    if source is None:
        value = keys.config.get(name, DEFAULTS[keys.model_type].get(name))
    else:
        value = source.get(name)
    ids = value if isinstance(value, list) else [value]
    if not all(i is None or type(i) is int for i in ids):
        raise CheckpointError(f"{name} = {value!r:.80} is not a token id or a list of them")
    known = [i for i in ids if i is not None and 0 <= i < vocab]
    outside = [i for i in ids if i is not None and i not in known]
    if outside:
        some = ", ".join(f"{i!r:.20}" for i in outside[:4]) + (", …" if len(outside) > 4 else "")
        keys.notes.append(f"{name} {some} is outside the vocabulary of {vocab}, and is left out")
    return known or [None]


def _eos_ids(keys: _Keys, generation: dict, vocab: int) -> tuple[int, ...]:
    """Every id that ends a text: those of the config and those of the generation config."""
    ids = _token_ids(keys, "eos_token_id", vocab)
    ids += _token_ids(keys, "eos_token_id", vocab, generation)
    return tuple(sorted(set(ids) - {None}))
