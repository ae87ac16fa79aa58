"""Makes the golden stores of this folder: python tests/golden/make.py (from the root, once a
version).

Each is converted from a checkpoint whose weights are painted so that the store's number format
holds them exactly (`mixed_gguf.py`: in all formats of GGUF's blocks). A golden store is never made
again: a new version of the format adds new ones, and the old ones must go on opening.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mixed_gguf
import tiny
from edgemem.converters import calibrated, naming
from edgemem.converters.configuration import describe

from edgemem import converters
from edgemem.dtypes import U32
from edgemem.format import Kind, bundle_order, bundle_parts, neuron_parts
from edgemem.predictors.low_rank import Predictor
from edgemem.spec import ModelSpec
from edgemem.store import Store

FOLDER = Path(__file__).resolve().parent
_BOTH = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272,
    "intermediate_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": [1, 2],
}  # fmt: skip
_CONFIGS = {
    "dense": {
        "model_type": "llama", "num_hidden_layers": 1, "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "neurons": {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_act": "relu", "hidden_size": 64,
        "mlp_bias": True,
    },
    "foretold": {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_act": "relu", "hidden_size": 64,
        "mlp_bias": True,
    },
    "mixed": mixed_gguf.CONFIG,
    "resting": {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64,
        "tie_word_embeddings": True,
    },
    "routed": {
        "model_type": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [1], "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 32, "sliding_window": 16, "use_sliding_window": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """One golden store: its checkpoint's shape and number format, and what it was converted to."""

    shape: str
    source: str
    dtype: str

    @property
    def path(self) -> Path:
        name = self.source.lower() if self.dtype == "keep" else self.dtype
        return FOLDER / f"v1.0-{self.shape}-{name}.edgemem"

    @property
    def config(self) -> dict:
        return _BOTH | _CONFIGS[self.shape]

    @property
    def neurons(self) -> bool:
        """Whether its FFNs are taken apart."""
        return self.shape in ("neurons", "foretold", "resting")

    @property
    def spec(self) -> ModelSpec:
        """What its store says of the model, but for what generation defaults add."""
        spec = describe(self.config, {}).spec
        ranks = (32, 32) if self.shape == "foretold" else ()
        thresholds = (0.25,) if self.shape == "resting" else ()
        return replace(spec, neurons=self.neurons, ranks=ranks, thresholds=thresholds)

    def convert(self, source: Path, target: Path) -> None:
        """As the golden store was made."""
        if self.source == "GGUF":
            source = source / "painted.gguf"
        if not self.spec.ranks and not self.spec.thresholds:
            converters.convert(source, target, self.dtype, neurons=self.neurons)
            return
        plain, found = source / "plain.edgemem", weights(self)
        converters.convert(source, plain, self.dtype, neurons=True)
        if self.spec.thresholds:
            with Store.open(plain) as store:
                calibrated.write_thresholds(store, target, self.spec.thresholds, {"used": 0.5})
            return
        bundles = (found[Kind.PREDICTOR, layer, 0] for layer in range(self.spec.n_layers))
        predictors = [Predictor(b["reduce"], b["score"], b["score_bias"][0]) for b in bundles]
        with Store.open(plain) as store:
            order = np.arange(self.spec.intermediate)[::-1] ^ 1
            orders = [order] * self.spec.n_layers
            calibrated.write(store, target, predictors, orders, lambda path: {"recall": 0.5})


GOLDEN = (
    Golden("dense", "F32", "keep"),
    Golden("dense", "F16", "keep"),
    Golden("neurons", "F16", "keep"),
    Golden("neurons", "F16", "q8_0"),
    Golden("foretold", "F16", "q8_0"),
    Golden("resting", "F16", "keep"),
    Golden("mixed", "GGUF", "keep"),
    Golden("routed", "BF16", "keep"),
    Golden("routed", "BF16", "q8_0"),
    Golden("routed", "BF16", "q4_0"),
)


def paint(seed: int, rows: int, cols: int, steps: int) -> np.ndarray:
    """Multiples of 1/steps (128 or 8) whose block scale is 1/steps, so quantising them is exact.

    They count in a prime cycle; each block of 32 holds the largest quant of its format.
    """
    cycle = {128: 251, 8: 15}[steps]
    quants = (np.arange(rows * cols) * 7 + seed * 31) % cycle - cycle // 2
    quants = quants.reshape(rows, cols)
    quants[:, ::32] = {128: 127, 8: -8}[steps]
    return (quants / steps).astype(np.float32)


def weights(golden: Golden) -> dict[tuple[Kind, int, int], dict[str, np.ndarray]]:
    """Every weight by bundle and segment; the vocabulary tables under (EMBED or HEAD, 0, 0)."""
    if golden.source == "GGUF":
        return mixed_gguf.weights(golden.spec)
    spec, biases = golden.spec, describe(golden.config, {}).biases
    steps = 8 if golden.dtype == "q4_0" else 128
    found: dict = {}
    for kind, layer, index in bundle_order(spec, range(spec.n_layers + 1)):
        parts = bundle_parts(spec, kind, layer)
        found[kind, layer, index] = {
            part.name: paint(100 * layer + 10 * index + position, part.rows, part.cols, steps)
            for position, part in enumerate(parts)
            if part.dtype is not U32 and (not part.optional or part.name in biases)
        }
    for layer in range(spec.n_layers) if spec.ranks else ():
        ffn, rows = found[Kind.FFN, layer, 0], found[Kind.NEURONS, layer, 0]["neurons"]
        rows[:, : spec.hidden] = ffn["gate"]
        biases = {name: value for name, value in ffn.items() if name.endswith("bias")}
        found[Kind.PREDICTOR, layer, 0].update(biases)
    for kind in (Kind.EMBED, Kind.HEAD)[spec.tied :]:
        found[kind, 0, 0] = {"rows": paint(7 + kind, spec.vocab_size, spec.hidden, 128)}
    return found


def write_checkpoint(golden: Golden, folder: Path) -> None:
    """The painted weights as a checkpoint directory."""
    spec = describe(golden.config, {}).spec
    folder.mkdir(parents=True, exist_ok=True)
    if golden.source == "GGUF":
        mixed_gguf.write(spec, folder / "painted.gguf")
        return
    tensors = {}
    for (kind, layer, index), bundle in weights(golden).items():
        if kind == Kind.PREDICTOR:
            continue
        if kind == Kind.NEURONS:
            up, down = np.split(bundle["neurons"], neuron_parts(golden.spec), axis=1)[-2:]
            kind, bundle = Kind.FFN, {"up": up, "down": down.T}
        for name, value in bundle.items():
            if name == "rows":
                output = kind == Kind.HEAD and not spec.tied
                tensors["lm_head.weight" if output else "model.embed_tokens.weight"] = value
                continue
            parts = {p.name: p for p in bundle_parts(spec, kind, layer)}
            source = naming.sources(spec, "model.", kind, layer, index, parts[name])[0]
            tensors[source.tensor] = value.reshape(source.shape)
    tiny.write_safetensors(folder / "model.safetensors", tensors, sorted(tensors), golden.source)
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(golden.config))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def main() -> None:
    import tempfile

    for golden in GOLDEN:
        if golden.path.exists():
            print(f"kept  {golden.path.name}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(golden, Path(folder) / "painted")
            golden.convert(Path(folder) / "painted", golden.path)
        print(f"made  {golden.path.name}")


if __name__ == "__main__":
    main()
