"""A Hugging Face checkpoint directory: config, tokenizer, templates, tensors of all shards."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgemem.errors import CheckpointError, UnsupportedError
from edgemem.format import parse_json

from .mxfp4 import joined
from .tensors import Tensor, TensorFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_JSON_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")
_FOREIGN = ("pytorch_model*.bin", "consolidated*.pth", "*.gguf", "*.onnx", "tf_model.h5")


class Checkpoint:
    """An open checkpoint; close it, or use it in a `with` statement.

    `config`, `generation` and `tokenizer_config` are JSON objects (empty where optional and
    absent), `tokenizer_json` the bytes of that file, `chat_template` Jinja source or None,
    `tensors` every tensor by name, as is `stored`. Raises CheckpointError or UnsupportedError,
    saying what is wrong with which file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: list[TensorFile] = []
        if not os.path.isdir(path):
            raise CheckpointError(
                f"reading {path}: it is not a directory, nor a GGUF file; give the directory that "
                "holds config.json, or a .gguf file"
            )
        self.config_bytes = self._read("config.json", _MAX_JSON_BYTES)
        if self.config_bytes is None:
            raise CheckpointError(
                f"reading {path}: it holds no config.json, so it is no checkpoint"
            )
        self.config = self._object("config.json", self.config_bytes)
        self.generation = self._optional("generation_config.json")
        self.tokenizer_json = self._tokenizer()
        self.tokenizer_config = self._optional("tokenizer_config.json")
        self.chat_template = self._chat_template(self.tokenizer_config.pop("chat_template", None))
        try:
            self.tensors = self.stored = joined(self._open_tensors())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a small file, None where there is none."""
        file = self.path / name
        try:
            if not file.exists():
                return None
            if not file.is_file():
                raise CheckpointError(f"reading {file}: it is not a file")
            with file.open("rb") as opened:
                data = opened.read(limit + 1)
        except OSError as error:
            raise CheckpointError(f"reading {file}: {error.strerror}") from error
        if len(data) > limit:
            raise CheckpointError(f"reading {file}: it is larger than {limit} bytes")
        return data

    def _object(self, name: str, data: bytes) -> dict:
        try:
            value = parse_json(data)
        except ValueError as error:
            raise CheckpointError(f"reading {self.path / name}: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"reading {self.path / name}: it is not a JSON object")
        return value

    def _optional(self, name: str) -> dict:
        data = self._read(name, _MAX_JSON_BYTES)
        return {} if data is None else self._object(name, data)

    def _tokenizer(self) -> bytes:
        data = self._read("tokenizer.json", _MAX_TOKENIZER_BYTES)
        if data:
            return data
        if data is not None:
            file = self.path / "tokenizer.json"
            raise CheckpointError(f"reading {file}: it is empty; fetch it again")
        others = [
            n for n in ("tokenizer.model", "vocab.json", "tekken.json") if (self.path / n).exists()
        ]
        if others:
            raise UnsupportedError(
                f"reading {self.path}: its tokenizer is of another kind ({', '.join(others)}); "
                "load it with transformers' AutoTokenizer and save it, which makes a tokenizer.json"
            )
        raise CheckpointError(f"reading {self.path}: it holds no tokenizer.json; fetch it as well")

    def _chat_template(self, configured) -> str | None:
        """chat_template.jinja, else the configured text, else the default among named ones."""
        data = self._read("chat_template.jinja", _MAX_JSON_BYTES)
        if data is not None:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"reading {self.path}/chat_template.jinja: {error}") from None
        if isinstance(configured, list):
            named = {
                item.get("name"): item.get("template")
                for item in configured
                if isinstance(item, dict) and isinstance(item.get("name"), str)
            }
            configured = named.get("default", *(named.values() if len(named) == 1 else (None,)))
        if not isinstance(configured, str | None):
            file = self.path / "tokenizer_config.json"
            raise CheckpointError(
                f"reading {file}: chat_template is neither text nor a list of them"
            )
        return configured

    def _open_tensors(self) -> dict[str, Tensor]:
        """As transformers does: the single file if it is there, else the shards of the index."""
        if (self.path / SINGLE).exists():
            return self._open_file(SINGLE).tensors
        data = self._read(INDEX, _MAX_JSON_BYTES * 4)
        if data is None:
            raise self._no_tensors()
        weight_map = self._object(INDEX, data).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"reading {self.path / INDEX}: it has no weight_map")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise CheckpointError(
                    f"reading {self.path / INDEX}: {shard!r:.200} is no name of a file beside it"
                )
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(weight_map.values())):
            for name, tensor in self._open_file(shard).tensors.items():
                if name in tensors:
                    other = tensors[name].file.path
                    raise CheckpointError(
                        f"reading {self.path / shard}: tensor {name!r:.200} is in {other} as well"
                    )
                tensors[name] = tensor
        self._check_map(weight_map, tensors)
        return tensors

    def _check_map(self, weight_map: dict, tensors: dict[str, Tensor]) -> None:
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.path.name != shard:
                raise CheckpointError(
                    f"reading {self.path / shard}: tensor {name!r:.200} should be in it and is not"
                )

    def _open_file(self, name: str) -> TensorFile:
        file = TensorFile(self.path / name)
        self.files.append(file)
        return file

    def _no_tensors(self) -> CheckpointError:
        found = [f.name for pattern in _FOREIGN for f in sorted(self.path.glob(pattern))]
        if found and found[0].endswith(".gguf"):
            return CheckpointError(
                f"reading {self.path}: its weights are in {found[0]}; give that file itself"
            )
        if found:
            return CheckpointError(
                f"reading {self.path}: its weights are in {found[0]}; only safetensors can be "
                "read: load it with transformers and save it with save_pretrained"
            )
        return CheckpointError(f"reading {self.path}: it holds neither {SINGLE} nor {INDEX}")
