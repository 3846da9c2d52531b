"""What is remembered of the inputs of linear layers: sums that come out the same in whatever order they are made.

Floating-point sums depend on their order, and so on who adds what. Here each channel is multiplied by a power of two,
so that all are of one size, and each addend is rounded to a multiple of one unit before it is added in float64. The
unit is so coarse that no sum needs more than float64's 53 bits: every addition is exact. What threads or processes
found is merged in any order, with the same bytes at the end.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor

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
        self._tile = TILE.get(device.type, TILE["cuda"])
        self._lock = Lock()
        self._tiles: dict[tuple[int, int], Tensor] = {}
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
        for (i, j), product in self._products(x) if self.products else ():
            if i == j:
                energy[i : i + len(product)] = product.diagonal()
            self._accumulate((i, j), self._rounded(product))
        if not self.products:
            energy = x.float().square_().sum(0)
        with self._lock:
            self._energy += self._rounded(energy)
            self._magnitude += self._rounded(total)
            torch.maximum(self._largest, largest, out=self._largest)
            self.tokens += len(x)

    def merge(self, other: "Sums") -> None:
        """Take in what another one has summed, in any order; its units must be the same, and it is empty afterwards."""
        if other.units.unit != self.units.unit or not torch.equal(other.units.scale, self.units.scale):
            raise ValueError("sums of different units")
        for place in list(other._tiles):
            self._accumulate(place, other._tiles.pop(place).to(self._device))
        with self._lock:
            self._energy += other._energy.to(self._device)
            self._magnitude += other._magnitude.to(self._device)
            torch.maximum(self._largest, other._largest.to(self._device), out=self._largest)
            self.tokens += other.tokens

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
        for i, j in list(self._tiles):
            tile = self._tiles.pop((i, j))
            tile = (tile * back[i : i + len(tile), None] * back[j : j + tile.shape[1]]).float()
            if i == j:
                tile = tile.tril() + tile.tril(-1).T  # a product's two halves may differ in their last bits
            moment[i : i + tile.shape[0], j : j + tile.shape[1]] = tile
            if i != j:
                moment[j : j + tile.shape[1], i : i + tile.shape[0]] = tile.T
        return Statistics(moment, channels.mean_abs, channels.tokens, channels.absmax)

    def _products(self, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        starts = range(0, self.width, self._tile)
        for i in starts:
            rows = x[:, i : i + self._tile].T
            for j in starts[: i // self._tile + 1]:
                columns = x[:, j : j + self._tile]
                if x.dtype == torch.bfloat16 and x.is_cuda:
                    yield (i, j), torch.mm(rows, columns, out_dtype=torch.float32)
                else:
                    yield (i, j), rows @ columns

    def _accumulate(self, place: tuple[int, int], addend: Tensor) -> None:
        with self._lock:
            if place in self._tiles:
                self._tiles[place] += addend
            else:
                self._tiles[place] = addend

    def _rounded(self, x: Tensor) -> Float[Tensor, "..."]:
        """Return `x` in float64 as a multiple of the unit: adding 1.5·2^52 units leaves no bits below one unit."""
        magic = 1.5 * math.ldexp(self.units.unit, _BITS - 1)
        return x.double().add_(magic).sub_(magic)
