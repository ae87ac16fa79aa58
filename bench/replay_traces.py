"""Routing as arrays: what each layer of each step demanded, read from either format of trace."""

import lzma
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgemem import tracefile
from edgemem.errors import StoreError


@dataclass(frozen=True)
class Routing:
    """Demand in the order in which it came: event e is one layer of one step.

    Event e demands bundles ids[starts[e]:starts[e+1]], each once; `uses` is how many of the step's
    tokens took each. Bundles are numbered layer by layer; `class_of` is their layout class. The
    policy, slots and hits are those of the run that was recorded, where it says; `resized` are the
    slots that there were before the first event of a step, in turn; of the classes in `ahead`
    bundles were read before they were demanded.
    """

    name: str
    n_layers: int
    layer_of: np.ndarray
    class_of: np.ndarray
    layers: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    uses: np.ndarray
    policy: str | None = None
    slots: tuple[int, ...] | None = None
    hits: np.ndarray | None = None
    resized: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    ahead: tuple[int, ...] = ()

    @property
    def n_steps(self) -> int:
        return int(self.steps[-1]) + 1

    def slots_of(self, share: float) -> tuple[int, ...]:
        """A cache that holds this share of all bundles, class by class, at least one of each."""
        return tuple(max(1, int(share * count)) for count in np.bincount(self.class_of))

    def popularity(self, events: np.ndarray) -> np.ndarray:
        """How often each bundle was used in these events (bool [events]), int64 [n]."""
        demanded = np.repeat(events, np.diff(self.starts))
        used = np.zeros(len(self.layer_of), np.int64)
        np.add.at(used, self.ids[demanded], self.uses[demanded])
        return used

    @property
    def read_ahead(self) -> np.ndarray:
        """Which events demand bundles of a class that was read ahead, bool [events]."""
        ahead = np.isin(self.class_of[self.ids], self.ahead)
        return np.logical_or.reduceat(ahead, self.starts[:-1])


def read(path: Path) -> Routing:
    """A `.route.csv.xz` of a published engine, or a file that `--trace` wrote."""
    try:
        return _read_csv(path) if path.name.endswith(".csv.xz") else _read_trace(path)
    except OSError as error:
        raise StoreError(f"reading {path}: {error.strerror or error}") from error
    except (lzma.LZMAError, EOFError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise StoreError(f"reading {path}: it is no trace: {error}") from error


def of_tokens(name: str, picks: np.ndarray, n_experts: int) -> Routing:
    """Routing of steps of one token: `picks` int [steps, layers, top_k] are experts from 0."""
    n_steps, n_layers, _ = picks.shape
    numbers = np.sort(picks + np.arange(n_layers)[:, None] * n_experts, axis=2)
    rows = numbers.reshape(n_steps * n_layers, -1)
    return _build(
        name, n_layers, np.repeat(np.arange(n_layers), n_experts), None,
        np.tile(np.arange(n_layers), n_steps), np.repeat(np.arange(n_steps), n_layers),
        np.ones(len(rows), np.int64), list(rows), None,
    )  # fmt: skip


def _read_csv(path: Path) -> Routing:
    """Steps are tokens, also in the prompt, where the file lists a batch layer by layer: in order
    of tokens and layers here, as they would be decoded."""
    with lzma.open(path, "rt") as file:
        lines = file.read().splitlines()
    facts = dict(word.split("=") for word in lines[1][1:].split())
    table = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    names = lines[table].split(",")
    columns = [names.index(name) for name in ("turn", "step", "layer", "expert")]
    rows = np.loadtxt(lines[table + 1 :], np.int64, delimiter=",", usecols=columns, ndmin=2)
    rows = np.unique(rows, axis=0)
    n_layers, n_experts = int(facts["n_layer"]), int(facts["n_expert"])
    events, first = np.unique(rows[:, :3], axis=0, return_index=True)
    numbers = np.split(rows[:, 2] * n_experts + rows[:, 3], first[1:])
    _, steps = np.unique(events[:, :2], axis=0, return_inverse=True)
    return _build(
        path.name.split(".")[0], n_layers, np.repeat(np.arange(n_layers), n_experts), None,
        events[:, 2], steps.ravel(), np.ones(len(events), np.int64), numbers, None,
    )  # fmt: skip


def _read_trace(path: Path) -> Routing:
    header, lines = tracefile.read(path)
    layers, steps, tokens, ids, uses, hits, resized = [], [], [], [], [], [], {}
    for step, line in enumerate(lines):
        if "resized" in line:
            resized[step] = list(map(tuple, line["resized"]))
        if "layers" not in line:
            continue
        layers += line["layers"]
        steps += [step] * len(line["layers"])
        tokens += [line["tokens"]] * len(line["layers"])
        ids += line["ids"]
        uses += line.get("uses") or [[1] * len(demanded) for demanded in line["ids"]]
        hits += line.get("hits", [])
    if not layers:
        raise StoreError(f"reading {path}: nothing streamed in this run; give it less memory")
    return _build(
        path.stem, header.n_layers, header.layer_of, header.class_of,
        layers, steps, tokens, ids, uses, header.policy, header.slots, hits, resized,
        header.read_ahead,
    )  # fmt: skip


def _build(
    name, n_layers, layer_of, class_of, layers, steps, tokens, ids, uses,
    policy=None, slots=None, hits=None, resized=None, ahead=(),
) -> Routing:  # fmt: skip
    flat = np.concatenate([np.asarray(demanded, np.int64) for demanded in ids])
    layer_of = np.asarray(layer_of, np.int64)
    if flat.min(initial=0) < 0 or flat.max(initial=0) >= len(layer_of):
        raise ValueError(f"it demands bundles beside the {len(layer_of)} that it names")
    return Routing(
        name=name,
        n_layers=n_layers,
        layer_of=layer_of,
        class_of=np.zeros_like(layer_of) if class_of is None else np.asarray(class_of, np.int64),
        layers=np.asarray(layers, np.int64),
        steps=np.asarray(steps, np.int64),
        tokens=np.asarray(tokens, np.int64),
        starts=np.cumsum([0, *map(len, ids)]),
        ids=flat,
        uses=np.ones_like(flat) if uses is None else np.concatenate([*map(np.asarray, uses)]),
        policy=policy,
        slots=slots,
        hits=np.array(hits, np.int64) if hits and len(hits) == len(layers) else None,
        resized=resized or {},
        ahead=ahead,
    )
