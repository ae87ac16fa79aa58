"""The meta section: what a store says about itself in JSON; strict reading of untrusted JSON."""

import json
import math
from dataclasses import dataclass, field

from ..errors import CorruptError, EdgeMemError
from ..spec import ModelSpec
from .layout import Layout


@dataclass(frozen=True)
class Meta:
    """What a store says in JSON: the model, the layout classes and where it all came from."""

    spec: ModelSpec
    layouts: tuple[Layout, ...]
    chat_template: str | None = None
    generation: dict = field(default_factory=dict)
    tokenizer_config: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)


_META_DICTS = ("generation", "tokenizer_config", "provenance", "recipe")


def encode_meta(meta: Meta) -> bytes:
    """Canonical JSON: the same meta always gives the same bytes."""
    data = {name: getattr(meta, name) for name in _META_DICTS}
    data["spec"] = meta.spec.to_dict()
    data["layouts"] = [layout.to_json() for layout in meta.layouts]
    data["chat_template"] = meta.chat_template
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def decode_meta(data: bytes) -> Meta:
    """Raises CorruptError, or UnsupportedError for what only a newer version knows."""
    try:
        parsed = parse_json(data, unique_keys=True)
        return _meta_of(parsed)
    except EdgeMemError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptError(f"the meta section is wrong: {error}") from None


def _meta_of(parsed) -> Meta:
    if not isinstance(parsed, dict) or not isinstance(parsed.get("layouts"), list):
        raise CorruptError("the meta section is wrong: it has no list of layouts")
    for name in _META_DICTS:
        if not isinstance(parsed.get(name), dict):
            raise CorruptError(f"the meta section is wrong: {name} is not an object")
    chat_template = parsed.get("chat_template")
    if not isinstance(chat_template, str | None):
        raise CorruptError("the meta section is wrong: chat_template is not a string")
    return Meta(
        ModelSpec.from_dict(parsed.get("spec")),
        tuple(Layout.from_json(item) for item in parsed["layouts"]),
        chat_template,
        *(parsed[name] for name in _META_DICTS),
    )


def parse_json(data: bytes, unique_keys: bool = False):
    """Strict JSON from untrusted bytes: UTF-8, no NaN or Infinity (not as 1e999 either), no absurd
    nesting.

    With `unique_keys` an object that names a key twice is refused. Raises ValueError only.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_unique if unique_keys else None,
        )
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the name {name!r:.80} is given twice")
    return found
