"""A GGUF file whose matrices are in every format of blocks, for the golden store `mixed`.

Its blocks are painted byte by byte; what they mean is for the gguf package to say.
"""

from pathlib import Path

import gguf
import numpy as np
import tiny_gguf
from edgemem.converters.ggml import FIELDS
from gguf import GGMLQuantizationType as Type

from edgemem.dtypes import BY_NAME
from edgemem.format import Kind, bundle_order, bundle_parts
from edgemem.spec import ModelSpec

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip
_TYPES = (
    {"q": Type.Q2_K, "k": Type.Q3_K, "v": Type.Q4_K, "o": Type.Q4_1, "gate": Type.Q5_K,
     "up": Type.Q6_K, "down": Type.Q5_0},
    {"q": Type.IQ4_XS, "k": Type.IQ4_NL, "v": Type.MXFP4, "o": Type.Q5_1, "gate": Type.Q8_0,
     "up": Type.Q4_0, "down": Type.MXFP4},
)  # fmt: skip
"""Of each layer's matrices; rows of `o` and `down` are as short as one block of 32."""
_TABLE = Type.Q6_K


def _painted(kind: Type, rows: int, cols: int, seed: int) -> np.ndarray:
    """uint8 [rows, row_bytes]: bytes that count in a prime cycle, scales from 1/64 to 4/64."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    numbers = np.arange(rows * cols // block * size) * 7 + seed * 31
    blocks = (numbers % 251).astype(np.uint8).view(FIELDS[BY_NAME[kind.name.lower()]])
    scales = (1 + np.arange(len(blocks)) % 4) / 64
    for name in ("d", "min"):
        if name in blocks.dtype.names:
            blocks[name] = scales.astype(np.float16).view(np.uint16)
    if "e" in blocks.dtype.names:
        blocks["e"] = 120 + np.arange(len(blocks)) % 4
    return blocks.view(np.uint8).reshape(rows, -1)


def _rows(spec: ModelSpec):
    """Kind, layer, segment, type and rows of every matrix and vector, the table's last."""
    for kind, layer, _ in bundle_order(spec, range(spec.n_layers + 1)):
        for position, part in enumerate(bundle_parts(spec, kind, layer)):
            if part.optional:
                continue
            if part.rows == 1:
                values = (np.arange(part.cols) * 5 % 251 + 1).astype(np.float32) / 128
                yield kind, layer, part.name, Type.F32, values[None]
                continue
            type = _TYPES[layer][part.name]
            seed = 10 * layer + position
            yield kind, layer, part.name, type, _painted(type, part.rows, part.cols, seed)
    yield Kind.HEAD, 0, "rows", _TABLE, _painted(_TABLE, spec.vocab_size, spec.hidden, 7)


def weights(spec: ModelSpec) -> dict[tuple[Kind, int, int], dict[str, np.ndarray]]:
    """Every weight by bundle and segment."""
    found: dict = {}
    for kind, layer, part, type, rows in _rows(spec):
        values = rows if type == Type.F32 else gguf.quants.dequantize(rows, type)
        found.setdefault((kind, layer, 0), {})[part] = values
    return found


def write(spec: ModelSpec, path: Path) -> None:
    """The painted blocks as a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    tiny_gguf.write_metadata(writer, spec)
    tiny_gguf.write_vocabulary(writer, spec)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_int32("general.sampling.top_k", 20)
    for kind, layer, part, type, rows in _rows(spec):
        name = "token_embd.weight"
        if kind != Kind.HEAD:
            name = tiny_gguf.name_of(kind.name.lower(), layer, part)
            heads = tiny_gguf.heads_of(spec, name)
            rows = tiny_gguf.interleaved(rows, heads) if heads else rows
        writer.add_tensor(name, rows[0] if type == Type.F32 else rows, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
