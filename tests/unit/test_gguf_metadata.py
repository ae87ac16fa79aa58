"""GGUF metadata: the config and the tokenizer that are made of it, and what is refused by name."""

import json
import warnings

import numpy as np
import pytest
import tiny_gguf
from edgemem.converters.checkpoint.gguf.configuration import config_of
from edgemem.converters.checkpoint.gguf.metadata import Metadata
from edgemem.converters.checkpoint.gguf.naming import LONG_FACTORS, SHORT_FACTORS
from edgemem.converters.checkpoint.gguf.tokenizer import Vocabulary
from edgemem.converters.configuration import describe

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.spec import RopeSpec
from edgemem.tokenizer import Tokenizer

f32 = np.float32
BASE = {
    ".block_count": 2, ".context_length": 512, ".embedding_length": 64, ".feed_forward_length": 96,
    ".attention.head_count": 4, ".attention.layer_norm_rms_epsilon": float(f32(1e-5)),
    ".vocab_size": 300, ".expert_count": 8, ".expert_used_count": 2,
}  # fmt: skip
DENSE = ("llama", "qwen2", "qwen3")


def metadata(architecture: str = "llama", keys: dict | None = None) -> Metadata:
    """BASE (what concerns experts only if routed) with changes; None removes a key."""
    full = {k: v for k, v in BASE.items() if "expert" not in k or architecture not in DENSE}
    full |= keys or {}
    full = {architecture + k if k[0] == "." else k: v for k, v in full.items() if v is not None}
    return Metadata("m.gguf", {"general.architecture": architecture} | full)


class Vector:
    """A tensor that is a vector in memory."""

    name, type_name = "rope_freqs.weight", "F32"

    def __init__(self, values):
        self.values = np.asarray(values, f32)
        self.shape = self.values.shape

    def read_rows(self, first, count):
        return self.values[None].view(np.uint32)


def spec(meta: Metadata, tensors=()):
    config = config_of(meta, {name: None for name in tensors})
    return describe(config, {}).spec


# ---- config --------------------------------------------------------------------------------------


def test_what_the_keys_say():
    found = spec(metadata(keys={".attention.head_count_kv": 2, ".rope.freq_base": 5e5}))
    assert (found.model_type, found.n_layers, found.hidden, found.intermediate) == (
        "llama", 2, 64, 96,
    )  # fmt: skip
    assert (found.n_heads, found.n_kv_heads, found.head_dim, found.vocab_size) == (4, 2, 16, 300)
    assert found.norm_eps == 1e-5 and found.rope == RopeSpec(theta=5e5) and found.tied
    assert not spec(metadata(), ["output.weight"]).tied
    assert spec(metadata(keys={".attention.head_count_kv": np.array([4, 4])})).n_kv_heads == 4


@pytest.mark.parametrize(
    "architecture, model_type, normalized",
    [("llama", "mixtral", True), ("olmoe", "olmoe", False), ("qwen2moe", "qwen2_moe", False),
     ("qwen3moe", "qwen3_moe", True)],
)  # fmt: skip
def test_what_architectures_fix(architecture, model_type, normalized):
    keys = {".expert_count": 8, ".expert_used_count": 2, ".expert_feed_forward_length": 32}
    found = spec(metadata(architecture, keys=keys))
    assert (found.model_type, found.normalize_top_k) == (model_type, normalized)
    assert (found.n_experts, found.top_k, found.expert_intermediate) == (8, 2, 32)
    assert found.shared_intermediate == (96 if architecture == "qwen2moe" else 0)
    keys[".expert_weights_norm"] = not normalized
    if model_type != "mixtral":
        assert spec(metadata(architecture, keys=keys)).normalize_top_k != normalized


def test_windows_make_a_mistral():
    found = spec(metadata(keys={".attention.sliding_window": 8}))
    assert (found.model_type, found.windows) == ("mistral", (8, 8))


def test_layers_without_router_are_dense():
    tensors = ["blk.0.ffn_gate.weight", "blk.1.ffn_gate_inp.weight"]
    assert spec(metadata("qwen3moe"), tensors).routed == (False, True)


@pytest.mark.parametrize(
    "key, value, error",
    [
        (".attention.head_count_kv", np.array([4, 2]), "one number for all layers"),
        (".attention.scale", 1.0, "attention.scale = 1.0 is not supported; supported: 0"),
        (".attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        (".attention.clamp_kqv", 8.0, "clamp_kqv"),
        (".rope.scaling.yarn_attn_factor", 1.2, "yarn_attn_factor = 1.2.*supported: 1"),
        (".rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor"),
        (".rope.scaling.attn_factor", 1.2, "scaling.attn_factor = 1.2.*supported: 1"),
        (".attention.value_length", 8, "the size of a head, 16"),
        (".rope.dimension_count", 8, "the size of a head, 16"),
        (".attention.causal", False, "causal"),
        (".block_count", None, "lacks the key llama.block_count"),
        (".block_count", 0, "llama.block_count = 0 with 4 heads of 64 is out of range"),
        (".block_count", 1 << 30, "out of range"),
        (".attention.head_count", 0, "out of range"),
        (".embedding_length", "x", "is no whole number"),
        (".context_length", -1, "is no whole number"),
        (".attention.layer_norm_rms_epsilon", float("nan"), "is no finite number"),
        (".rope.scaling.type", 3, "is no text"),
        (".expert_weights_norm", 1, "neither true nor false"),
    ],
)
def test_bad_and_unsupported_values_are_named(key, value, error):
    keys = {key: value}
    if "expert" in key:
        keys |= {".expert_count": 4, ".expert_used_count": 2}
    with pytest.raises((CheckpointError, UnsupportedError), match=error) as raised:
        spec(metadata(keys=keys))
    assert "m.gguf" in str(raised.value)


def test_scaling_that_is_not_supported_is_named():
    for more in ({}, {".rope.scaling.factor": 4.0}):
        with pytest.raises(UnsupportedError, match="longrope.*none, linear, yarn"):
            spec(metadata(keys={".rope.scaling.type": "longrope"} | more))
    with pytest.raises(UnsupportedError, match="'mamba' is not supported.*llama, qwen2"):
        spec(metadata("mamba"))


# ---- rope factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec("llama3", 5e5, 8.0, 8192),
        RopeSpec("llama3", 5e5, 32.0, 8192),
        RopeSpec("llama3", 1e4, 4.0, 2048, low_freq_factor=2.0, high_freq_factor=5.0),
        RopeSpec("llama3", 5e5, 16.0, 100000, low_freq_factor=1.0, high_freq_factor=2.5),
    ],
)
def test_rope_factors_give_back_their_constants(rope, head_dim):
    class Model:
        pass

    Model.rope, Model.head_dim = rope, head_dim
    factors = tiny_gguf.rope_factors(Model)
    keys = {".rope.freq_base": rope.theta, ".embedding_length": 4 * head_dim}
    tensors = {"rope_freqs.weight": Vector(factors)}
    if head_dim == 16 and rope.original_positions != 8192:
        with pytest.raises(UnsupportedError, match="Llama 3's rule"):  # too few to tell from
            config_of(metadata(keys=keys), tensors)
        return
    config = config_of(metadata(keys=keys), tensors)
    found = describe(config, {}).spec.rope
    scale = rope.low_freq_factor  # only the ratios count
    assert (found.type, found.factor) == ("llama3", rope.factor)
    assert found.original_positions / found.low_freq_factor == rope.original_positions / scale
    assert found.high_freq_factor / found.low_freq_factor == rope.high_freq_factor / scale


def test_other_rope_factors_are_refused():
    keys = {".embedding_length": 256}
    plain = config_of(metadata(keys=keys), {"rope_freqs.weight": Vector(np.ones(32))})
    assert plain["rope_scaling"] is None
    for bad in (np.linspace(1, 3, 32), np.full(32, 2.0) + np.arange(32) % 2):
        with pytest.raises(UnsupportedError, match="Llama 3's rule"):
            config_of(metadata(keys=keys), {"rope_freqs.weight": Vector(bad)})
    signalling = np.full(32, 0x7F800001, np.uint32).view(f32)
    for bad in (np.ones(31), np.zeros(32), np.full(32, np.nan), signalling):
        with pytest.raises(CheckpointError, match="rope_freqs.weight"), warnings.catch_warnings():
            warnings.simplefilter("error")
            config_of(metadata(keys=keys), {"rope_freqs.weight": Vector(bad)})


@pytest.mark.parametrize("told", [{}, {".rope.scaling.type": "longrope"}])
def test_factors_of_longrope_are_not_passed_over(told):
    keys = {".rope.scaling.original_context_length": 64} | told
    tensors = {name: Vector(np.full(8, 1.5)) for name in (SHORT_FACTORS, LONG_FACTORS)}
    config = config_of(metadata("phi3", keys), tensors)
    assert describe(config, {}).spec.rope.long_factors == (1.5,) * 8
    config = config_of(metadata("llama", keys), tensors)
    with pytest.raises(UnsupportedError, match="rope type 'longrope'"):
        describe(config, {})


# ---- tokenizers ----------------------------------------------------------------------------------

CONTROL, USER, BYTE = 3, 4, 6
SPM_TOKENS = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "[X]"]


def vocabulary(kind="gpt2", tokens=("a", "b", "ab", "<e>"), types=(1, 1, 1, 3), **keys):
    values = {"model": kind, "tokens": list(tokens), "token_type": np.array(types, np.int32)}
    values |= {"pre": "gpt-2", "merges": ["a b"]} if kind == "gpt2" else {}
    values |= keys
    values = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
    found = Vocabulary(metadata(keys=values))
    assert found.tokenizer_json and found.eos_ids is not found.bos_id
    return found


def spm(**keys):
    types = [2, CONTROL, CONTROL, BYTE, 1, 1, 1, 1, 1, USER]
    scores = np.array([0, 0, 0, 0, -1, -2, -3, -4, -5, 0], f32)
    given = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return vocabulary("llama", SPM_TOKENS, types, **(given | keys))


def encode(found, text="ab"):
    return Tokenizer(found.tokenizer_json, found.config).encode(text)


def test_byte_level():
    found = vocabulary(eos_token_id=3)
    assert encode(found, "ab<e>b") == [2, 3, 1]
    assert found.config == {"eos_token": "<e>"} and found.eos_ids == [3] and found.bos_id is None
    assert encode(vocabulary(bos_token_id=3, add_bos_token=True)) == [3, 2]
    assert encode(vocabulary(bos_token_id=3, pre="llama-bpe")) == [3, 2]
    assert encode(vocabulary(bos_token_id=3, pre="llama-bpe", add_bos_token=False)) == [2]
    assert encode(vocabulary(eos_token_id=3, add_eos_token=True)) == [2, 3]
    assert encode(vocabulary(bos_token_id=99, add_bos_token=True)) == [2]


def test_sentence_piece():
    found = spm()
    assert encode(found) == [1, 8] and encode(found, "a\n") == [1, 4, 5, 3]
    assert encode(found, "b[X]ab") == [1, 4, 6, 9, 8]
    assert encode(spm(add_bos_token=False)) == [8]
    assert encode(spm(add_space_prefix=False)) == [1, 7]
    assert encode(spm(add_eos_token=True)) == [1, 8, 2]
    assert Tokenizer(found.tokenizer_json).decode([1, 8, 4, 6]) == "ab b"
    assert found.config == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_gemma():
    """Merges of characters, spaces written otherwise, bytes of what no token has, always BOS."""
    tokens = ["<bos>", "<unk>", "<0xC3>", "<0xA9>", "\u2581", "a", "\u2581a", "\n", "\n\n", "[X]"]
    types = [CONTROL, 2, BYTE, BYTE, 1, 1, 1, 1, 1, USER]
    merges = ["\u2581 a", "\n \n"]
    for kind, pre in (("gemma4", None), ("gpt2", "gemma4")):
        found = vocabulary(
            kind, tokens, types, merges=merges, pre=pre, bos_token_id=0, add_bos_token=False
        )
        ids = [0, 5, 6, 8, 7, 2, 3, 9, 4]
        text = "a a\n\n\n\u00e9[X] "
        tokenizer = Tokenizer(found.tokenizer_json, found.config)
        assert encode(found, text) == ids and tokenizer.decode(ids) == text


def test_sentence_piece_has_roles_where_the_file_names_none():
    found = spm(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (found.bos_id, found.eos_ids) == (1, [2]) and found.config["unk_token"] == "<unk>"


def test_tokens_that_others_make_no_ends():
    tokens = ["<|return|>", "<|end|>", "<|call|>", "</s>", "<|tool_response>", "<turn|>", "x"]
    for count, ends in ((2, [0, 1]), (3, [0, 2]), (4, [0, 2, 3]), (7, [0, 2, 4, 5])):
        found = vocabulary(tokens=tokens[:count], types=[CONTROL] * count, merges=[])
        assert found.eos_ids == ends


def test_every_token_that_ends_a_text_is_found():
    tokens = ["a", "<|eot_id|>", "<|im_end|>", "<|x|>", "<|eom_id|>"]
    found = vocabulary(tokens=tokens, types=(1, 3, 1, 3, 3), merges=[], eos_token_id=3)
    assert found.eos_ids == [1, 3, 4]


def test_ids_that_only_pad_have_no_token():
    found = vocabulary(tokens=["a", "b", "ab", "[PAD3]", "[PAD9]", ""], types=(1, 1, 1, 4, 1, 1))
    tokenizer = Tokenizer(found.tokenizer_json, found.config)
    assert not tokenizer.has_text(3) and tokenizer.has_text(4) and not tokenizer.has_text(5)
    assert json.loads(found.tokenizer_json)["added_tokens"] == []


@pytest.mark.parametrize(
    "keys, error",
    [
        (
            {"kind": "t5"},
            "tokenizer.ggml.model = 't5' is not supported; supported: gpt2, llama, gemma4",
        ),
        ({"pre": "tek"}, "tokenizer.ggml.pre = 'tek' is not supported.*qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre = None is not supported"),
        ({"tokens": ("a", "b", "ab", "a")}, "has a token twice"),
        ({"types": (1, 1)}, "has 2 items; there are 4 tokens"),
        ({"merges": ["ab"]}, "'ab', which is no pair"),
        ({"merges": None}, "lacks the key tokenizer.ggml.merges"),
        ({"add_bos_token": 1}, "neither true nor false"),
        ({"bos_token_id": "x"}, "no whole number"),
        ({"token_type": ["x"]}, "no array of numbers"),
    ],
)
def test_bad_vocabularies_are_named(keys, error):
    with pytest.raises((CheckpointError, UnsupportedError), match=error):
        vocabulary(**keys)


def test_bad_scores_are_named():
    for bad, error in ((np.zeros(3, f32), "has 3 items"), (np.full(10, np.nan, f32), "finite"),
                       (np.zeros(10, np.int32), "right kind"), (None, "lacks")):  # fmt: skip
        with pytest.raises(CheckpointError, match=error):
            spm(scores=bad)
