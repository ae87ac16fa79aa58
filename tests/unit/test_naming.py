"""Configs and names of tensors mean what they mean to transformers."""

import json
import random

import numpy as np
import pytest
import torch
from edgemem.converters import naming
from edgemem.converters.configuration import DEFAULTS, describe
from edgemem.converters.families import OWN
from tiny import MODEL_TYPES
from tiny_config import ROPE_TYPES

from edgemem.errors import CheckpointError, EdgeMemError, UnsupportedError
from edgemem.format import Kind, bundle_parts
from edgemem.kernels.reference import frequencies
from edgemem.spec import ModelSpec


def spec_of(config: dict, generation: dict | None = None) -> ModelSpec:
    return describe(json.loads(json.dumps(config)), generation or {}).spec


def transformers_config(config: dict):
    from transformers import CONFIG_MAPPING

    config = json.loads(json.dumps(config))
    return CONFIG_MAPPING[config.pop("model_type")](**config)


def small(model_type: str, **more) -> dict:
    return {
        "model_type": model_type, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64,
        "num_key_value_heads": 2, "num_hidden_layers": 6, "vocab_size": 1000, **more,
    }  # fmt: skip


def test_all_supported_types_are_there():
    assert sorted(DEFAULTS) == sorted(MODEL_TYPES)


# ---- held to transformers' configuration classes -----------------------------------------------


@pytest.mark.parametrize("model_type", ROPE_TYPES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_hidden_layers": 3, "eos_token_id": [3, 1], "bos_token_id": 7, "rope_theta": 5e4},
        {"hidden_size": 1024, "num_attention_heads": 64, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7.0e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 99.0}},
    ],
)
def test_absent_keys_have_the_defaults_of_the_class(model_type, more):
    config = {"model_type": model_type, **more}
    theirs, ours = transformers_config(config), spec_of(config)
    assert ours.n_layers == theirs.num_hidden_layers and ours.hidden == theirs.hidden_size
    assert ours.n_heads == theirs.num_attention_heads
    assert ours.n_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.vocab_size == theirs.vocab_size and ours.intermediate == theirs.intermediate_size
    assert ours.norm_eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.type == theirs.rope_parameters["rope_type"]
    assert ours.activation == theirs.hidden_act
    eos = theirs.eos_token_id
    assert set(ours.eos_ids) == ({eos} - {None} if not isinstance(eos, list) else set(eos))
    assert ours.bos_id == theirs.bos_token_id
    if any(ours.routed):
        assert ours.n_experts == theirs.num_experts and ours.top_k == theirs.num_experts_per_tok
        width = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.expert_intermediate == width
        assert ours.shared_intermediate == getattr(theirs, "shared_expert_intermediate_size", 0)
        assert ours.normalize_top_k == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_rotary_embeddings_are_those_of_transformers(kind):
    """Every spelling and option of each type, drawn: the same frequencies and attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    draw = random.Random(kind)
    for _ in range(60):
        config = rope_config(draw, kind)
        ours, theirs = spec_of(config), transformers_config(config)
        if kind == "default":
            inverse, factor = 1 / ours.rope.theta ** (np.arange(0, 64, 2) / 64), 1.0
            assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        else:
            inverse, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        found = frequencies(ours.rope, ours.head_dim, ours.max_positions, 1)
        np.testing.assert_allclose(found, np.asarray(inverse), rtol=1e-5, err_msg=str(config))
        assert ours.rope.attention_factor == pytest.approx(factor, rel=1e-12), config


def rope_config(draw: random.Random, kind: str) -> dict:
    def maybe(share: float) -> bool:
        return draw.random() < share

    rope: dict = {draw.choice(["type", "rope_type"]): kind}
    positions = draw.choice([2048, 4096, 131072])
    config = small(draw.choice(ROPE_TYPES), max_position_embeddings=positions)
    if kind != "default":
        rope["factor"] = draw.choice([1.0, 2, 4.0, 32.0])
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4}
    if kind in ("llama3", "yarn"):
        rope |= (
            {"original_max_position_embeddings": draw.choice([1024, 2048])} if maybe(0.6) else {}
        )
        config |= {"original_max_position_embeddings": 512} if maybe(0.2) else {}
    if kind == "yarn":
        rope |= {"factor": None} if maybe(0.3) else {}
        rope |= {"attention_factor": draw.choice([1.3, None])} if maybe(0.4) else {}
        rope |= {"mscale": draw.choice([0.7, 0, None])} if maybe(0.5) else {}
        rope |= {"mscale_all_dim": draw.choice([0.9, None])} if maybe(0.5) else {}
        rope |= {"beta_fast": 16, "beta_slow": 2} if maybe(0.3) else {}
        rope |= {"beta_fast": None} if maybe(0.1) else {}
        rope |= {"truncate": False} if maybe(0.3) else {}
    config |= {"rope_theta": draw.choice([1e4, 500000])} if maybe(0.5) else {}
    rope |= {"rope_theta": 1e6} if maybe(0.5) else {}
    return config | {draw.choice(["rope_scaling", "rope_parameters"]): rope}


WINDOWS = [
    {}, {"sliding_window": 5}, {"sliding_window": None},
    {"sliding_window": 5, "use_sliding_window": True},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": None, "use_sliding_window": True}, {"use_sliding_window": True},
    {"sliding_window": 5, "use_sliding_window": False},
]  # fmt: skip
TYPES = ["full_attention", "sliding_attention"] * 3


@pytest.mark.parametrize("model_type", ROPE_TYPES)
@pytest.mark.parametrize("more", [*WINDOWS, WINDOWS[3] | {"layer_types": TYPES}])
def test_windows_are_those_of_transformers(model_type, more):
    """Which layers slide is read off transformers' own config, by the rule of its modeling file."""
    config = small(model_type, **more)
    theirs = transformers_config(config)
    window = getattr(theirs, "sliding_window", None) or 0
    if model_type in ("llama", "olmoe"):
        expected = [0] * 6
    elif model_type in ("mistral", "mixtral", "qwen3_moe"):
        expected = [window] * 6
    else:
        expected = [window * (kind == "sliding_attention") for kind in theirs.layer_types]
    assert list(spec_of(config).windows) == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window"),
        ({"sliding_window": -1, "use_sliding_window": True}, "sliding_window"),
        ({"sliding_window": "5", "use_sliding_window": True}, "sliding_window"),
        ({"layer_types": TYPES}, "no sliding window to use"),
        ({"layer_types": TYPES[:5]}, "each of the 6 layers"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_windows_that_make_no_sense(more, words):
    with pytest.raises(CheckpointError, match=words):
        spec_of(small("qwen2", max_window_layers=0, **more))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_which_layers_are_routed(model_type):
    def routed(**more) -> list[int]:
        spec = spec_of(small(model_type, num_experts=4, num_experts_per_tok=2, **more))
        return [i for i, on in enumerate(spec.routed) if on]

    assert routed() == [0, 1, 2, 3, 4, 5]
    assert routed(decoder_sparse_step=2) == [1, 3, 5]
    assert routed(decoder_sparse_step=2, mlp_only_layers=[3, 99]) == [1, 5]
    assert routed(mlp_only_layers=[0, 1, 2, 3, 4, 5]) == []
    assert spec_of(small(model_type, num_experts=0)).n_experts == 0


@pytest.mark.parametrize("model_type", ROPE_TYPES)
def test_null_key_value_heads(model_type):
    """As many as attention heads, where the configuration class says so in its __post_init__."""
    config = small(model_type, num_key_value_heads=None, num_attention_heads=16)
    if model_type in ("qwen2_moe", "qwen3_moe"):
        with pytest.raises(CheckpointError, match="num_key_value_heads = null has no meaning"):
            spec_of(config)
        return
    assert spec_of(config).n_kv_heads == 16
    if model_type not in ("mistral", "mixtral"):  # whose field is declared as never None
        assert transformers_config(config).num_key_value_heads == 16


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ffn_dim": 77, "activation_function": "gelu", "tie_word_embeddings": False},
        {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 3, "bos_token_id": 7},
        {"vocab_size": 500, "eos_token_id": None, "max_position_embeddings": 64},
        {"head_dim": 10, "num_key_value_heads": 3, "rms_norm_eps": 0.5},  # keys that no OPT has
    ],
)
def test_opt_configs_mean_what_they_mean_to_transformers(more):
    config = {"model_type": "opt", **more}
    theirs, ours = transformers_config(config), spec_of(config)
    assert ours.n_layers == theirs.num_hidden_layers and ours.hidden == theirs.hidden_size
    assert ours.n_heads == ours.n_kv_heads == theirs.num_attention_heads
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.vocab_size == theirs.vocab_size and ours.intermediate == theirs.ffn_dim
    assert ours.tied == theirs.tie_word_embeddings and ours.bos_id == theirs.bos_token_id
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.activation == theirs.activation_function
    assert set(ours.eos_ids) == {theirs.eos_token_id} - {None}
    assert (ours.norm, ours.positions, ours.gated) == ("layer", "learned", False)
    assert ours.norm_eps == 1e-5  # torch's default for LayerNorm, which OPT does not change


@pytest.mark.parametrize(
    "more",
    [
        {"do_layer_norm_before": False}, {"word_embed_proj_dim": 512},
        {"layer_norm_elementwise_affine": False}, {"_remove_final_layer_norm": True},
    ],
)  # fmt: skip
def test_an_opt_that_cannot_run_is_refused(more):
    (key,) = more
    with pytest.raises(UnsupportedError, match=f"{key} = .* is not supported; supported is"):
        spec_of({"model_type": "opt", **more})


def test_heads_of_an_odd_size_are_refused():
    with pytest.raises(UnsupportedError, match="3 heads of 3 numbers each are not supported"):
        spec_of({"model_type": "opt", "num_attention_heads": 3, "hidden_size": 9})


@pytest.mark.parametrize("model_type", ["opt", "falcon"])
def test_heads_that_do_not_divide_the_hidden_size(model_type):
    with pytest.raises(CheckpointError, match="5 heads do not divide hidden_size = 768"):
        spec_of({"model_type": model_type, "num_attention_heads": 5, "hidden_size": 768})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 77, "bos_token_id": 3},
        {"new_decoder_architecture": True, "num_attention_heads": 8, "hidden_size": 512},
        {"new_decoder_architecture": True, "num_attention_heads": 8, "hidden_size": 512,
         "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "activation": "relu"},
        {"multi_query": False, "parallel_attn": False, "tie_word_embeddings": False},
        {"rope_theta": 5e4, "layer_norm_epsilon": 1e-3, "vocab_size": 500, "eos_token_id": None},
    ],
)  # fmt: skip
def test_falcon_configs_mean_what_they_mean_to_transformers(more):
    from transformers import AutoModelForCausalLM

    config = {"model_type": "falcon", **more}
    theirs, ours = transformers_config(config), spec_of(config)
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(theirs).transformer.h[0]
    assert ours.n_layers == theirs.num_hidden_layers and ours.hidden == theirs.hidden_size
    assert ours.n_heads == theirs.num_attention_heads and ours.head_dim == theirs.head_dim
    assert ours.n_kv_heads == layer.self_attention.num_kv_heads
    assert ours.vocab_size == theirs.vocab_size and ours.intermediate == theirs.ffn_hidden_size
    assert ours.tied == theirs.tie_word_embeddings and ours.bos_id == theirs.bos_token_id
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.activation == theirs.activation and ours.norm_eps == theirs.layer_norm_epsilon
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert set(ours.eos_ids) == {theirs.eos_token_id} - {None}
    assert (ours.norm, ours.positions, ours.gated) == ("layer", "rope", False)
    assert ours.parallel == theirs.parallel_attn
    assert ours.shared_norm == (ours.parallel and not hasattr(layer, "ln_mlp"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"alibi": True}, "alibi = true"),
        ({"bias": True}, "bias = true"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "without parallel_attn"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "attn = 3"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads = 3 does not fit"),
        ({"multi_query": False, "num_kv_heads": 1}, "num_kv_heads = 1 does not fit"),
        ({"n_embed": 1024}, "n_embed beside another hidden_size"),
    ],
)
def test_a_falcon_that_cannot_run_is_refused(more, words):
    with pytest.raises(EdgeMemError, match=words):
        spec_of({"model_type": "falcon", **more})


def test_a_saved_config_of_transformers_5_is_read():
    """It says num_local_experts where the class says num_experts, and rope_parameters."""
    from transformers import Qwen3MoeConfig

    saved = Qwen3MoeConfig(num_experts=16, rope_theta=12345.0).to_dict()
    assert "num_local_experts" in saved and "rope_theta" not in saved
    spec = spec_of(saved)
    assert spec.n_experts == 16 and spec.rope.theta == 12345.0


def test_end_of_text_ids_of_both_configs():
    config = small("llama", eos_token_id=[5, 2], vocab_size=10)
    assert spec_of(config, {"eos_token_id": [7, 5]}).eos_ids == (2, 5, 7)
    assert spec_of(config, {"eos_token_id": 3}).eos_ids == (2, 3, 5)
    assert spec_of(config | {"eos_token_id": None}).eos_ids == ()
    assert spec_of(config | {"eos_token_id": -1}, {"eos_token_id": [99, 4]}).eos_ids == (4,)
    for wrong in ("2", 2.0, True, [[2]], {"id": 2}):
        with pytest.raises(CheckpointError, match="eos_token_id"):
            spec_of(config | {"eos_token_id": wrong})
        with pytest.raises(CheckpointError, match="eos_token_id"):
            spec_of(config, {"eos_token_id": wrong})


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {}, {"model_type": "gptj"}, {"model_type": "gptj", "architectures": ["GPTJForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "llama", "architectures": ["MistralForCausalLM"]},
        {"architectures": ["GPTJForCausalLM"]}, {"model_type": "x" * 9999},
    ],
)  # fmt: skip
def test_unsupported_models_are_named(config):
    with pytest.raises(
        UnsupportedError, match="not supported; supported are .*llama.*qwen3_moe"
    ) as e:
        spec_of(config)
    assert (config.get("architectures") or [""])[0] in str(e.value) and len(str(e.value)) < 600


def test_architecture_alone_tells_the_type():
    assert spec_of({"architectures": ["Qwen2ForCausalLM"]}).model_type == "qwen2"
    assert spec_of({"architectures": ["LLaMAForCausalLM"]}).model_type == "llama"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hidden_act": "swiglu"}, "activation 'swiglu' is not supported; supported are silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_features_are_named(more, words):
    with pytest.raises(UnsupportedError, match=words):
        spec_of(small("llama", **more))


@pytest.mark.parametrize(
    "more",
    [
        {"rope_scaling": {"type": "linear"}}, {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "llama3", "factor": 8.0}}, {"rope_theta": 0.0},
        {"rope_theta": -1}, {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                                              "high_freq_factor": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1.5}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": -99.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "1"}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
        {"rope_scaling": {"type": "linear", "factor": 1e300}}, {"rope_theta": 1e300},
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 1e-300}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1e200}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "rope_theta": 1.0}},
        {"num_attention_heads": 0}, {"num_hidden_layers": 0}, {"num_hidden_layers": 1 << 20},
        {"num_key_value_heads": 3}, {"head_dim": 63}, {"hidden_size": 1 << 30}, {"vocab_size": 0},
        {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": -1.0}, {"tie_word_embeddings": 1},
        {"intermediate_size": 0}, {"max_position_embeddings": 0}, {"architectures": "Llama"},
    ],
)  # fmt: skip
def test_bad_values_are_refused(more):
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        spec_of(small("llama", **more))


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    1 << 40,
    10**400,
    1.5,
    1e308 * 10,
    "x",
    "",
    [],
    {},
    [None],
    ["a"],
    {"a": {}},
]


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_hostile_config_is_an_error_or_a_spec(model_type):
    base = small(model_type, architectures=None, rope_scaling={"type": "yarn", "factor": 2.0})
    keys = [*base, *DEFAULTS[model_type], "clip_qkv", "layer_types", "attention_bias", "mlp_bias"]
    keys += ["use_sliding_window", "mlp_only_layers", "rope_parameters", "num_local_experts"]
    rope = ["type", "factor", "rope_theta", "beta_fast", "attention_factor", "mscale", "truncate"]
    for key in [*keys, *(("rope_scaling", name) for name in rope)]:
        for value in HOSTILE:
            config = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
            inner, name = (config, key) if isinstance(key, str) else (config[key[0]], key[1])
            inner[name] = value
            try:
                description = describe(config, {})
            except EdgeMemError as error:
                assert len(str(error)) < 600 and "\n" not in str(error)
                continue
            assert ModelSpec.from_dict(json.loads(json.dumps(description.spec.to_dict())))


# ---- names -------------------------------------------------------------------------------------


def test_every_segment_of_every_type_is_named_once():
    for model_type in DEFAULTS:
        spec = spec_of(small(model_type, num_experts=2, num_local_experts=2, num_experts_per_tok=2))
        kinds = [
            Kind.DENSE,
            *([Kind.EXPERT] * any(spec.routed)),
            *([Kind.FFN] * (not all(spec.routed))),
        ]
        kinds += [Kind.SHARED] * bool(spec.shared_intermediate)
        seen, family = [], OWN.get(model_type, naming)
        base = "model.h.0." if model_type in ("falcon", "gpt2") else "model.layers.0."
        for kind in kinds:
            for part in bundle_parts(spec, kind, 0):
                if kind != Kind.EXPERT or not part.optional:
                    names = family.sources(spec, "model.", kind, 0, 0, part)
                    assert names and all(n.tensor.startswith(base) for n in names)
                    seen += [(n.tensor, n.first_row) for n in names]
        assert len(seen) == len(set(seen))


def test_prefixes_and_what_is_no_weight():
    assert naming.prefix_of(["embed_tokens.weight"]) == ""
    assert naming.prefix_of(["model.embed_tokens.weight"]) == "model."
    for family, prefix in ((OWN["opt"], "model.decoder."), (OWN["falcon"], "transformer.")):
        found = naming.prefix_of([prefix + family.EMBED], family.EMBED, family.PREFIXES)
        assert found == prefix


def test_spans_of_rows_that_come_in_runs():
    source = naming.Source("x", (40, 2), first_row=3, run=4, stride=10)
    rows = [3, 4, 5, 6, 13, 14, 15, 16, 23, 24, 25, 26, 33, 34, 35, 36]
    for first in range(16):
        for count in range(1, 17 - first):
            spans = list(source.spans(first, count))
            found = [row + i for row, n in spans for i in range(n)]
            assert found == rows[first : first + count]
    assert list(naming.Source("x", (40, 2), 5).spans(2, 30)) == [(7, 30)]
    every_second = naming.Source("x", (40, 2), 5, step=2)
    assert list(every_second.spans(2, 3)) == [(9, 5)]
    assert not naming.is_weight("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert naming.is_weight("model.layers.0.self_attn.q_proj.weight")
