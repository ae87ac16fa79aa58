"""GGUF's names of tensors → Hugging Face's, and what their shapes become.

The names are those of gguf-py's constants.py (MODEL_TENSOR); experts lie in one tensor for each of
gate, up and down, or, in the first files with experts, in one tensor an expert.
"""

import re
from dataclasses import replace
from types import ModuleType

from .tensors import GgufTensor

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: what each rotary frequency is divided by (see `rope`)."""
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
"""The same for longrope, for short and for long sequences."""

_LAYERS = "model.layers."
_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {
    "ffn_gate_exps.weight": "gate_proj",
    "ffn_up_exps.weight": "up_proj",
    "ffn_down_exps.weight": "down_proj",
    "ffn_gate_up_exps.weight": "gate_up_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,6})\.(.+)")
_EXPERT = re.compile(r"ffn_(gate|up|down)\.(0|[1-9][0-9]{0,6})\.weight")


def renamed(
    tensors: dict[str, GgufTensor], heads: dict[str, int], family: ModuleType | None = None
) -> dict[str, GgufTensor]:
    """Tensors by Hugging Face names, in part a family's own; those that have none keep theirs.

    `heads` says for which parts of a layer ("attn_q") the rows of that many heads are interleaved.
    """
    found = {}
    for name, tensor in tensors.items():
        if name in (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS):
            continue
        layer = _LAYER.fullmatch(name)
        if layer:
            count = heads.get(layer[2].rpartition(".")[0], 0)
            if count and tensor.shape[0] % (2 * count) == 0:
                tensor = replace(tensor, heads=count)
            if layer[2] == "ffn_gate_inp_shexp.weight" and len(tensor.shape) == 1:
                tensor = replace(tensor, shape=(1, *tensor.shape))
        found[_own_name(name, layer, family) or _name(name, layer)] = tensor
    return found


def _own_name(name: str, layer: re.Match | None, family: ModuleType | None) -> str | None:
    if not layer:
        return getattr(family, "TABLES", {}).get(name)
    stem, _, kind = layer[2].rpartition(".")
    own = getattr(family, "NAMES", {}).get(stem)
    return own and f"{getattr(family, 'LAYERS', _LAYERS)}{layer[1]}.{own}.{kind}"


def _name(name: str, layer: re.Match | None) -> str:
    if not layer:
        return _TABLES.get(name, name)
    base, rest = f"{_LAYERS}{layer[1]}.", layer[2]
    if rest in _EXPERTS:
        return f"{base}mlp.experts.{_EXPERTS[rest]}"
    expert = _EXPERT.fullmatch(rest)
    if expert:
        return f"{base}mlp.experts.{expert[2]}.{expert[1]}_proj.weight"
    stem, _, kind = rest.rpartition(".")
    if stem in _IN_LAYER and kind in ("weight", "bias"):
        return f"{base}{_IN_LAYER[stem]}.{kind}"
    return name
