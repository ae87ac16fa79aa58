"""What a checkpoint holds, and whether a store can be made of it, before any weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import STREAMABLE
from edgemem.spec import ModelSpec

from . import bundler, naming
from .checkpoint import Checkpoint, GgufCheckpoint, Tensor, open_checkpoint
from .checkpoint.gguf.tokenizer import words_of
from .configuration import describe
from .conversion import tokenizer_of

_ROPE_FACTORS = re.compile(r"rope_(freqs|factors_\w+)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|output|embed_out)\.weight")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|token_embd|wte|word_embeddings|embed_in)\.weight")
_FFN = re.compile(
    r"blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps|\.\d+)?\.(weight|bias)|"
    r".*\.(mlp|block_sparse_moe|feed_forward)\.(experts\.|((gate|up|down|gate_up)_proj\.)).*|"
    r".*\.(fc1|fc2|dense_h_to_4h|dense_4h_to_h)\.(weight|bias)"
)


@dataclass
class Inspection:
    """What a checkpoint holds.

    `dtype_bytes` are the bytes of its weights by type. `bundles` says, for each kind that occurs,
    the bundle_count and payload_bytes of the store that would be made of it as it is; then
    `parameters`, `dense_bytes` and `streamable_bytes` are that store's, else those of the weights,
    told apart by their names. `spec` is None where no config that edgemem knows was found.
    `obstacles` say why no store can be made; without any, edgemem runs it.
    """

    path: Path
    architecture: str
    file_count: int
    file_bytes: int
    tensor_count: int
    parameters: int
    dense_bytes: int
    streamable_bytes: int
    dtype_bytes: dict[str, int]
    generation: dict
    spec: ModelSpec | None = None
    bundles: dict[str, dict[str, int]] = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)
    obstacles: list[str] = field(default_factory=list)

    def attempt(self, step: Callable):
        """The step's result; where it fails, None and an obstacle."""
        try:
            return step()
        except (CheckpointError, UnsupportedError) as error:
            if str(error) not in self.obstacles:
                self.obstacles.append(str(error))


def inspect(path: Path) -> Inspection:
    """Inspect a Hugging Face folder or a GGUF file. Reads headers, and of a folder the tokenizer.

    Raises CheckpointError and UnsupportedError for what cannot be read as a checkpoint at all.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.stored
        weights = {n: t for n, t in tensors.items() if _is_weight(n)}
        total, streamable = sum(t.bytes for t in weights.values()), _streamable_bytes(weights)
        sizes = Counter()
        for tensor in weights.values():
            sizes[tensor.type_name.lower()] += tensor.bytes
        found = Inspection(
            path=path,
            architecture=_architecture(checkpoint),
            file_count=len(checkpoint.files),
            file_bytes=sum(file.bytes for file in checkpoint.files),
            tensor_count=len(tensors),
            parameters=sum(tensor.elements for tensor in weights.values()),
            dense_bytes=total - streamable,
            streamable_bytes=streamable,
            dtype_bytes=dict(sorted(sizes.items())),
            generation=checkpoint.generation,
        )
        _plan(found, checkpoint, weights)
        found.tokenizer = found.attempt(lambda: _tokenizer(found, checkpoint)) or {}
    return found


def _is_weight(name: str) -> bool:
    return naming.is_weight(name) and not _ROPE_FACTORS.fullmatch(name)


def _architecture(checkpoint: Checkpoint | GgufCheckpoint) -> str:
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.metadata.architecture
    return str(checkpoint.config.get("model_type") or "unknown")


def _streamable_bytes(weights: dict[str, Tensor]) -> int:
    """Bytes of what streams, by names: FFNs, experts, and an embedding that is no head as well."""
    untied = any(map(_HEAD.fullmatch, weights))
    return sum(
        tensor.bytes
        for name, tensor in weights.items()
        if _FFN.fullmatch(name) or (untied and _EMBEDDING.fullmatch(name))
    )


def _plan(found: Inspection, checkpoint, weights: dict[str, Tensor]) -> None:
    """What the store would be, or what is in its way: the config, or types of weights."""
    description = found.attempt(lambda: describe(checkpoint.config, checkpoint.generation))
    first_of_type = {tensor.type_name: tensor for tensor in reversed(weights.values())}
    types = [found.attempt(lambda t=tensor: t.dtype) for tensor in first_of_type.values()]
    if description is None:
        return
    found.spec = description.spec
    if None in types:
        return
    plan = found.attempt(lambda: bundler.plan(description, checkpoint.tensors, "keep"))
    if plan is None:
        return
    found.spec = plan.spec
    found.parameters = found.dense_bytes = found.streamable_bytes = 0
    for bundle in plan.bundles:
        size, kind = bundle.layout.payload_bytes, bundle.kind
        counts = found.bundles.setdefault(
            kind.name.lower(), {"bundle_count": 0, "payload_bytes": 0}
        )
        found.parameters += sum(s.rows * s.cols for s in bundle.layout.segments)
        counts["bundle_count"] += 1
        counts["payload_bytes"] += size
        found.streamable_bytes += size * (kind in STREAMABLE)
        found.dense_bytes += size * (kind not in STREAMABLE)


def _tokenizer(found: Inspection, checkpoint: Checkpoint | GgufCheckpoint) -> dict:
    """As `edgemem inspect` says it of a store; of GGUF, no tokenizer is made."""
    facts = {"has_chat_template": checkpoint.chat_template is not None}
    if isinstance(checkpoint, GgufCheckpoint):
        found.attempt(lambda: words_of(checkpoint.metadata))
        vocabulary = checkpoint.vocabulary
        ends = {"bos_id": vocabulary.bos_id, "eos_ids": vocabulary.eos_ids}
        return {"vocab_size": len(vocabulary.ids)} | ends | facts
    ends = {"bos_id": None, "eos_ids": []}
    if found.spec:
        ends = {"bos_id": found.spec.bos_id, "eos_ids": list(found.spec.eos_ids)}
    return {"vocab_size": tokenizer_of(checkpoint).vocab_size} | ends | facts
