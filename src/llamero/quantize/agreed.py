"""Sums over what several processes see: they agree on units, each sums what is its own, and all have the whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.parallel.world import World
from llamero.quantize.statistics import Sums, Units, units


class AgreedSums:
    """Sums over inputs of one linear layer, in the units that the first group gives: one of the first process.

    Args:
        where: Name of the layer, for errors.
        groups: How many groups of tokens there are in all.
        world: The processes that sum; each adds groups of its own, and perhaps none.
        products: As of `Sums`.
    """

    def __init__(self, where: str, groups: int, world: World, *, products: bool = True) -> None:
        self.where, self._groups, self._world, self._products = where, groups, world, products
        self._sums: Sums | None = None
        self._met = False

    @property
    def sums(self) -> Sums:
        """Return the sums."""
        if self._sums is None:
            raise ValueError(f"{self.where} was not run")
        return self._sums

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        """Take in the inputs of a group; the first one waits for the other processes."""
        if not self._met:
            self.meet(units(x, self._groups, products=self._products).on("cpu"))
        if self._sums is None:
            raise LlameroError("the first process has not seen its inputs", where=self.where)
        self._sums.add(x)

    def meet(self, own: Units | None = None) -> None:
        """Take the units of the first process, once; where there are none, it has to say why."""
        if self._met:
            return
        self._met = True
        found = self._world.told(own)
        if found is not None:
            self._sums = Sums(found.on(self._world.device), products=self._products)


@contextmanager
def added_up(world: World, sums: Sequence[AgreedSums]) -> Iterator[None]:
    """Let all processes have the sums of all of them, when each has added what is its own.

    They agree on units on the way, in the order of `sums`: all meet as often as each other, whatever goes wrong on one.
    """
    with world.together():
        try:
            yield
        except Exception:
            for each in sums:
                each.meet()
            raise
        for each in sums:
            each.meet()
    for each in sums:
        each.sums.add_up(world)
