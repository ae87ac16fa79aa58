"""What a model is, apart from its weights: the shapes and constants that a forward pass needs.

A spec is made from a checkpoint's config when it is converted and travels in the store. It holds
facts only; which code runs is decided by `model_type` (one file in `models/` each).
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields

from .errors import CorruptError, UnsupportedError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")
GATES = ("clamped_swiglu",)
"""Activations that are of gate and up together (reference.gated)."""

NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned")
QK_NORMS = ("none", "head", "full")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
SCORINGS = ("softmax", "sigmoid", "sparsemixer")
MAX_GROUPS = 64
LATENT_NORM_EPS = 1e-6
"""What norms of latents and of narrow queries add before they divide, whatever `norm_eps` is."""
HEAD_STEP = 16
"""Where each head has rows of a matrix for itself, they are so many, or a multiple of it."""
MAX_DIM = 1 << 24
"""No dimension of any model comes near this; a larger one is damage or an attack."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; fields beyond `theta` are read by the types that define them.

    All are bounded, generously, so that no frequency overflows or has no value. `dims` are how many
    numbers of a head, its first, are rotated; 0 for all. Of longrope, frequencies are divided by
    `long_factors` where a sequence is longer than `original_positions`, else by `short_factors`;
    and where `long_attention_factor` is not 0, it then takes `attention_factor`'s place.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    dims: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_attention_factor: float = 0.0

    def __post_init__(self):
        _check(self.type in ROPE_TYPES, "rope.type", self.type)
        positions, scaled = self.original_positions, self.type in ("llama3", "yarn", "longrope")
        _check(scaled <= positions <= 1 << 40, "rope.original_positions", positions)
        _check(1 < self.theta <= 1e12, "rope.theta", self.theta)
        for name in _ROPE_SCALES:
            value = getattr(self, name)
            _check(1e-6 <= value <= 1e6, f"rope.{name}", value)
        _check(0 <= self.dims <= MAX_DIM and self.dims % 2 == 0, "rope.dims", self.dims)
        long = self.long_attention_factor
        _check(0 <= long <= 1e6, "rope.long_attention_factor", long)
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            _check(self.type == "longrope" or not factors, f"rope.{name}", factors)
            _check(all(1e-6 <= f <= 1e6 for f in factors), f"rope.{name}", factors)
        ramp = self.high_freq_factor > self.low_freq_factor
        _check(ramp or self.type != "llama3", "rope.high_freq_factor", self.high_freq_factor)

    def is_long(self, length: int) -> bool:
        """Whether a sequence of so many tokens takes longrope's long factors (arXiv 2402.13753)."""
        return self.type == "longrope" and length > self.original_positions


@dataclass(frozen=True)
class ModelSpec:
    """The facts of one model.

    `windows[i]` is layer i's sliding window in tokens, 0 for full attention. `routed[i]` says
    whether layer i's FFN is a mixture of experts. `qk_norm` is "head" (a norm over each head) or
    "full" (over all heads at once). `shared_intermediate` is the width of a shared expert, 0 for
    none. `norm` is "rms", or "layer" with a bias. `positions` come by "rope", or a "learned" row of
    a table is added to each embedding; then there are no others than `max_positions`. Where FFNs
    are not `gated`, up alone goes through the activation. Layers are `parallel` where attention and
    FFN read the same residual stream; with a `shared_norm` also the same norm of it
    (no routed layer does). With `neurons` the store has FFNs taken apart: the matrix that decides
    which neurons are active, and the others' rows and columns by neuron. With `ranks`, of each
    layer that of its predictor (0 where its FFN is not taken apart), neurons also have what decides
    by neuron. `thresholds` has for each layer up to which magnitude neurons count as resting in a
    sparse run: 0 where that was not calibrated. Where ReLU lets none rest, there must be some.

    Embeddings are multiplied by `embedding_scale`, what a block (attention, or the feed-forward
    parts together) adds to the residual stream by `residual_scale`, logits by `logit_scale`, and
    attention scores by `attention_scale` (0: by 1 / sqrt(head_dim)). With a cap c > 0 scores or
    logits s become c · tanh(s / c). With `sinks` each head has a score more, of no key (arXiv
    2309.17453). With `post_norms` what a block adds is normed first. Layers
    with a window have the `local_rope` where there is one. `scoring` says how router logits become
    scores: by a "softmax" over all experts, a "sigmoid" of each, or "sparsemixer" with its
    `router_jitter` (reference.choose). With a `router_bias` other scores decide than weigh. Of
    `n_groups` > 1 groups of experts only the `top_groups` best are chosen from. Weights of those
    chosen are multiplied by `routed_scale`. A shared expert is gated, or weighs 1 without
    `shared_gated`.

    With a `latent` (arXiv 2405.04434) all heads make their keys and values of one vector of so many
    numbers a token, which is what is kept, together with a key that is rotated and that all heads
    share: then there is one key/value head. Of a query's `head_dim` numbers the first `rope.dims`
    meet that key, the others what a head makes of the latent; a value has `value_dim` numbers.
    Queries are made by way of `q_rank` numbers, or directly (0).
    """

    model_type: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate: int
    activation: str
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int, ...]
    max_positions: int
    tied: bool
    routed: tuple[bool, ...]
    qk_norm: str = "none"
    clip_qkv: float = 0.0
    n_experts: int = 0
    top_k: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    normalize_top_k: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    norm: str = "rms"
    positions: str = "rope"
    gated: bool = True
    parallel: bool = False
    shared_norm: bool = False
    neurons: bool = False
    ranks: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    post_norms: bool = False
    local_rope: RopeSpec | None = None
    scoring: str = "softmax"
    router_jitter: float = 0.0
    router_bias: bool = False
    n_groups: int = 0
    top_groups: int = 0
    routed_scale: float = 1.0
    shared_gated: bool = True
    sinks: bool = False
    latent: int = 0
    value_dim: int = 0
    q_rank: int = 0

    def __post_init__(self):
        for name in _POSITIVE:
            _check(1 <= getattr(self, name) <= MAX_DIM, name, getattr(self, name))
        for name in _COUNTS:
            _check(0 <= getattr(self, name) <= MAX_DIM, name, getattr(self, name))
        _check(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads)
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim)
        whole = self.gated and not self.neurons
        _check(self.activation in ACTIVATIONS + GATES * whole, "activation", self.activation)
        _check(self.qk_norm in QK_NORMS, "qk_norm", self.qk_norm)
        _check(self.norm in NORMS, "norm", self.norm)
        _check(self.positions in POSITIONS, "positions", self.positions)
        shares = self.parallel and not any(self.routed)
        _check(shares or not self.shared_norm, "shared_norm", self.shared_norm)
        _check(not (self.neurons and all(self.routed)), "neurons", self.neurons)
        self._check_ranks()
        self._check_thresholds()
        self._check_scales()
        self._check_routing()
        self._check_latent()
        for rope in self.ropes:
            self._check_rope(rope)
        _check(0 <= self.norm_eps <= 1, "norm_eps", self.norm_eps)
        _check(0 <= self.clip_qkv <= 1e30, "clip_qkv", self.clip_qkv)
        for name, ids in (("bos_id", (self.bos_id or 0,)), ("eos_ids", self.eos_ids)):
            _check(all(0 <= i < self.vocab_size for i in ids), name, getattr(self, name))
        _check(len(self.windows) == self.n_layers, "windows", len(self.windows))
        _check(all(0 <= w <= 1 << 40 for w in self.windows), "windows", self.windows)
        _check(len(self.routed) == self.n_layers, "routed", len(self.routed))
        if any(self.routed):
            _check(
                self.n_experts >= 1 and self.expert_intermediate >= 1, "n_experts", self.n_experts
            )
            _check(1 <= self.top_k <= self.n_experts, "top_k", self.top_k)
        if not all(self.routed):
            _check(self.intermediate >= 1, "intermediate", self.intermediate)

    def _check_scales(self) -> None:
        for name in ("embedding_scale", "residual_scale", "logit_scale", "routed_scale"):
            _check(1e-6 <= abs(getattr(self, name)) <= 1e6, name, getattr(self, name))
        _check(0 <= self.router_jitter <= 1e6, "router_jitter", self.router_jitter)
        for name in ("attention_scale", "attention_cap", "logit_cap"):
            value = getattr(self, name)
            _check(value == 0 or 1e-6 <= value <= 1e6, name, value)

    def _check_routing(self) -> None:
        _check(self.scoring in SCORINGS, "scoring", self.scoring)
        sigmoid = self.scoring == "sigmoid"
        _check(sigmoid or not self.router_bias, "router_bias", self.router_bias)
        groups, top = self.n_groups, self.top_groups
        _check(self.scoring != "sparsemixer" or groups <= 1, "n_groups", groups)
        if groups > 1:
            size = self.n_experts // groups
            fits = groups <= MAX_GROUPS and size * groups == self.n_experts and size >= 2
            _check(fits, "n_groups", groups)
            _check(1 <= top <= groups and self.top_k <= top * size, "top_groups", top)

    def _check_latent(self) -> None:
        if not self.latent:
            _check(self.value_dim == self.q_rank == 0, "latent", self.latent)
            return
        rotated = self.positions == "rope" and self.local_rope is None
        plain = self.qk_norm == "none" and self.clip_qkv == 0 and self.norm == "rms"
        plain = plain and not self.sinks
        _check(rotated and plain and self.n_kv_heads == 1, "latent", self.latent)
        _check(2 <= self.rope.dims < self.head_dim, "rope.dims", self.rope.dims)
        for name in ("latent", "value_dim"):
            size = getattr(self, name)
            _check(size >= 1 and size % HEAD_STEP == 0, name, size)

    def _check_rope(self, rope: RopeSpec) -> None:
        dims, name = rope.dims or self.head_dim, "rope.dims" if rope.dims else "head_dim"
        _check(dims <= self.head_dim, name, dims)
        _check(dims > 2 or rope.type != "dynamic", name, dims)
        for factors in (rope.short_factors, rope.long_factors):
            _check(len(factors) == (dims // 2 if rope.type == "longrope" else 0), "rope", factors)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """That of all layers, or of those without a window and of those with one."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_of(self, layer: int) -> int:
        """Which of `ropes` a layer has."""
        return len(self.ropes) - 1 if self.windows[layer] else 0

    @property
    def key_dim(self) -> int:
        """Numbers of a key, as queries meet it."""
        return self.rope.dims + self.latent if self.latent else self.head_dim

    @property
    def attended(self) -> int:
        """Numbers of what all heads of a token attend to together."""
        return self.n_heads * (self.value_dim or self.head_dim)

    @property
    def plain_residual(self) -> bool:
        """Whether blocks add to the residual stream what they give, as it is."""
        return not self.post_norms and self.residual_scale == 1.0

    def _check_ranks(self) -> None:
        if not self.ranks:
            return
        _check(self.neurons and len(self.ranks) == self.n_layers, "ranks", len(self.ranks))
        for rank, routed in zip(self.ranks, self.routed, strict=True):
            _check(rank == 0 if routed else 1 <= rank <= self.hidden, "ranks", rank)

    def _check_thresholds(self) -> None:
        given = self.thresholds
        if not given:
            _check(self.rests or not self.neurons, "thresholds", given)
            return
        _check(self.neurons and len(given) == self.n_layers, "thresholds", len(given))
        for threshold, routed in zip(given, self.routed, strict=True):
            _check(0 <= threshold <= (0 if routed else 1e30), "thresholds", threshold)

    @property
    def rests(self) -> bool:
        """Whether neurons rest of themselves: with other activations all add something."""
        return self.activation in ("relu", "relu2")

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` takes it back. What came later and says what the stores
        before it meant is left out, so that readers of those can read this."""
        ropes = {"rope": _told(self.rope)}
        if self.local_rope is not None:
            ropes["local_rope"] = _told(self.local_rope)
        return _told(self) | ropes

    @classmethod
    def from_dict(cls, data: dict) -> ModelSpec:
        """Check every field's type and range. Raises CorruptError naming the field, or
        UnsupportedError for one that only a newer version knows."""
        values = _typed(cls, data, "spec")
        for name in ("rope", "local_rope"):
            if values.get(name) is not None:
                values[name] = RopeSpec(**_typed(RopeSpec, values[name], f"spec.{name}"))
        return cls(**values)


_LATER = {
    "norm", "positions", "gated", "parallel", "shared_norm", "neurons", "ranks", "thresholds",
    "embedding_scale", "residual_scale", "logit_scale", "attention_scale", "attention_cap",
    "logit_cap", "post_norms", "local_rope", "scoring", "router_jitter", "router_bias", "n_groups",
    "top_groups", "routed_scale", "shared_gated", "sinks", "latent", "value_dim", "q_rank",
    "dims", "short_factors", "long_factors", "long_attention_factor",
}  # fmt: skip
"""What came after the first stores; of RopeSpec too."""


def _told(spec) -> dict:
    later = {f.name: f.default for f in fields(spec) if f.name in _LATER}
    return {k: v for k, v in asdict(spec).items() if k not in later or v != later[k]}


_POSITIVE = (
    "n_layers", "hidden", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_positions",
)  # fmt: skip
_ROPE_SCALES = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip
_COUNTS = (
    "intermediate", "n_experts", "top_k", "expert_intermediate", "shared_intermediate", "n_groups",
    "top_groups", "latent", "value_dim", "q_rank",
)  # fmt: skip
_TYPES = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "RopeSpec": dict,
    "RopeSpec | None": (dict, type(None)),
    "int | None": (int, type(None)), "tuple[int, ...]": list, "tuple[bool, ...]": list,
    "tuple[float, ...]": list,
}  # fmt: skip

_ITEMS = {"tuple[bool, ...]": (bool,), "tuple[float, ...]": (int, float)}


def _typed(cls, data, where: str) -> dict:
    if not isinstance(data, dict):
        raise CorruptError(f"reading {where}: expected an object, found {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}
    newer = sorted(set(data) - set(known))
    if newer:
        raise UnsupportedError(
            f"reading {where}: {newer[0]!r:.60} is of a newer version of edgemem"
        )
    # A field that came later has a default, which is what the stores before it meant.
    missing = [name for name, f in known.items() if name not in data and f.default is MISSING]
    if missing:
        raise CorruptError(f"reading {where}: {missing[0]} is missing")
    values = {}
    for name, value in data.items():
        kind = known[name].type
        if isinstance(value, tuple):
            value = list(value)
        items = _ITEMS.get(kind, (int,))
        wrong = not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool")
        if isinstance(value, list) and not wrong:
            wrong = not all(type(v) in items for v in value)
            value = tuple(value)
        if wrong:
            raise CorruptError(f"reading {where}.{name}: {value!r:.80} is not a {kind}")
        values[name] = float(value) if kind == "float" else value
    return values


def _check(holds: bool, name: str, value) -> None:
    if not holds:
        raise CorruptError(f"model spec: {name} = {value!r:.80} is out of range")
