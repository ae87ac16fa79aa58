"""Quantising to blocks whose scales are searched for: q2_k to q6_k, and q5_0 for rows that are not
whole blocks of q4_k.

A block of 256 columns has parts of 16 or 32, and value = d·s·q − m·t: of the block d and m, of the
part s and t, which are whole numbers, as is q. Those are looked for that make Σ w·(value − weight)²
small, w = |weight| + the root mean square of its part: large weights matter more, small ones still
do. First each part gets the scale and the least value that suit it best; then the block finds d, m,
s and t close to all of them, and improves each in turn while the others stay.

Every number follows from sums in one order and from single roundings in float32, so the same
weights give the same bytes everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from edgemem import dtypes
from edgemem.dtypes import DType

from . import ggml

FALLBACKS = {
    dtypes.Q2_K: dtypes.Q4_0,
    dtypes.Q3_K: dtypes.Q4_0,
    dtypes.Q4_K: dtypes.Q5_0,
    dtypes.Q5_K: dtypes.Q8_0,
    dtypes.Q6_K: dtypes.Q8_0,
}
"""What rows get that are not whole blocks of 256: the smallest format of 32 that is no worse."""

_TILE_ELEMENTS = 1 << 16
"""Weights searched at a time: their arrays stay in a core's cache."""
_GRIDS = np.linspace(-1, 1, 9, dtype=np.float32)
"""Tried: the largest weight becomes the largest quant and so much more, which cuts some off."""
_LIMITS = 8
"""Tried: the largest scale becomes the largest whole number, or less by fewer than so much."""
_ROUNDS = 2
"""After that, improvements bring less than 0.1 % of the error each."""
_TINY = np.float32(1e-30)
_LEAST_F16, _MOST_F16 = np.float32(2**-24), np.float32(65504)


@dataclass(frozen=True)
class _Form:
    """What a block consists of: the ranges of quants and of their parts' scales; the largest
    minimum, 0 where there are none."""

    parts: int
    quants: tuple[int, int]
    scales: tuple[int, int]
    minima: int = 0


_FORMS = {
    dtypes.Q5_0: _Form(1, (-16, 15), (1, 1)),
    dtypes.Q2_K: _Form(16, (0, 3), (0, 15), 15),
    dtypes.Q3_K: _Form(16, (-4, 3), (-32, 31)),
    dtypes.Q4_K: _Form(8, (0, 15), (0, 63), 63),
    dtypes.Q5_K: _Form(8, (0, 31), (0, 63), 63),
    dtypes.Q6_K: _Form(16, (-32, 31), (-128, 127)),
}
TARGETS = tuple(_FORMS)
"""What `quantize` makes."""


def quantize(values: np.ndarray, dtype: DType) -> np.ndarray:
    """uint8 [rows, row_bytes]: GGML's blocks near float32 `values` [rows, cols], which are finite.
    Columns are filled up with zeros to whole blocks.

    Raises ValueError where they are too large for the format. About 40 MB of `values` a second.
    """
    blocks = _whole_blocks(values, dtype.block)
    step = _TILE_ELEMENTS // dtype.block
    tiles = (blocks[first : first + step] for first in range(0, len(blocks), step))
    with np.errstate(over="ignore", invalid="ignore"):  # as errors, which then are no smaller
        packed = np.concatenate([_quantised(tile, dtype) for tile in tiles])
    return packed.view(np.uint8).reshape(len(values), -1)


def _whole_blocks(values: np.ndarray, block: int) -> np.ndarray:
    missing = -values.shape[1] % block
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return values.reshape(-1, block)


def _quantised(values: np.ndarray, dtype: DType) -> np.ndarray:
    form, count = _FORMS[dtype], len(values)
    most = _MOST_F16 * max(map(abs, form.scales)) * max(map(abs, form.quants))
    least = -_MOST_F16 * form.minima if form.minima else -most
    if values.max() > most or values.min() < least:
        raise ValueError("its weights are too large to quantise; keep the number format")
    # numpy adds up a lone column in another order than columns side by side.
    x = np.zeros((values.shape[1] // form.parts, form.parts, max(2, count)), np.float32)
    x[..., :count] = values.reshape(count, form.parts, -1).transpose(2, 1, 0)
    tile = _Tile(x, form)
    d, m, s, t = tile.shared(*tile.fitted())
    quants = (tile.q - np.float32(form.quants[0])).astype(np.uint8).transpose(2, 1, 0)
    return ggml.made(
        dtype,
        *(v.astype(np.float16) for v in (d, m)),
        *(v.T.astype(np.int16) for v in (s, t)),
        quants.reshape(len(d), -1),
    )[:count]


class _Sums(NamedTuple):
    """Of each part, over its columns: w, w·q, w·q², and with the residual r w·r and w·q·r."""

    w: np.ndarray
    q: np.ndarray
    qq: np.ndarray
    r: np.ndarray
    qr: np.ndarray

    def change(self, scale: np.ndarray, least: np.ndarray) -> np.ndarray:
        """By how much the error grows where these are added to a part's scale and least value."""
        by_scale = scale * (scale * self.qq + 2 * (least * self.q - self.qr))
        return by_scale + least * (least * self.w - 2 * self.r)


class _Tile:
    """Weights x float32 [columns of a part, parts, blocks]."""

    def __init__(self, x: np.ndarray, form: _Form):
        self.x, self.form = x, form
        self.w = np.abs(x)
        self.w += np.sqrt((x * x).sum(axis=0) / np.float32(len(x)))
        self.w_sum = self.w.sum(axis=0)
        self.q, self.r, self.product = (np.empty_like(x) for _ in range(3))

    # ---- of each part by itself

    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Float32 [parts, blocks]: the scale of each part and the value that 0 stands for, the best
        of a few grids and of what the best one's quants suggest."""
        lowest, highest = self.form.quants
        if self.form.minima:
            least, end = np.minimum(self.x.min(axis=0), 0), highest
            plain = _inverse(self.x.max(axis=0) - least)
        else:
            peak, end = _peak(self.x), lowest
            least, plain = np.zeros_like(peak), _inverse(peak)
        found = None
        for more in _GRIDS:
            found = _better(self._tried(np.float32(end + more) * plain, least), found)
        _, scale, least = found
        return _better(self._tried(_inverse(scale), least), found)[1:]

    def _tried(self, inverse: np.ndarray, least: np.ndarray) -> tuple:
        """The error with the best scale and least value for the quants that a grid gives, and
        those.

        The residual r counts in steps of the grid, so that its small sums are precise.
        """
        y, product = self.r, self.product
        np.subtract(self.x, least, out=y)
        y *= inverse
        self._round(y)
        np.subtract(y, self.q, out=self.r)
        sums = self._sums()
        np.multiply(self.w, self.r, out=product)
        product *= self.r
        error, step = product.sum(axis=0), _inverse(inverse)
        stretch, shift = self._solved(sums, -least * inverse)
        error += sums.change(stretch, shift)
        return error * step * step, (1 + stretch) * step, least + shift * step

    def _solved(self, sums: _Sums, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is best added to the scale and to the least value, to that no more than `most`; that
        where there are no minima."""
        w, q, qq, r, qr = sums
        spread = w * qq - q * q
        free = (spread > np.float32(1e-6) * w * qq) & (self.form.minima > 0)
        shift = np.where(free, (qq * r - q * qr) * _inverse(np.where(free, spread, 1)), most)
        shift = np.minimum(shift, most)
        return (qr - q * shift) * _inverse(qq), shift

    # ---- of a block

    def shared(self, scale: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float32 d and m [blocks], s and t [parts, blocks] that come close to all parts' scales
        and least values; `q` has the quants that suit them."""
        m = _first(-least.min(axis=0) / np.float32(max(self.form.minima, 1)))
        for turn in range(_ROUNDS):
            self._quantise(scale, least)
            sums = self._residuals(scale, least)
            if turn == 0:
                d, s, t = self._begun(sums, scale, least, m)
            s, t = self._neighbours(sums, scale, least, d, m, s, t)
            d, m = self._refitted(sums, scale, least, d, m, s, t)
            scale, least = d * s, -(m * t)
        self._quantise(scale, least)
        return d, m, s, t

    def _begun(self, sums: _Sums, scale, least, m) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of those d with which the largest scale is one of the largest whole numbers the best, and
        s and t close to the fits."""
        limit = self.form.scales[self.form.minima > 0]
        found = None
        for smaller in range(min(_LIMITS, abs(limit))):
            d = _first(_peak(scale) / np.float32(limit - np.sign(limit) * smaller))
            s = np.clip(np.rint(scale * _inverse(d)), *self.form.scales)
            t = self._suiting(sums, d * s - scale, least, m)
            error = _total(sums.change(d * s - scale, -(m * t) - least))
            found = _better((error, d, s, t), found)
        return found[1:]

    def _suiting(self, sums: _Sums, stretch, least, m) -> np.ndarray:
        """The t that suit scales which are longer by `stretch`."""
        shift = (sums.r - stretch * sums.q) * _inverse(sums.w)
        return np.clip(np.rint(-(least + shift) * _inverse(m)), 0, self.form.minima)

    def _neighbours(self, sums: _Sums, scale, least, d, m, s, t) -> tuple[np.ndarray, np.ndarray]:
        """The best of s and those beside it, each with the t that suits it, for these quants."""
        found = (sums.change(d * s - scale, -(m * t) - least), s, t)
        for step in (-1, 0, 1):
            new_s = np.clip(s + step, *self.form.scales)
            new_t = self._suiting(sums, d * new_s - scale, least, m)
            error = sums.change(d * new_s - scale, -(m * new_t) - least)
            found = _better((error, new_s, new_t), found)
        return found[1:]

    def _refitted(self, sums: _Sums, scale, least, d, m, s, t) -> tuple[np.ndarray, np.ndarray]:
        """The d and m that suit s, t and quants as they are, where rounded to f16 they still do."""
        w, q, qq, r, qr = sums
        sx = _total(s * (qr + scale * qq + least * q))
        tx = _total(t * (r + scale * q + least * w))
        ss, st, tt = _total(s * s * qq), _total(s * t * q), _total(t * t * w)
        spread = ss * tt - st * st
        both = spread > np.float32(1e-6) * ss * tt
        inverse = _inverse(np.where(both, spread, 1))
        new_d = np.where(both, (sx * tt - tx * st) * inverse, (sx + m * st) * _inverse(ss))
        new_m = np.where(both, (sx * st - tx * ss) * inverse, m)
        new_d, new_m = _to_f16(new_d), _to_f16(new_m)
        old = _total(sums.change(d * s - scale, -(m * t) - least))
        new = _total(sums.change(new_d * s - scale, -(new_m * t) - least))
        return np.where(new < old, new_d, d), np.where(new < old, new_m, m)

    # ---- quants

    def _quantise(self, scale: np.ndarray, least: np.ndarray) -> None:
        np.subtract(self.x, least, out=self.product)
        self.product *= _inverse(scale)
        self._round(self.product)

    def _round(self, y: np.ndarray) -> None:
        np.rint(y, out=self.q)
        np.maximum(self.q, self.form.quants[0], out=self.q)
        np.minimum(self.q, self.form.quants[1], out=self.q)

    def _residuals(self, scale: np.ndarray, least: np.ndarray) -> _Sums:
        np.multiply(self.q, scale, out=self.r)
        self.r += least
        np.subtract(self.x, self.r, out=self.r)
        return self._sums()

    def _sums(self) -> _Sums:
        """Of quants and residuals as they are."""
        product, sums = self.product, []
        for factors in ((self.w, self.q), (product, self.q), (self.w, self.r), (product, self.q)):
            np.multiply(*factors, out=product)
            sums.append(product.sum(axis=0))
        return _Sums(self.w_sum, *sums)


def _better(new: tuple, old: tuple | None) -> tuple:
    """Arrays of which the first is an error: where that is smaller the new, else the old."""
    if old is None:
        return new
    smaller = new[0] < old[0]
    return tuple(np.where(smaller, a, b) for a, b in zip(new, old))


def _inverse(v: np.ndarray) -> np.ndarray:
    """1 / v; 0 for what is next to nothing."""
    return np.float32(1) / np.where(np.abs(v) > _TINY, v, np.float32(np.inf))


def _peak(v: np.ndarray) -> np.ndarray:
    """The largest by magnitude along the first axis."""
    top, bottom = v.max(axis=0), v.min(axis=0)
    return np.where(top > -bottom, top, bottom)


def _first(v: np.ndarray) -> np.ndarray:
    """As f16, in float32; what would be 0 becomes the smallest, for parts multiply it."""
    magnitude = np.maximum(np.abs(_to_f16(v)), _LEAST_F16)
    return np.where(v != 0, np.copysign(magnitude, v), np.float32(0))


def _to_f16(v: np.ndarray) -> np.ndarray:
    """Rounded to what f16 holds, in float32; the largest for what is beyond."""
    return np.clip(v, -_MOST_F16, _MOST_F16).astype(np.float16).astype(np.float32)


def _total(parts: np.ndarray) -> np.ndarray:
    """[blocks] of [parts, blocks], one part after the other."""
    return reduce(np.add, parts)
