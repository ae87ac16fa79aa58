"""A GGUF file, or the files that one was split into, presented as a checkpoint."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path

from edgemem.errors import CheckpointError

from .configuration import config_of
from .families import OWN
from .header import MAGIC
from .metadata import Metadata
from .naming import renamed
from .tensors import GgufFile, GgufTensor
from .tokenizer import Vocabulary

_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_SPLITS = 9999
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def is_gguf(path: Path) -> bool:
    """Whether a path is to be read as GGUF: by its name, or by how the file starts."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class GgufCheckpoint:
    """An open GGUF checkpoint; close it, or use it in a `with` statement.

    It has what `Checkpoint` has: `config`, `generation` and `tokenizer_config` as a Hugging Face
    folder would have them, `tokenizer_json`, `chat_template`, and `tensors` by Hugging Face names
    (`stored`: by their own).
    Of a split file any part may be given. Raises CheckpointError or UnsupportedError, saying what
    is wrong with which file: at once if files are damaged, when it is asked for if something is
    not known here.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: list[GgufFile] = []
        try:
            self.stored = self._open()
            first = self.files[0]
            self.metadata = Metadata(first.path, first.metadata)
            self.generation = _generation(self.metadata)
            self.chat_template = self.metadata.text("tokenizer.chat_template", None)
        except BaseException:
            self.close()
            raise

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.metadata)

    @cached_property
    def config(self) -> dict:
        config, vocabulary = config_of(self.metadata, self.stored), self.vocabulary
        if vocabulary.size > config["vocab_size"]:
            raise CheckpointError(
                f"reading {self.metadata.path}: it has {vocabulary.size} tokens, and embeddings "
                f"for {config['vocab_size']}"
            )
        ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_ids}
        return config | ends

    @property
    def config_bytes(self) -> bytes:
        return json.dumps(self.config, sort_keys=True).encode()

    @property
    def tokenizer_json(self) -> bytes:
        return self.vocabulary.tokenizer_json

    @property
    def tokenizer_config(self) -> dict:
        return self.vocabulary.config

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        family = OWN.get(self.metadata.architecture)
        return renamed(self.stored, _interleaved(self.config, self.metadata), family)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> dict[str, GgufTensor]:
        """The tensors of all parts by GGUF names; the metadata is that of the first part."""
        tensors: dict[str, GgufTensor] = {}
        paths = self._parts()
        for number, path in enumerate(paths):
            file = GgufFile(path)
            self.files.append(file)
            if len(paths) > 1:
                self._check_part(file, number, len(paths))
            for name, tensor in file.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"reading {path}: tensor {name!r:.200} is in {tensors[name].file.path} too"
                    )
                tensors[name] = tensor
        first = self.files[0]
        count = first.metadata.get("split.count", 1)
        total = first.metadata.get("split.tensors.count", len(tensors))
        if count not in (0, len(paths)) or (count and total != len(tensors)):
            raise CheckpointError(
                f"reading {first.path}: it says that {total!r:.40} tensors are in {count!r:.40} "
                f"files; found {len(tensors)} in {len(paths)}: fetch all parts, keep their names"
            )
        return tensors

    def _parts(self) -> list[Path]:
        """The files in order, by the names that gguf-split gives them."""
        match = _SPLIT_NAME.fullmatch(self.path.name)
        count = int(match[3]) if match else 1
        if not match or not 1 <= count <= _MAX_SPLITS:
            return [self.path]
        return [
            self.path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf")
            for number in range(1, count + 1)
        ]

    def _check_part(self, file: GgufFile, number: int, count: int) -> None:
        says = (file.metadata.get("split.no"), file.metadata.get("split.count"))
        if says != (number, count):
            raise CheckpointError(
                f"reading {file.path}: it says that it is part {says[0]!r:.40} of {says[1]!r:.40}, "
                f"its name that it is part {number} of {count} (counted from 0)"
            )


def _generation(metadata: Metadata) -> dict:
    """What a generation_config.json would say of sampling."""
    found = {name: metadata.number(key) for key, name in _SAMPLING.items() if key in metadata}
    if "general.sampling.top_k" in metadata:
        found["top_k"] = metadata.count("general.sampling.top_k")
    return found


def _interleaved(config: dict, metadata: Metadata) -> dict[str, int]:
    """Parts of a layer whose rows llama.cpp interleaved within each of so many heads."""
    family = OWN.get(metadata.architecture)
    if metadata.architecture != "llama" and not getattr(family, "INTERLEAVED", False):
        return {}
    return {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
