"""Where the parameters of a model come from: any rectangle of any of them, so that a process reads its own alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llamero.checkpoint import hf, peft
from llamero.checkpoint.hf import Region
from llamero.core.errors import LlameroError
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import first_factor
from llamero.model.linear import GroupLinear, PackedLinear, encode, linear
from llamero.model.llama import Llama, fresh
from llamero.model.load import EMBEDDING, HEAD, stored_names

NewRows = Literal["mean", "copy_last"]
ROWS = 1024
"""Rows of an embedding that are looked at together."""


class Weights(Protocol):
    """The parameters of a model, by name."""

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter; both ends of every slice are given."""
        ...


def everything(shape: Sequence[int]) -> Region:
    """Return the region that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class Held:
    """Weights of a model that is in memory."""

    model: Llama

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter."""
        return self.model.get_parameter(name).detach()[region]


@dataclass(frozen=True)
class Fresh:
    """Weights as `llama.initialize` draws them; a tensor is drawn whole and cut.

    Args:
        model: Shapes of the parameters; may be without storage.
        seed: Decides them.
    """

    model: Llama
    seed: int

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter."""
        shape = self.model.get_parameter(name).shape
        return fresh(name, shape, layers=self.model.config.num_layers, seed=self.seed)[region]


class Stored:
    """Weights of a directory, in the dtype of its files; codes of packed layers are there under their names.

    Args:
        model: Shapes of the parameters; may be without storage.
        tensors: Of the directory.

    Raises:
        LlameroError: If a tensor is missing, has no place or another shape.
    """

    def __init__(self, model: Llama, tensors: hf.Tensors) -> None:
        self._tensors = tensors
        self._names = stored_names(model, tensors)
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            source = self._names[name]
            found, expected = tensors.specs[source], tuple(parameter.shape)
            if found.shape != expected:
                raise LlameroError(
                    f"tensor `{source}` is {found.shape} {found.dtype}, the config says {expected}",
                    where=tensors.files[source],
                )

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter.

        Raises:
            LlameroError: If a value in it is not finite.
        """
        return finite_part(self._tensors, self._names[name], region)


def finite_part(tensors: hf.Tensors, name: str, region: Region) -> Tensor:
    """Return a rectangle of a stored tensor.

    Raises:
        LlameroError: If a value in it is not finite; those of the whole tensor are counted.
    """
    value = tensors.part(name, region).contiguous()
    if not finite(value):
        raise _not_finite(name, tensors)
    return value


def finite(values: Tensor) -> bool:
    """Return whether there is no NaN and no infinity; twenty times as fast as `isfinite`, which makes a tensor."""
    if not values.numel():
        return True
    if values.dtype.itemsize == 1:  # float8, which has no order of its own
        values = values.float()
    return all(bool(end.isfinite()) for end in values.aminmax())


def _not_finite(name: str, tensors: hf.Tensors) -> LlameroError:
    whole = tensors[name].float()
    nan = int(whole.isnan().sum())
    infinite = int(whole.isinf().sum())
    return LlameroError(
        f"tensor `{name}` has {nan} NaN and {infinite} infinite values among {whole.numel()}",
        where=tensors.files[name],
        fix="download it again, or start from a checkpoint before the one in which they came up",
    )


@dataclass(frozen=True)
class Grown:
    """Weights with rows for more tokens in embedding and head.

    Rows beyond the known tokens, with which some bases are padded, mean nothing: new tokens take them over and begin
    like any new row. Those that no token takes stay as they are; a model never loses a row.

    Args:
        of: The weights without them.
        rows: Rows that these have.
        width: Channels of a row.
        known: Tokens that these know, whose rows have learned something.
        size: Tokens that the model has to know.
        new_rows: Start at the `mean` of the known rows, or as a copy of the last of them (`copy_last`).
    """

    of: Weights
    rows: int
    width: int
    known: int
    size: int
    new_rows: NewRows
    _starts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter, in float32 or wider where rows may be new."""
        if name not in (EMBEDDING, HEAD):
            return self.of.part(name, region)
        here, columns = region
        old = self.of.part(name, (slice(min(here.start, self.rows), min(here.stop, self.rows)), columns))
        value = torch.empty(
            here.stop - here.start, old.shape[1], dtype=torch.promote_types(old.dtype, torch.float32), device=old.device
        )
        value[: len(old)] = old
        first, last = max(self.known, here.start), min(self.size, here.stop)
        if first < last:
            value[first - here.start : last - here.start] = self._start(name)[columns]
        return value

    def _start(self, name: str) -> Float[Tensor, " dim"]:
        """Return what a new row begins as."""
        if name not in self._starts:
            last = self._some(name, self.known - 1, self.known)[0]
            self._starts[name] = last if self.new_rows == "copy_last" else self._mean(name)
        return self._starts[name]

    def _mean(self, name: str) -> Float[Tensor, " dim"]:
        """Return the mean of the known rows, a few of them held at a time."""
        starts = range(0, self.known, ROWS)
        sums = (self._some(name, start, min(start + ROWS, self.known)).double().sum(0) for start in starts)
        return sum(sums, start=torch.zeros(())) / self.known

    def _some(self, name: str, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        return self.of.part(name, (slice(start, stop), slice(0, self.width)))


class Adapted:
    """Weights of a model with an adapter: those of its base, and factors as they begin.

    Args:
        of: Weights of the base.
        model: With its adapter attached and before it is spread; may be without storage.
        config: What it was attached by.
        seed: Decides the first factors.
        encoded: Layers whose codes are made as their weights come; those of others are read.
    """

    def __init__(
        self, of: Weights, model: Llama, config: AdapterConfig, *, seed: int, encoded: Collection[str] = ()
    ) -> None:
        self._of, self._config, self._seed, self._encoded = of, config, seed, frozenset(encoded)
        self._factors = {n: p.shape for n, p in model.named_parameters() if n.endswith(peft.FACTORS)}
        self._dtype = next((p.dtype for p in model.parameters() if not p.requires_grad), torch.float32)

    def part(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a parameter; the second factor of an update begins at zero."""
        if name not in self._factors:
            return self._of.part(name.replace(".base.", "."), region)
        shape, (first, _) = self._factors[name], peft.FACTORS
        if not name.endswith(first):
            return torch.zeros(*shape)[region]
        layer, gaussian = name.removesuffix(f".{first}"), self._config.init == "gaussian"
        return first_factor(layer, shape, seed=self._seed, gaussian=gaussian)[region]

    def codes(self, name: str, layer: PackedLinear) -> dict[str, Tensor]:
        """Return the codes of all of a packed layer, of which `layer` may have kept a share.

        Raises:
            LlameroError: If stored codes name groups that do not exist.
        """
        name = name.removesuffix(".base")
        if name in self._encoded:
            assert self._config.base is not None
            outputs, inputs = layer.whole
            plain = linear(inputs, outputs, bias=False)
            weight = self._of.part(f"{name}.weight", everything(layer.whole)).to(self._dtype)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            return encode(plain, self._config.base).codes()
        assert isinstance(layer, GroupLinear)
        found = {leaf: self._of.part(f"{name}.{leaf}", everything(shape)) for leaf, shape in layer.shapes().items()}
        if problem := layer.problem(found):
            raise LlameroError(f"`{name}`: {problem}", where="codes of the base", fix="download it again")
        return found
