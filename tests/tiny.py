"""Tiny random Hugging Face checkpoints, drawn from a seed, for tests that need a whole model.

    model = tiny.write(folder, "qwen3_moe", seed=7)
    model.spec, model.weights, model.ids      # what a converter must find, and ids to try it with

Everything that a checkpoint of the type may vary is drawn (`tiny_config`), and so is its spelling:
key names of transformers 4 or 5, number format, one file or shards, experts apart or fused. Weights
keep the residual stream near unit size, and no router of `model.ids` has a near tie, so float
rounding cannot change which experts are picked.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tiny_config
from tiny_config import Draw
from tiny_families import FAMILIES

from edgemem.kernels import reference
from edgemem.kernels.reference import Forward
from edgemem.spec import ModelSpec

MODEL_TYPES = (*tiny_config.MODEL_TYPES, *FAMILIES)
VOCAB_SIZES = (259, 272, 300)
"""Beyond the 258 tokens of the tokenizer, as padded vocabularies of real models are."""
IDS_COUNT = 33
ROUTING_GAP = 0.01
"""Least distance of the last picked router logit to the first unpicked one, in their spread."""


@dataclass
class Tiny:
    """One checkpoint: the folder, its truth (spec and weights), and ids whose routing is clear."""

    folder: Path
    spec: ModelSpec
    weights: "TinyWeights"
    ids: list[int]
    config: dict
    tensors: dict[str, np.ndarray] = field(repr=False, default_factory=dict)


class TinyWeights:
    """Weights by bundle and segment, the way `reference.Forward` asks for them."""

    def __init__(self, embedding: np.ndarray, output: np.ndarray | None):
        self.bundles: dict[tuple[str, int, int], dict[str, np.ndarray]] = {}
        self.embedding = embedding
        self.output = output

    def table(self):
        return self.embedding

    def head(self):
        return self.embedding if self.output is None else self.output

    def dense(self, layer):
        return self.bundles["dense", layer, 0]

    def ffn(self, layer):
        return self.bundles["ffn", layer, 0]

    def expert(self, layer, index):
        return self.bundles["expert", layer, index]

    def shared(self, layer):
        return self.bundles["shared", layer, 0]


def write(folder: Path, model_type: str, seed: int, dtype: str | None = None, **facts) -> Tiny:
    """Draw the checkpoint of (model_type, seed) and write it into `folder`, which is made.

    `dtype` ("F32", "F16", "BF16") fixes the number format, else it is drawn; `facts` replace fields
    of the drawn spec (they must fit each other and the type).
    """
    draw = Draw(seed, MODEL_TYPES.index(model_type))
    family, vocab_size = FAMILIES.get(model_type), draw.one(VOCAB_SIZES)
    if family:
        spec = replace(family.spec(draw, vocab_size), **facts)
        biases = family.biases(draw)
        config, rope = family.config(draw, spec, biases)
        config |= tiny_config.spell_ends(spec)
    else:
        spec = replace(tiny_config.draw_spec(draw, model_type, vocab_size), **facts)
        biases = tiny_config.draw_biases(draw, model_type)
        config, rope = tiny_config.spell(draw, spec, biases)
    spec = replace(spec, rope=rope)
    drawn = draw.one(("F32", "F32", "F32", "BF16", "F16"))
    dtype = dtype or drawn
    config[draw.one(("torch_dtype", "dtype"))] = _CONFIG_DTYPES[dtype]
    weights = _draw_weights(draw, spec, biases, dtype)
    getattr(family, "hold", lambda *_: None)(spec, weights)
    ids = [int(i) for i in draw.rng.integers(0, spec.vocab_size, IDS_COUNT)]
    _settle_routers(draw, spec, weights, ids, dtype)
    tensors = (family.tensors if family else _named)(draw, spec, weights)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_weights(draw, folder, tensors, dtype)
    write_tokenizer(folder)
    if draw.maybe(0.5):
        _write_json(folder / "generation_config.json", {"temperature": 0.7, "top_k": 20})
    return Tiny(folder, spec, weights, ids, config, tensors)


# ---- weights -----------------------------------------------------------------------------------

_CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if values.dtype == np.uint8:
        return values.tobytes()
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that the number format holds exactly, as float32."""
    values = values.astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def _latent_heads(spec: ModelSpec, matrix, norm) -> dict[str, np.ndarray]:
    """What heads that share a latent have, but for what makes it."""
    heads, plain, latent = spec.n_heads, spec.head_dim - spec.rope.dims, spec.latent
    bundle = {
        "q": matrix(heads * spec.head_dim, spec.q_rank or spec.hidden),
        "absorb": matrix(heads * latent, plain, gain=np.sqrt(plain / latent)),
        "expand": matrix(heads * spec.value_dim, latent), "latent_norm": norm(latent),
    }  # fmt: skip
    return bundle | ({"q_down_norm": norm(spec.q_rank)} if spec.q_rank else {})


def _routing(spec: ModelSpec, matrix, normal, biases: dict) -> dict[str, np.ndarray]:
    bundle = {"router": matrix(spec.n_experts, spec.hidden, gain=1.5)}
    if biases.get("router"):
        bundle["router_logit_bias"] = normal(spec.n_experts, scale=biases["router"])
    if spec.router_bias:
        bundle["router_bias"] = normal(spec.n_experts, scale=0.2)
    if spec.shared_intermediate and spec.shared_gated:
        bundle["shared_gate"] = matrix(1, spec.hidden)
    return bundle


def _draw_weights(draw: Draw, spec: ModelSpec, biases: dict, dtype: str) -> TinyWeights:
    def normal(*shape: int, scale: float) -> np.ndarray:
        return _rounded(draw.rng.normal(0, scale, shape), dtype)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return normal(rows, cols, scale=gain / np.sqrt(cols))

    def norm(size: int) -> np.ndarray:
        weights = draw.rng.uniform(0.6, 1.4, size)
        if spec.model_type.startswith("gemma"):  # which has them less 1, exactly in any format
            weights = np.round(weights * 128) / 128
        return _rounded(weights, dtype)

    def norms(*names: str) -> dict[str, np.ndarray]:
        bundle = {name: norm(spec.hidden) for name in names}
        biased = names if spec.norm == "layer" else ()
        return bundle | {f"{name}_bias": normal(spec.hidden, scale=0.2) for name in biased}

    def ffn(width: int, bias: float = 0.0) -> dict[str, np.ndarray]:
        inner = ("gate", "up") if spec.gated else ("up",)
        bundle = {name: matrix(width, spec.hidden) for name in inner}
        if bias:
            bundle |= {f"{name}_bias": normal(width, scale=bias) for name in inner}
        bundle["down"] = matrix(spec.hidden, width, gain=0.5 if spec.activation == "relu2" else 0.8)
        return bundle | ({"down_bias": normal(spec.hidden, scale=0.2)} if bias else {})

    def dense(routed: bool) -> dict[str, np.ndarray]:
        heads, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        bundle = norms(*(("attn_norm",) if spec.shared_norm else ("attn_norm", "ffn_norm")))
        bundle |= norms("attn_post_norm", "ffn_post_norm") if spec.post_norms else {}
        parts = (("q", heads), ("k", kv), ("v", kv))
        if spec.latent:
            bundle |= _latent_heads(spec, matrix, norm)
            parts = (("k", spec.rope.dims), ("latent", spec.latent))
            parts += (("q_down", spec.q_rank),) * bool(spec.q_rank)
        for name, rows in parts:
            bundle[name] = matrix(rows, spec.hidden)
            bundle |= {f"{name}_bias": normal(rows, scale=0.2)} if biases["qkv"] else {}
        bundle["o"] = matrix(spec.hidden, spec.attended, gain=0.7)
        bundle |= {"o_bias": normal(spec.hidden, scale=0.2)} if biases["o"] else {}
        if spec.sinks:
            bundle["sinks"] = normal(spec.n_heads, scale=2.0)
        if spec.qk_norm != "none":
            full = spec.qk_norm == "full"
            bundle["q_norm"] = norm(heads if full else spec.head_dim)
            bundle["k_norm"] = norm(kv if full else spec.head_dim)
        return bundle | (_routing(spec, matrix, normal, biases) if routed else {})

    table = normal(spec.vocab_size, spec.hidden, scale=1.0)
    weights = TinyWeights(table, None if spec.tied else matrix(spec.vocab_size, spec.hidden))
    for layer, routed in enumerate(spec.routed):
        weights.bundles["dense", layer, 0] = dense(routed)
        if not routed:
            weights.bundles["ffn", layer, 0] = ffn(spec.intermediate, 0.2 * biases["mlp"])
        for expert in range(spec.n_experts if routed else 0):
            weights.bundles["expert", layer, expert] = ffn(
                spec.expert_intermediate, biases.get("experts", 0.0)
            )
        if routed and spec.shared_intermediate:
            weights.bundles["shared", layer, 0] = ffn(spec.shared_intermediate)
    last = weights.bundles["dense", spec.n_layers, 0] = norms("norm")
    if biases.get("head"):
        last["head_bias"] = normal(spec.vocab_size, scale=0.2)
    if spec.positions == "learned":
        last["positions"] = normal(spec.max_positions, spec.hidden, scale=0.5)
    return weights


def routing_gaps(spec: ModelSpec, logits: np.ndarray, dense: dict) -> np.ndarray:
    """Per token, how near a router's decisions are to others, over the spread of what it compares:
    logits, or scores. `dense` is the layer's bundle."""
    if spec.scoring == "sparsemixer":
        return _mixer_gaps(spec, logits)
    plain, bias = replace(spec, n_groups=0, top_groups=0), dense.get("router_bias")
    scores = reference.choice_scores(plain, logits, bias)
    if spec.n_groups <= 1:
        return _top_gaps(scores, spec.top_k)
    groups = np.sort(scores.reshape(len(scores), spec.n_groups, -1), axis=-1)
    worth = groups[:, :, -1 if spec.scoring == "softmax" else -2 :].sum(axis=-1)
    within = reference.choice_scores(spec, logits, bias)
    within = np.where(np.isinf(within), scores.min() - 1, within)
    gaps = _top_gaps(within, spec.top_k) * within.std() / scores.std()
    return np.minimum(gaps, _top_gaps(worth, spec.top_groups))


def _top_gaps(scores: np.ndarray, top_k: int) -> np.ndarray:
    ranked = np.sort(scores, axis=-1)[:, ::-1]
    if top_k == ranked.shape[1]:
        return np.full(len(ranked), np.inf)
    return (ranked[:, top_k - 1] - ranked[:, top_k]) / scores.std()


def _mixer_gaps(spec: ModelSpec, logits: np.ndarray) -> np.ndarray:
    """All that are taken in turn, and which others are close to each of them."""
    gaps, ranked = _top_gaps(logits, 1), np.sort(logits, axis=-1)[:, ::-1]
    for k in range(spec.top_k):
        gaps = np.minimum(gaps, _top_gaps(logits, k + 1))
        best = ranked[:, k : k + 1]
        far = (best - logits) - 2 * spec.router_jitter * np.maximum(np.abs(logits), best)
        far = np.where(logits >= best, np.inf, np.abs(far))
        gaps = np.minimum(gaps, far.min(axis=-1) / logits.std())
    return gaps


def _settle_routers(draw: Draw, spec: ModelSpec, weights: TinyWeights, ids, dtype: str) -> None:
    """Redraw each router, layer by layer, until it decides clearly about every one of `ids`."""

    def settle(layer: int, name: str, h: np.ndarray) -> None:
        if name != "ffn_norm" or not spec.routed[layer]:
            return
        dense, router = weights.dense(layer), weights.dense(layer)["router"]
        scale = 1.5 / np.sqrt(spec.hidden)
        for _ in range(10_000):
            logits = reference.linear(h, router, dense.get("router_logit_bias"))
            if routing_gaps(spec, logits, dense).min() >= ROUTING_GAP:
                return
            router[:] = _rounded(draw.rng.normal(0, scale, router.shape), dtype)
        raise AssertionError("every router has a near tie: fewer ids or experts are needed")

    Forward(spec, weights, watch=settle).feed(ids)


# ---- files -------------------------------------------------------------------------------------

_SEGMENT_NAMES = {
    "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "shared_gate": "mlp.shared_expert_gate.weight", "router": "mlp.gate.weight",
} | {f"{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"} \
  | {f"{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"}  # fmt: skip
_MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_OPT_NAMES = {
    "attn_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm", "norm": "final_layer_norm",
    "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
} | {x: f"self_attn.{x}_proj" for x in "qkv"}  # fmt: skip


def _named_as_opt(draw: Draw, spec: ModelSpec, weights: TinyWeights) -> dict[str, np.ndarray]:
    prefix = draw.one(("model.decoder.", "decoder."))
    tensors = {f"{prefix}embed_tokens.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):
        tensors["lm_head.weight"] = weights.head()
    for (_, layer, _), bundle in weights.bundles.items():
        inner = "" if layer == spec.n_layers else f"layers.{layer}."
        for name, value in bundle.items():
            stem = name.removesuffix("_bias")
            if name == "positions":  # after two rows that belong to no position
                value, stem = np.concatenate([value[:2], value]), "embed_positions"
            kind = "weight" if stem in (name, "embed_positions") else "bias"
            tensors[f"{prefix}{inner}{_OPT_NAMES.get(stem, stem)}.{kind}"] = value
    return tensors


_FALCON_NAMES = {
    "o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    "norm": "ln_f",
}  # fmt: skip


def _named_as_falcon(draw: Draw, spec: ModelSpec, weights: TinyWeights) -> dict[str, np.ndarray]:
    prefix, two = draw.one(("transformer.", "")), spec.parallel and not spec.shared_norm
    norms = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    names = _FALCON_NAMES | dict(zip(("attn_norm", "ffn_norm"), norms, strict=True))
    tensors = {f"{prefix}word_embeddings.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):
        tensors["lm_head.weight"] = weights.head()
    for (_, layer, _), bundle in weights.bundles.items():
        base = prefix if layer == spec.n_layers else f"{prefix}h.{layer}."
        for name, value in bundle.items():
            stem = name.removesuffix("_bias")
            if stem in names:
                kind = "weight" if stem == name else "bias"
                tensors[f"{base}{names[stem]}.{kind}"] = value
        if "q" in bundle:  # keys and values stand after the queries that share them
            groups = [bundle[x].reshape(spec.n_kv_heads, -1, spec.hidden) for x in "qkv"]
            fused = np.concatenate(groups, axis=1).reshape(-1, spec.hidden)
            tensors[f"{base}self_attention.query_key_value.weight"] = fused
    return tensors


def _named(draw: Draw, spec: ModelSpec, weights: TinyWeights) -> dict[str, np.ndarray]:
    """Tensors by the names that hub checkpoints of the type use."""
    if spec.model_type == "opt":
        return _named_as_opt(draw, spec, weights)
    if spec.model_type == "falcon":
        return _named_as_falcon(draw, spec, weights)
    old_mixtral = spec.model_type == "mixtral" and draw.maybe(0.7)
    fused = draw.maybe(0.25) if spec.model_type != "mixtral" else not old_mixtral
    tensors = {"model.embed_tokens.weight": weights.table()}
    if not spec.tied or draw.maybe(0.2):  # some checkpoints keep a copy of what is tied
        tensors["lm_head.weight"] = weights.head()
    for (kind, layer, index), bundle in weights.bundles.items():
        prefix = f"model.layers.{layer}."
        if layer == spec.n_layers:
            tensors["model.norm.weight"] = bundle["norm"]
        elif kind == "dense":
            tensors |= {prefix + _SEGMENT_NAMES[name]: value for name, value in bundle.items()}
        elif kind != "expert" or not fused:
            inner = {"ffn": "", "shared": "shared_expert.", "expert": f"experts.{index}."}[kind]
            for name, value in bundle.items():
                part, _, bias = name.partition("_")
                tensors[f"{prefix}mlp.{inner}{part}_proj.{bias or 'weight'}"] = value
    for layer in range(spec.n_layers if fused else 0):
        if spec.routed[layer]:
            tensors |= _fused(weights, layer, spec.n_experts)
    if draw.maybe(0.1):  # early Llama checkpoints carry this buffer; it is no weight
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(spec.head_dim // 2)
    return {_mixtral_name(n): v for n, v in tensors.items()} if old_mixtral else tensors


def _fused(weights: TinyWeights, layer: int, n_experts: int) -> dict[str, np.ndarray]:
    """All experts of a layer in two 3-D tensors, as transformers 5 holds them."""
    experts = [weights.expert(layer, i) for i in range(n_experts)]
    gate_up = [np.concatenate([e["gate"], e["up"]]) for e in experts]
    prefix = f"model.layers.{layer}.mlp.experts."
    return {
        prefix + "gate_up_proj": np.stack(gate_up),
        prefix + "down_proj": np.stack([e["down"] for e in experts]),
    }


def _mixtral_name(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in _MIXTRAL_NAMES.items():
        name = name.replace(f".{ours}_proj.", f".{theirs}.")
    return name


def _write_weights(draw: Draw, folder: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    names = list(tensors)
    draw.rng.shuffle(names)
    if draw.maybe(0.6):
        write_safetensors(folder / "model.safetensors", tensors, names, dtype)
        return
    count = draw.whole(2, 4)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        write_safetensors(folder / file, tensors, names[i::count], dtype)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": {n: files[i % count] for i, n in enumerate(names)}},
    )


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], names, dtype: str) -> None:
    """The named tensors in one safetensors file: u64 header length, JSON header, data."""
    header, chunks, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name in names:
        data = _encode(tensors[name], dtype)
        span = [offset, offset + len(data)]
        kind = "U8" if tensors[name].dtype == np.uint8 else dtype
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": span}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with two special tokens, the 256 bytes and no merges: 258 tokens."""
    special = ["<s>", "</s>"]
    added = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in enumerate(special)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    vocab = {text: i for i, text in enumerate(special + byte_letters())}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": vocab, "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": model,
    }  # fmt: skip
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    )


def byte_letters() -> list[str]:
    """The printable letter that GPT-2's byte-level BPE writes for each byte, in order of bytes."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(b if b in kept else next(moved)) for b in range(256)]


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1))
