"""Where a model's segments are found in a checkpoint: names of tensors, and rows within them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from edgemem.format import Kind, Part
from edgemem.spec import ModelSpec

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints carry, and that are computed from the config."""

_DENSE = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "shared_gate": "mlp.shared_expert_gate.weight",
}
_OPT = {
    "norm": "final_layer_norm", "attn_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
}  # fmt: skip
_OPT_FIRST_POSITION = 2
"""The row of position 0: what fairseq kept for padding comes before it."""
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_MOE_BLOCKS = ("mlp", "block_sparse_moe")
"""What holds the experts: transformers 5 renames Mixtral's on loading; files have either."""


@dataclass(frozen=True)
class Source:
    """Rows of a tensor that become a segment: `first_row` counts with leading axes taken as one."""

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0


_PREFIXES = ("", "decoder.", "model.decoder.")


def prefix_of(names: Iterable[str]) -> str:
    """ "model." as causal language models save it, or "" as the bare model inside them does; where
    OPT has its decoder, there."""
    names = set(names)
    return next((prefix for prefix in _PREFIXES if prefix + EMBED in names), "model.")


def is_weight(name: str) -> bool:
    """Whether a tensor that nobody asked for may not be ignored."""
    return not _NOT_WEIGHTS.fullmatch(name)


def sources(
    spec: ModelSpec, prefix: str, kind: Kind, layer: int, index: int, part: Part
) -> list[Source]:
    """Where a segment may be, in order of preference; a checkpoint has one of them."""
    shape = (part.cols,) if part.lanes == 1 else (part.rows, part.cols)
    if spec.model_type == "opt":
        return [_opt_source(spec, prefix, layer, part, shape)]
    if layer == spec.n_layers:
        return [Source(f"{prefix}norm.weight", shape)]
    base = f"{prefix}layers.{layer}."
    if kind == Kind.EXPERT:
        return _expert_sources(spec, base, index, part)
    if part.name == "router":
        return [Source(f"{base}{block}.gate.weight", shape) for block in _MOE_BLOCKS]
    if part.name in _DENSE:
        return [Source(base + _DENSE[part.name], shape)]
    block = {Kind.DENSE: "self_attn", Kind.FFN: "mlp", Kind.SHARED: "mlp.shared_expert"}[kind]
    stem, _, bias = part.name.partition("_")
    return [Source(f"{base}{block}.{stem}_proj.{bias or 'weight'}", shape)]


def _opt_source(spec: ModelSpec, prefix: str, layer: int, part: Part, shape: tuple) -> Source:
    if part.name == "positions":
        rows = part.rows + _OPT_FIRST_POSITION
        name = f"{prefix}embed_positions.weight"
        return Source(name, (rows, part.cols), _OPT_FIRST_POSITION)
    stem, bias = part.name.removesuffix("_bias"), part.name.endswith("_bias")
    base = prefix if layer == spec.n_layers else f"{prefix}layers.{layer}."
    return Source(f"{base}{_OPT[stem]}.{'bias' if bias else 'weight'}", shape)


def _expert_sources(spec: ModelSpec, base: str, expert: int, part: Part) -> list[Source]:
    """One tensor an expert, or one for all of them: gate above up as transformers 5 has it, or
    apart as GGUF has it."""
    shape, experts, rows = (part.rows, part.cols), spec.n_experts, part.rows
    if part.name == "down":
        fused, fused_shape, first = "down_proj", (experts, *shape), expert * rows
    else:
        fused, fused_shape = "gate_up_proj", (experts, 2 * rows, part.cols)
        first = (2 * expert + (part.name == "up")) * rows
    found = []
    for block in _MOE_BLOCKS:
        own = f"{base}{block}.experts.{expert}."
        found.append(Source(f"{own}{part.name}_proj.weight", shape))
        found.append(Source(f"{own}{_MIXTRAL[part.name]}.weight", shape))
        found.append(Source(f"{base}{block}.experts.{fused}", fused_shape, first))
        if part.name != "down":
            apart = f"{base}{block}.experts.{part.name}_proj"
            found.append(Source(apart, (experts, *shape), expert * rows))
    return found
