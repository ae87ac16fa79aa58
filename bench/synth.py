"""Checkpoints of real shapes with random weights: `python -m bench.synth SHAPE FOLDER`."""

import json
import sys
from pathlib import Path

import numpy as np

SHAPES = {
    "llama-0.6b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama checkpoint's tensors, in file order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (hidden,)), ("self_attn.q_proj", (heads, hidden)),
            ("self_attn.k_proj", (kv_heads, hidden)), ("self_attn.v_proj", (kv_heads, hidden)),
            ("self_attn.o_proj", (hidden, heads)), ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def write_checkpoint(config: dict, folder: Path, seed: int = 0) -> int:
    """Write a bf16 checkpoint with weights of variance 1/columns; returns its parameter count."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    header, end = {}, 0
    for name, shape in tensors(config).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors(config).values():
            _write_tensor(file, shape, random)
    return end // 2


def _write_tensor(file, shape: tuple[int, ...], random: np.random.Generator) -> None:
    if len(shape) == 1:
        file.write(np.full(shape, 0x3F80, np.uint16).tobytes())  # 1.0
        return
    rows = max(1, (1 << 22) // shape[1])
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), shape[1])
        values = random.standard_normal(size, np.float32) * np.float32(shape[1] ** -0.5)
        file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _tokenizer() -> dict:
    """A vocabulary of bytes: enough for a checkpoint that is fed token ids."""
    vocab = {"<s>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    special = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **special} for i, t in enumerate(("<s>", "</s>"))],
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: python -m bench.synth {{{','.join(SHAPES)}}} FOLDER")
    parameters = write_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
