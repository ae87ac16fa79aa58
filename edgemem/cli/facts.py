"""What `edgemem inspect` says: facts for programs, and the same in lines for people."""

from __future__ import annotations

from pathlib import Path

from .. import converters, inventory
from ..budget import show_size
from ..kvcache import token_bytes
from ..store import Store
from ..tokenizer import Tokenizer


def of(path: Path) -> dict:
    """All facts about a checkpoint or a store."""
    if converters.is_checkpoint(path):
        return describe_checkpoint(converters.inspect(path))
    with Store.open(path) as store:
        return describe(store)


def describe_checkpoint(found: converters.Inspection) -> dict:
    """All facts about a checkpoint, as plain JSON types; what a store says too is called alike."""
    spec = found.spec
    return {
        "path": str(found.path),
        "file_count": found.file_count,
        "file_bytes": found.file_bytes,
        "architecture": found.architecture,
        "spec": spec and spec.to_dict(),
        "parameters": found.parameters,
        "tensor_count": found.tensor_count,
        "dense_bytes": found.dense_bytes,
        "streamable_bytes": found.streamable_bytes,
        "kv_bytes_per_token": spec and token_bytes(spec),
        "bundles": found.bundles,
        "dtype_bytes": found.dtype_bytes,
        "tokenizer": found.tokenizer,
        "generation": found.generation,
        "runs": not found.obstacles,
        "obstacles": found.obstacles,
    }


def describe(store: Store) -> dict:
    """All facts about an open store, as plain JSON types."""
    kinds = inventory.by_kind(store)
    streamable_names = {kind.name.lower() for kind in inventory.STREAMABLE}
    streamable = sum(k["payload_bytes"] for name, k in kinds.items() if name in streamable_names)
    tokenizer = Tokenizer(store.tokenizer_json, store.tokenizer_config)
    return {
        "path": str(store.path),
        "file_bytes": store.file_bytes,
        "page_size": store.page_size,
        "spec": store.spec.to_dict(),
        "parameters": inventory.parameter_count(store),
        "dense_bytes": sum(k["payload_bytes"] for k in kinds.values()) - streamable,
        "streamable_bytes": streamable,
        "kv_bytes_per_token": token_bytes(store.spec),
        "bundles": kinds,
        "dtype_bytes": inventory.by_dtype(store),
        "layouts": [layout.to_json() for layout in store.layouts],
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "bos_id": store.spec.bos_id,
            "eos_ids": list(store.spec.eos_ids),
            "has_chat_template": store.chat_template is not None,
        },
        "generation": store.generation,
        "recipe": store.recipe,
        "provenance": store.provenance,
    }


def summarize(facts: dict) -> list[tuple[str, str]]:
    """Facts for people: (name, text) of each line."""
    spec, bundles = facts["spec"], facts["bundles"].items()
    kind = spec["model_type"] if spec else ascii(facts["architecture"])[1:-1][:60]
    sizes = " · ".join(f"{name} {show_size(size)}" for name, size in facts["dtype_bytes"].items())
    lines = [("model", f"{kind}, {facts['parameters'] / 1e6:,.1f} M parameters")]
    if spec:
        lines += [
            ("layers", f"{spec['n_layers']} of width {spec['hidden']}, {_ffn(spec)}"),
            ("attention", _attention(spec)),
            ("context", _context(facts)),
        ]
    if facts["tokenizer"]:
        lines.append(("tokenizer", _tokenizer(facts["tokenizer"], spec)))
    lines += [
        ("formats", sizes),
        ("dense", f"{show_size(facts['dense_bytes'])} that every token needs at hand"),
        (
            "streamable",
            f"{show_size(facts['streamable_bytes'])} of experts and feed-forward networks",
        ),
    ]
    if bundles:
        lines.append(("bundles", " · ".join(_bundles(name, kind) for name, kind in bundles)))
    return lines + (_of_checkpoint(facts) if "runs" in facts else _of_store(facts))


def _of_store(facts: dict) -> list[tuple[str, str]]:
    recipe = ", ".join(f"{name} {value}" for name, value in facts["recipe"].items())
    return [
        ("file", f"{show_size(facts['file_bytes'])} in pages of {facts['page_size']} bytes"),
        ("recipe", recipe),
        ("source", str(facts["provenance"].get("checkpoint", "unknown"))),
    ]


def _of_checkpoint(facts: dict) -> list[tuple[str, str]]:
    count, size = facts["file_count"], show_size(facts["file_bytes"])
    files = ("file", size) if count == 1 else ("files", f"{count}, {size}")
    answers = [f"no: {why}" for why in facts["obstacles"]] or ["yes"]
    return [files, *(("runs", answer) for answer in answers)]


def _ffn(spec: dict) -> str:
    """The feed-forward parts; with how many layers have each where layers differ."""
    n_routed = sum(spec["routed"])
    n_dense = spec["n_layers"] - n_routed
    apart = " by neuron" if spec.get("neurons") else ""
    parts = {f"FFN {spec['intermediate']}{apart}": n_dense, _experts(spec): n_routed}
    mixed = n_dense and n_routed
    texts = [f"{count} × {text}" if mixed else text for text, count in parts.items() if count]
    return ", ".join([*texts, spec["activation"]])


def _experts(spec: dict) -> str:
    shared = spec["shared_intermediate"]
    text = (
        f"{spec['n_experts']} experts of {spec['expert_intermediate']}, {spec['top_k']} per token"
    )
    return f"{text} and one shared of {shared}" if shared else text


def _attention(spec: dict) -> str:
    windows = sorted({window for window in spec["windows"] if window})
    latent = spec.get("latent")
    shared = f"latents of {latent}" if latent else f"{spec['n_kv_heads']} for keys and values"
    parts = [f"{spec['n_heads']} heads of {spec['head_dim']}, {shared}"]
    if spec.get("sinks"):
        parts.append("sinks")
    if windows:
        count = sum(map(bool, spec["windows"]))
        parts.append(f"window {'/'.join(map(str, windows))} in {count} layers")
    if spec.get("positions") == "learned":
        return ", ".join([*parts, "learned positions"])
    return ", ".join([*parts, _rope(spec["rope"])])


def _rope(rope: dict) -> str:
    """What is rotated, and by what: of longrope no factor says how long texts may be."""
    part = f" of {rope['dims']} numbers" if rope.get("dims") else ""
    scaled = {
        "default": "",
        "longrope": f" longrope, long beyond {rope['original_positions']} tokens",
    }.get(rope["type"], f" {rope['type']} × {rope['factor']:g}")
    return f"RoPE {rope['theta']:g}{part}{scaled}"


def _context(facts: dict) -> str:
    per_token = show_size(facts["kv_bytes_per_token"])
    return f"{facts['spec']['max_positions']} tokens, {per_token} of KV cache each, at f16"


def _tokenizer(tokenizer: dict, spec: dict | None) -> str:
    rows = spec["vocab_size"] if spec else tokenizer["vocab_size"]
    padded = f" of {rows} rows" if rows != tokenizer["vocab_size"] else ""
    bos = "none" if tokenizer["bos_id"] is None else tokenizer["bos_id"]
    eos = ", ".join(map(str, tokenizer["eos_ids"])) or "none"
    chat = ", chat template" if tokenizer["has_chat_template"] else ""
    return f"{tokenizer['vocab_size']} tokens{padded}, BOS {bos}, EOS {eos}{chat}"


def _bundles(name: str, kind: dict) -> str:
    return f"{kind['bundle_count']} {name} {show_size(kind['payload_bytes'])}"
