"""Families that are spelled unlike Llama: the defaults of their configuration classes, and options
that are refused by name."""

import json

import numpy as np
import pytest
import tiny
import transformers
from tiny_families import FAMILIES

import edgemem
from edgemem import converters
from edgemem.converters.checkpoint.gguf.configuration import config_of
from edgemem.converters.checkpoint.gguf.metadata import Metadata
from edgemem.converters.configuration import describe
from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.kernels.reference import Forward

_GROUPS = {
    "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6,
}  # fmt: skip
_SIZES = {
    "attention.key_length": 24, "attention.value_length": 16, "attention.kv_lora_rank": 16,
    "rope.dimension_count": 8,
}  # fmt: skip
_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6,
    "vocab_size": 300,
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"num_hidden_layers": 3, "eos_token_id": [3, 1]}])
def test_absent_keys_have_the_defaults_of_the_class(model_type, more):
    config = {"model_type": model_type, **more}
    if model_type == "gpt2" and more:
        config["n_layer"] = config.pop("num_hidden_layers")
    if model_type == "deepseek_v2":  # whose class does not say how many experts a token takes
        config["num_experts_per_tok"] = 6
    if model_type == "glm4_moe":  # whose class has heads of an odd half
        config["head_dim"] = 128
    theirs = transformers.AutoConfig.for_model(**config)
    ours = describe(config, {}).spec
    heads = theirs.num_attention_heads
    assert (ours.n_layers, ours.hidden) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert (ours.n_heads, ours.vocab_size) == (heads, theirs.vocab_size)
    if ours.latent:
        assert (ours.latent, ours.value_dim) == (theirs.kv_lora_rank, theirs.v_head_dim)
        assert (ours.q_rank, ours.head_dim) == (theirs.q_lora_rank, theirs.qk_head_dim)
    else:
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
        assert ours.n_kv_heads == getattr(theirs, "num_key_value_heads", heads)
        assert ours.head_dim == head_dim
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    assert ours.norm_eps == next(getattr(theirs, n) for n in names if hasattr(theirs, n))
    eos = theirs.eos_token_id
    assert set(ours.eos_ids) == (set(eos) if isinstance(eos, list) else {eos} - {None})
    windows = getattr(theirs, "sliding_window", None) or 0
    kinds = getattr(theirs, "layer_types", None)
    slide = [k == "sliding_attention" for k in kinds] if kinds else [True] * ours.n_layers
    assert ours.windows == tuple(windows * slides for slides in slide)
    if ours.positions == "rope":
        rope, head_dim = theirs.rope_parameters, getattr(theirs, "head_dim", ours.head_dim)
        full = rope.get("full_attention", rope)
        assert (ours.rope.type, ours.rope.theta) == (full["rope_type"], full["rope_theta"])
        dims = int((head_dim or ours.head_dim) * full.get("partial_rotary_factor", 1.0))
        assert (ours.rope.dims or ours.head_dim) == dims
    if ours.local_rope:
        assert ours.local_rope.theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize(
    ("model_type", "more", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ("phi3", {"partial_rotary_factor": 0.2}, "partial_rotary_factor = 0.2"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ("phimoe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("phimoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gpt_neox", {"rotary_pct": 0.2}, "partial_rotary_factor = 0.2"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit is not supported but for 7.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is not supported but for 1.702"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "already quantised"),
        ("granite", {"quantization_config": {"quant_method": "mxfp4"}}, "already quantised"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = true"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = true"),
        ("deepseek_v2", {"kv_lora_rank": 40}, "kv_lora_rank = 40"),
        ("deepseek_v3", {"v_head_dim": 8}, "v_head_dim = 8"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = false"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ],
)
def test_what_is_not_computed_is_refused(model_type, more, words):
    with pytest.raises(UnsupportedError, match=words):
        describe({"model_type": model_type, **SMALL, **more}, {})


@pytest.mark.parametrize(
    ("model_type", "more", "words"),
    [
        ("granite", {"residual_multiplier": 0}, "residual_multiplier = 0"),
        ("granite", {"logits_scaling": 1e9}, "logits_scaling"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0"),
        ("gemma2", {"sliding_window": 0}, "sliding_window = 0"),
        ("gemma3_text", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "lacks its list short_factor"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
         "rope"),
        ("phimoe", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8,
                                     "long_factor": [1.0] * 8}}, "lacks its short_mscale"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gpt_oss", {"sliding_window": 0}, "sliding_window = 0"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window = null"),
        ("gpt_oss", {"num_experts_per_tok": 999}, "top_k = 999"),
        ("glm4_moe", {"n_group": 7}, "n_groups = 7"),
        ("glm4_moe", {"n_group": 64, "topk_group": 1}, "top_groups = 1"),
        ("deepseek_v2", _GROUPS | {"n_group": 7}, "n_groups = 7"),
        ("deepseek_v2", _GROUPS | {"topk_group": 0}, "top_groups = 0"),
        ("deepseek_v3", {"n_group": 7}, "n_groups = 7"),
        ("deepseek_v3", {"n_group": None}, "n_group = null"),
        ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob = null"),
        ("deepseek_v3", {"rope_interleave": None}, "rope_interleave = null"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ("deepseek_v3", {"qk_nope_head_dim": 0}, "qk_nope_head_dim = 0"),
        ("deepseek_v3", {"q_lora_rank": -1}, "q_lora_rank = -1"),
        ("deepseek_v3", {"num_experts_per_tok": 200}, "top_groups = 4"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": "x"}},
         "mscale_all_dim = 'x'"),
    ],
)  # fmt: skip
def test_bad_values_are_named(model_type, more, words):
    with pytest.raises(CheckpointError, match=words):
        describe({"model_type": model_type, **SMALL, **more}, {})


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3", "gemma2"])
def test_ffns_are_taken_apart_however_matrices_lie(model_type, tmp_path, seed_base):
    model = tiny.write(tmp_path / "model", model_type, seed_base + 3, dtype="F32")
    converters.convert(model.folder, tmp_path / "whole.edgemem")
    converters.convert(model.folder, tmp_path / "apart.edgemem", neurons=True)
    paths = tmp_path / "whole.edgemem", tmp_path / "apart.edgemem"
    whole, apart = (edgemem.load(path, context=tiny.IDS_COUNT + 2, threads=1) for path in paths)
    assert np.array_equal(whole.logits(model.ids), apart.logits(model.ids))


def test_experts_need_no_shared_one_beside_them(tmp_path, seed_base):
    model = tiny.write(tmp_path / "hf", "glm4_moe", seed_base, dtype="F32", shared_intermediate=0)
    converters.convert(model.folder, tmp_path / "m.edgemem")
    expected = Forward(model.spec, model.weights).feed(model.ids)
    with edgemem.load(tmp_path / "m.edgemem", context=len(model.ids), kv="f32") as engine:
        assert np.allclose(engine.logits(model.ids), expected, atol=1e-5 * np.abs(expected).max())


def test_layers_behind_the_last_are_left_out_only_where_they_foretell(tmp_path, seed_base):
    """DeepSeek-V2 has none such: with more layers than its config says, one of the two is wrong."""
    for model_type in ("deepseek_v2", "deepseek_v3"):
        facts = {"n_layers": 2, "routed": (True, True), "windows": (0, 0)}
        model = tiny.write(tmp_path / model_type, model_type, seed_base, **facts)
        path = model.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
        if model_type == "deepseek_v3":
            converters.convert(model.folder, tmp_path / "m.edgemem")
            continue
        with pytest.raises(CheckpointError, match=r"has no use for: model\.layers\.1\."):
            converters.convert(model.folder, tmp_path / "refused.edgemem")


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("granitemoe", {"expert_shared_feed_forward_length": 8}, "expert_shared_feed_forward"),
        ("gemma3", {"attention.sliding_window_pattern": 4}, "sliding_window_pattern = 4"),
        ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func = 1"),
        ("phi3", {"rope.dimension_count": 99}, "rope.dimension_count = 99"),
        ("gemma2", {"logit_scale": 2.0}, "logit_scale = 2.0"),
        ("granite", {"rope.scaling.finetuned": False}, "finetuned = False"),
        ("gpt-oss", {"attention.sliding_window_pattern": 4}, "sliding_window_pattern = 4"),
        ("deepseek2", _SIZES | {"expert_count": 8, "expert_gating_func": 3}, "gating_func = 3"),
        ("deepseek2", _SIZES | {"attention.temperature_scale": 0.1}, "temperature_scale = 0.1"),
        ("deepseek2", _SIZES | _YARN | {"rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5"),
    ],
)
def test_keys_of_gguf_that_are_not_computed_are_refused(architecture, keys, words, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        config_of(metadata(tmp_path / "m.gguf", architecture, keys), {})


def metadata(path, architecture, keys) -> Metadata:
    """Of these keys and those that every file has."""
    least = {
        "block_count": 2, "attention.head_count": 4, "embedding_length": 64, "context_length": 512,
        "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 300, "attention.scale": 1.0,
    }  # fmt: skip
    least = least if architecture.startswith("granite") else least | {"attention.scale": 0.0}
    values = {"general.architecture": architecture}
    values |= {f"{architecture}.{key}": value for key, value in (least | keys).items()}
    return Metadata(path, values)


@pytest.mark.parametrize("key", ["key_length", "value_length"])
def test_gguf_files_that_do_not_say_the_sizes_of_heads_are_refused(key, tmp_path):
    """Of latents; older and newer files say them under different keys."""
    path, old = tmp_path / "m.gguf", f"attention.{key}"
    keys = {name: value for name, value in _SIZES.items() if name != old}
    with pytest.raises(CheckpointError, match=f"lacks the key deepseek2.{old}"):
        config_of(metadata(path, "deepseek2", keys), {})
    newer = config_of(metadata(path, "deepseek2", keys | {f"{old}_mla": _SIZES[old]}), {})
    assert (newer["qk_nope_head_dim"], newer["v_head_dim"]) == (16, 16)
