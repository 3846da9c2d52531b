"""What is remembered of the inputs of linear layers: sums that come out the same in whatever order they are made.

Floating-point sums depend on their order, and so on who adds what. Here each channel is multiplied by a power of two,
so that all are of one size, and each addend is rounded to a multiple of one unit before it is added in float64. The
unit is so coarse that no sum needs more than float64's 53 bits: every addition is exact. What threads or processes
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

TILE = {"cpu": 256, "cuda": 2048}
"""Channels of a tile of the second moment, by the kind of device: only tiles on and below the diagonal are computed."""

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
    """Powers of two that each channel is multiplied by before it is summed."""
    unit: float
    """Of the sums of what comes out, a power of two."""

    def on(self, device: torch.device | str) -> Units:
        """Return them on a device."""
        return Units(self.scale.to(device), self.unit)


def units(x: Float[Tensor, "tokens d"], groups: int) -> Units:
    """Return units for sums over groups of tokens of which this one is typical.

    A sum may come out 2^20 times larger than this group makes expect before its additions round; a unit is then
    still about 2^-33 of what is expected, where float32 has 2^-24.

    Args:
        x: Inputs of one group of tokens, the same one whoever asks.
        groups: How many groups there are in all.
    """
    size = x.float().square().mean(0).sqrt_()
    size = torch.where(size > 0, size, size.mean())  # of a channel that is silent here nothing is known
    exponents = torch.where(size > 0, torch.frexp(size).exponent, 0)
    expected = math.ceil(math.log2(len(x) * groups)) + 1
    return Units(torch.ldexp(torch.ones_like(size), -exponents), math.ldexp(1.0, expected + _HEADROOM - _BITS))


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
        self._tile = min(self.width, TILE.get(device.type, TILE["cuda"]))
        rows = -(-self.width // self._tile) if products else 0
        shape = (rows * (rows + 1) // 2, self._tile, self._tile)
        self._tiles = torch.zeros(shape, dtype=torch.float64, device=device)  # row after row, each up to the diagonal
        self._lock = Lock()
        self._energy, self._magnitude = (torch.zeros(self.width, dtype=torch.float64, device=device) for _ in range(2))
        self._largest = torch.zeros(self.width, device=device)

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        """Take in the inputs of a group of tokens."""
        x = x * self.units.scale.to(x.dtype)
        if not x.is_cuda:
            x = x.float()  # on a CPU the product of bfloat16 is rounded to bfloat16, which is too coarse
        magnitude = x.abs()
        total, largest = magnitude.sum(0, dtype=torch.float32), magnitude.amax(0).float()
        del magnitude
        energy = torch.empty(self.width, device=x.device)
        for number, (rows, columns) in enumerate(self._places()):
            product = self._product(x[:, rows], x[:, columns])
            if rows == columns:
                energy[rows] = product.diagonal()
            rounded = self._rounded(product)
            with self._lock:
                self._tiles[number, : len(product), : product.shape[1]] += rounded
        if not self.products:
            energy = x.float().square_().sum(0)
        with self._lock:
            self._energy += self._rounded(energy)
            self._magnitude += self._rounded(total)
            torch.maximum(self._largest, largest, out=self._largest)
            self.tokens += len(x)

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
        if float(torch.maximum(self._energy, self._magnitude).max()) > math.ldexp(self.units.unit, _BITS):
            log.warning("%s: much larger inputs than in the first sequences; their sums were rounded", where)
        back = 1 / self.units.scale
        mean = (self._magnitude / max(1, self.tokens) * back).float()
        return Channels((self._energy * back * back).float(), mean, self._largest * back, self.tokens)

    def statistics(self, where: str) -> Statistics:
        """Return the statistics and let go of the sums.

        Args:
            where: Name of the layer, for the log.
        """
        channels, back = self.channels(where), 1 / self.units.scale.double()
        moment = torch.zeros(self.width, self.width, device=self._device)
        for number, (rows, columns) in enumerate(self._places()):
            height, width = len(back[rows]), len(back[columns])
            tile = (self._tiles[number, :height, :width] * back[rows, None] * back[columns]).float()
            if rows == columns:
                tile = tile.tril() + tile.tril(-1).T  # a product's two halves may differ in their last bits
            moment[rows, columns] = tile
            if rows != columns:
                moment[columns, rows] = tile.T
        self._tiles = self._tiles[:0].clone()
        return Statistics(moment, channels.mean_abs, channels.tokens, channels.absmax)

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of every tile."""
        starts = range(0, self.width if self.products else 0, self._tile)
        parts = [slice(start, start + self._tile) for start in starts]
        for number, rows in enumerate(parts):
            for columns in parts[: number + 1]:
                yield rows, columns

    @staticmethod
    def _product(rows: Tensor, columns: Tensor) -> Float[Tensor, "rows columns"]:
        if rows.dtype == torch.bfloat16:
            return torch.mm(rows.T, columns, out_dtype=torch.float32)
        return rows.T @ columns

    def _rounded(self, x: Tensor) -> Float[Tensor, "..."]:
        """Return `x` in float64 as a multiple of the unit: adding 1.5·2^52 units leaves no bits below one unit."""
        magic = 1.5 * math.ldexp(self.units.unit, _BITS - 1)
        return x.double().add_(magic).sub_(magic)
