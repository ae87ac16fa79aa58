"""What whoever loads a model may ask for, and what is wrong with what was asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from . import policies
from ._native import isa_names
from .dtypes import KV_TYPES
from .errors import UnsupportedError
from .spec import ModelSpec

if TYPE_CHECKING:
    from .store import Store

MAX_THREADS = 1024
"""The core starts no more."""


LOADINGS = ("stream", "hybrid", "naive")
"""How weights come: as it should be; what does not fit in its turn, nothing read ahead; or all of
them again in each step. The latter two are what streaming is compared with."""


@dataclass(frozen=True)
class Streaming:
    """How bundles stream; see `load`."""

    policy: str = policies.DEFAULT
    profile: str | os.PathLike | None = None
    lookahead: bool = True
    io_engine: str | None = None
    faults: dict | None = None
    trace: str | os.PathLike | None = None
    loading: str = LOADINGS[0]
    windowing: bool = True
    bundling: bool = True


def check_loading(store: Store, streaming: Streaming) -> None:
    """Raises UnsupportedError where a baseline would be a weaker one than it has to be, or none."""
    usual = streaming.windowing and streaming.bundling
    if not usual and not store.spec.neurons:
        raise UnsupportedError(
            f"loading {store.path} without windowing or bundling: those are of neurons, and its "
            "feed-forward networks are not taken apart; give a store made with --neurons"
        )
    if streaming.loading != LOADINGS[0] and store.spec.neurons:
        raise UnsupportedError(
            f"loading {store.path} in the {streaming.loading} way: its feed-forward networks are "
            "taken apart, which slows whoever reads all of them; give a store made without "
            "--neurons"
        )


def check_streaming(streaming: Streaming) -> None:
    """Raises ValueError for a way of loading or a policy that is none, or a policy without the
    profile that it needs."""
    if streaming.loading not in LOADINGS:
        raise ValueError(f"loading {streaming.loading!r} is none of {', '.join(LOADINGS)}")
    if streaming.policy not in policies.POLICIES:
        names = ", ".join(policies.POLICIES)
        raise ValueError(f"policy {streaming.policy!r} is none of {names}")
    if (streaming.policy == policies.Static.name) != (streaming.profile is not None):
        raise ValueError("the static policy and a profile need each other")


def check_kv(kv: str) -> None:
    """Raises ValueError for a type of the KV cache that is none."""
    if kv not in KV_TYPES:
        raise ValueError(f"kv {kv!r} is none of {', '.join(KV_TYPES)}")


def check_predict(store: Store, predict: bool) -> None:
    """Raises UnsupportedError where there is nothing to predict by."""
    if predict and not store.spec.ranks:
        raise UnsupportedError(
            f"predicting which neurons of {store.path} are active: the store has no predictors; "
            "make them with 'edgemem calibrate', or leave --predict out"
        )


def check_sparse(store: Store, sparse: bool, predict: bool) -> None:
    """Raises UnsupportedError where there are no thresholds, ValueError for two lossy modes at
    once, whose cost together nobody has measured."""
    if sparse and predict:
        raise ValueError("predict and sparse cannot be used together; choose one")
    if sparse and not any(store.spec.thresholds):
        raise UnsupportedError(
            f"letting neurons of {store.path} rest: the store has no thresholds; make them with "
            "'edgemem calibrate --cost', or leave --sparse out"
        )


def context_limit(spec: ModelSpec) -> int:
    """The longest context to ask for: the model's own, or what RoPE scaling stretches it to."""
    if spec.rope.type == "default" or spec.positions == "learned":
        return spec.max_positions
    stretched = (spec.rope.original_positions or spec.max_positions) * spec.rope.factor
    return max(spec.max_positions, int(stretched))


def check_isa() -> None:
    """Whoever forces an instruction set that is none learns of it before anything else happens."""
    isa = os.environ.get("EDGEMEM_ISA")
    if isa and isa not in isa_names():
        raise UnsupportedError(
            f"opening the core with EDGEMEM_ISA={isa}: not an instruction set that runs on this "
            f"machine; unset it, or choose one of {', '.join(isa_names())}"
        )


def check_count(name: str, value: int | None, most: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is None or an integer from 1 to `most`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer or None, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")
