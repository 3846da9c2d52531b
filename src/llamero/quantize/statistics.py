"""What is remembered of the inputs of linear layers: sums that come out the same in whatever order they are made.

Floating-point sums depend on their order, and so on who adds what. Here each addend is rounded to a multiple of one
unit, a power of two for each channel or pair of channels, before it is added in float64. The units are so coarse that
no sum needs more than float64's 53 bits: every addition is exact. What threads or processes
found is merged in any order, with the same bytes at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.parallel.world import World

log = logging.getLogger(__name__)

INPUTS: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The distinct inputs within a decoder layer, each by the first of the linear layers that it flows into."""

TILE = {"cpu": 512, "cuda": 2048}
"""Channels of a tile of the second moment at most, by the kind of device: only tiles on and below the diagonal are
computed."""

TILES = 6
"""Into how many tiles a side is cut at least, where they are then of `LEAST` channels or more."""

LEAST = 128
"""Channels of a tile at least: products of fewer are slow."""

WIDE = 4096
"""Channels of neighbouring tiles that are computed in one product."""

_BITS = 53
"""Of float64's significand."""

_HEADROOM = 20
"""Powers of two by which a sum may exceed what the first addend makes expect."""


@dataclass(frozen=True, eq=False)
class Channels:
    """What is remembered of each channel of an input."""

    energy: Float[Tensor, " d"]
    """Sum of squares over all tokens, float32: the diagonal of the second moment."""
    mean_abs: Float[Tensor, " d"]
    """Mean magnitude."""
    absmax: Float[Tensor, " d"]
    """Largest magnitude."""
    tokens: int

    @property
    def dead(self) -> int:
        """Return how many channels were zero on every token."""
        return int((self.absmax == 0).sum())


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is remembered of the inputs of a linear layer."""

    second_moment: Float[Tensor, "d d"]
    """Sum of `outer(x, x)` over all tokens, float32."""
    mean_abs: Float[Tensor, " d"]
    """Mean magnitude of each channel."""
    tokens: int
    absmax: Float[Tensor, " d"]
    """Largest magnitude of each channel."""

    @property
    def channels(self) -> Channels:
        """Return what is known of each channel alone."""
        return Channels(self.second_moment.diagonal(), self.mean_abs, self.absmax, self.tokens)


@dataclass(frozen=True, eq=False)
class Units:
    """Of what the sums over one input are multiples."""

    scale: Float[Tensor, " d"]
    """Powers of two that make all channels of one size: a sum of a channel is a multiple of the unit over its own."""
    unit: float
    """Of the sums of channels so scaled, a power of two."""
    expected: Float[Tensor, " tiles"] | None = None
    """Products of the channels over one group, bfloat16, tile after tile, where products come out in bfloat16 (on a
    CPU): only what a group is off by them is rounded to it. `None`: products come out in float32."""

    def on(self, device: torch.device | str) -> Units:
        """Return them on a device."""
        return Units(self.scale.to(device), self.unit, None if self.expected is None else self.expected.to(device))


def units(x: Float[Tensor, "tokens d"], groups: int, *, products: bool = True) -> Units:
    """Return units for sums over groups of tokens of which this one is typical.

    A sum may come out 2^20 times larger than this group makes expect before its additions round; a unit is then
    still about 2^-33 of what is expected, where float32 has 2^-24.

    Args:
        x: Inputs of one group of tokens, the same one whoever asks.
        groups: How many groups there are in all.
        products: Whether products of channels are to be summed.
    """
    size = x.float().square().mean(0).sqrt_()
    size = torch.where(size > 0, size, size.mean())  # of a channel that is silent here nothing is known
    exponents = torch.where(size > 0, torch.frexp(size).exponent, 0)
    expected = math.ceil(math.log2(len(x) * groups)) + 1
    scale, unit = torch.ldexp(torch.ones_like(size), -exponents), math.ldexp(1.0, expected + _HEADROOM - _BITS)
    if not products or x.dtype != torch.bfloat16 or x.is_cuda:
        return Units(scale, unit)
    x, tiles = x.float(), _Tiles(len(scale), x.device)
    found = tiles.zeros(torch.bfloat16)
    for (rows, columns), tile in tiles.views(found):
        tile.copy_(x[:, rows].T @ x[:, columns])
    return Units(scale, unit, found)


def largest(x: Float[Tensor, "tokens d"]) -> Float[Tensor, " d"]:
    """Return the largest magnitude of each channel, float32: infinite or NaN where any is."""
    magnitude = x.abs()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]  # as such they are in the same order
    return magnitude.view(whole).amax(0).view(x.dtype).float()


class _Tiles:
    """How the lower triangle of a second moment lies in memory: tiles of rows, each up to the diagonal and a little on.

    Args:
        width: Channels.
        device: That products are computed on.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        most = TILE.get(device.type, TILE["cuda"])
        height = max(LEAST, 1 << max(0, (width // TILES).bit_length() - 1))
        self._width, self._device, self._height = width, device, min(most, height) if device.type == "cpu" else most

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of every product; those of the diagonal are the last of their rows."""
        for start in range(0, self._width, self._height):
            rows = slice(start, min(start + self._height, self._width))
            yield from ((rows, slice(first, min(first + WIDE, rows.stop))) for first in range(0, rows.stop, WIDE))

    def zeros(self, dtype: torch.dtype) -> Float[Tensor, " tiles"]:
        """Return room for all tiles."""
        size = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self.places())
        return torch.zeros(size, dtype=dtype, device=self._device)

    def views(
        self, tiles: Float[Tensor, " tiles"]
    ) -> Iterator[tuple[tuple[slice, slice], Float[Tensor, "rows columns"]]]:
        """Yield the place of every tile, and the tile."""
        start = 0
        for rows, columns in self.places():
            height, width = rows.stop - rows.start, columns.stop - columns.start
            yield (rows, columns), tiles[start : start + height * width].view(height, width)
            start += height * width


class Sums:
    """Sums over inputs of one linear layer; several threads may add to them.

    Args:
        units: Of the sums.
        products: Whether to sum products of channels; otherwise squares alone.
    """

    def __init__(self, units: Units, *, products: bool = True) -> None:
        self.width, self.units, self.products = len(units.scale), units, products
        self.tokens = 0
        self._device = device = units.scale.device
        self._layout = _Tiles(self.width if products else 0, device)
        self._tiles = self._layout.zeros(torch.float64)
        self._lock = Lock()
        self._energy, self._magnitude = (torch.zeros(self.width, dtype=torch.float64, device=device) for _ in range(2))
        self._largest = torch.zeros(self.width, device=device)
        self._units = 1 / units.scale.double()  # of each channel, over the unit

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        """Take in the inputs of a group of tokens."""
        total, most = x.abs().float().sum(0), largest(x)
        energy = self._products(x) if self.products else x.float().square().sum(0)
        with self._lock:
            self._energy += self._rounded(energy.double(), self._units, self._units)
            self._magnitude += self._rounded(total.double(), self._units)
            torch.maximum(self._largest, most, out=self._largest)
            self.tokens += len(x)

    def _products(self, x: Tensor) -> Float[Tensor, " d"]:
        """Add the products of channels; return the squares."""
        expected = self.units.expected
        if expected is None and not x.is_cuda:
            x = x.float()  # on a CPU the product of bfloat16 is rounded to bfloat16, which is too coarse
        energy = torch.empty(self.width, device=x.device)
        known = None if expected is None else self._layout.views(expected)
        for (rows, columns), tile in self._layout.views(self._tiles):
            product = _product(x[:, rows], x[:, columns], None if known is None else next(known)[1])
            if rows.stop == columns.stop:
                energy[rows] = product.diagonal(rows.start - columns.start).float()
            rounded = self._rounded(product, self._units[rows, None], self._units[columns])
            with self._lock:
                tile += rounded
        return energy

    def merge(self, other: Sums) -> None:
        """Take in what another one has summed, in any order; its units must be the same."""
        if other.units.unit != self.units.unit or not torch.equal(other.units.scale, self.units.scale):
            raise ValueError("sums of different units")
        with self._lock:
            self._tiles += other._tiles.to(self._device)
            self._energy += other._energy.to(self._device)
            self._magnitude += other._magnitude.to(self._device)
            torch.maximum(self._largest, other._largest.to(self._device), out=self._largest)
            self.tokens += other.tokens

    def add_up(self, world: World) -> None:
        """Take in what all other processes have summed, in the same units: each then has the whole."""
        world.add_up(self._tiles, self._energy, self._magnitude)
        world.take_largest(self._largest)
        self.tokens = int(world.sum([self.tokens])[0])

    def channels(self, where: str) -> Channels:
        """Return what is known of each channel alone."""
        over = torch.maximum(self._energy / self._units**2, self._magnitude / self._units)
        if float(over.max()) > math.ldexp(self.units.unit, _BITS):
            log.warning("%s: much larger inputs than in the first sequences; their sums were rounded", where)
        mean = (self._magnitude / max(1, self.tokens)).float()
        return Channels(self._energy.float(), mean, self._largest, self.tokens)

    def statistics(self, where: str) -> Statistics:
        """Return the statistics and let go of the sums.

        Args:
            where: Name of the layer, for the log.
        """
        channels = self.channels(where)
        moment = torch.zeros(self.width, self.width, device=self._device)
        for (rows, columns), tile in self._layout.views(self._tiles):
            moment[rows, columns] = tile
            if rows.stop == columns.stop:
                corner = moment[rows, rows]
                corner.copy_(corner.tril() + corner.tril(-1).T)  # a product's two halves may differ in their last bits
            before = slice(columns.start, min(columns.stop, rows.start))
            moment[before, rows] = moment[rows, before].T
        self._tiles = self._tiles[:0].clone()
        return Statistics(moment, channels.mean_abs, channels.tokens, channels.absmax)

    def _rounded(self, x: Float[Tensor, "..."], *units: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return `x`, float64, as multiples of the product of units: adding 1.5·2^52 of them leaves no bits below one.

        Args:
            x: Is overwritten.
            units: Of rows and columns, over the unit.
        """
        magic = 1.5 * math.ldexp(self.units.unit, _BITS - 1)
        first, second = units if len(units) == 2 else (units[0], torch.ones_like(units[0]))
        return x.addcmul_(first, second, value=magic).addcmul_(first, second, value=-magic)


def _product(rows: Tensor, columns: Tensor, expected: Tensor | None) -> Float[Tensor, "rows columns"]:
    """Return `rows.T @ columns` in float64, of which all but what is expected was rounded as the device has it."""
    if expected is not None:
        return torch.addmm(expected, rows.T, columns, beta=-1).double().add_(expected)
    if rows.dtype == torch.bfloat16:
        return torch.mm(rows.T, columns, out_dtype=torch.float32).double()
    return (rows.T @ columns).double()
