"""What a method is asked, a decoder layer at a time, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block
from llamero.quantize import gptq
from llamero.quantize.calibrate import INPUTS, Layer, Statistics
from llamero.quantize.variants import Variant

HELD = 3 << 29
"""Codes, of a byte each, that are held at a time: variants of a large layer are solved a few at a time."""

AT_ONCE = 1 << 25
"""Weights of which errors are measured at a time."""


class Codes(Protocol):
    """A quantized weight matrix, of whatever kind."""

    def rows(self, start: int, stop: int) -> Codes:
        """Return some of the output channels."""
        ...

    def dequantize(self) -> Tensor:
        """Return the weights (out, d) that are meant, float32."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Linear layers with the same inputs, stacked, and all that a method may ask of them.

    What is large is made when it is asked for, and goes when the like is asked of another problem of the layer.
    """

    prefix: str
    """What stands before their names in the whole model."""
    names: tuple[str, ...]
    """Of the layers, within their decoder layer."""
    outputs: tuple[int, ...]
    """Of each layer."""
    statistics: Statistics
    stacked: Callable[[], Tensor]
    """Makes `weight`."""
    coupled: Callable[[], gptq.Outputs] | None
    """Says how errors of the outputs add up in the loss, where that was measured."""
    factor: Callable[[bool], gptq.Factor]
    """Computes the factor of the second moment, in the order of activation or not; who asks keeps it."""

    @property
    def weight(self) -> Tensor:
        """Return (out, d), float32; the outputs of one layer after those of the one before."""
        return self.stacked()

    @property
    def inputs(self) -> int:
        """Return d, the number of input channels."""
        return len(self.statistics.mean_abs)

    @cached_property
    def totals(self) -> dict[str, float]:
        """Return the squared outputs of each layer, summed over the calibration tokens."""
        moment = self.statistics.second_moment
        parts = zip(self.names, self.weight.split(self.outputs), strict=True)
        return {name: squared_outputs(weight, moment) for name, weight in parts}

    def parts(self, codes: Codes) -> dict[str, Codes]:
        """Return the codes of each layer, of codes for all of them."""
        stops = list(accumulate(self.outputs))
        bounds = zip(self.names, self.outputs, stops, strict=True)
        return {name: codes.rows(stop - rows, stop) for name, rows, stop in bounds}

    def scaled(self, inputs: Tensor, outputs: Tensor) -> Problem:
        """Return it with its weights times `inputs`, divided by `outputs`, and with its inputs divided by `inputs`."""
        moment = (self.statistics.second_moment / inputs).div_(inputs[:, None])
        statistics = replace(self.statistics, second_moment=moment, mean_abs=self.statistics.mean_abs / inputs)
        weight = (self.weight * inputs).div_(outputs[:, None])
        return replace(self, stacked=lambda: weight, statistics=statistics, factor=_unfactored)


@dataclass(frozen=True, eq=False)
class LayerProblems:
    """All of a decoder layer that is to be quantized."""

    number: int
    block: Block
    shape: LlamaConfig
    """Of the whole model."""
    inputs: Mapping[str, Problem]
    """By the keys of `INPUTS`."""
    refine: int | None = None
    """Sweeps of coordinate descent after GPTQ; `None`: as the width of the codes has it."""
    imatrix: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean square of input channels by the names of GGUF tensors, where not that of the statistics is to be used."""

    def together(self, variants: Sequence[Variant]) -> Iterator[Sequence[Variant]]:
        """Yield as many variants after the other as are solved together: what is held of them has a bound."""
        weights = sum(problem.inputs * sum(problem.outputs) for problem in self.inputs.values())
        count = max(1, HELD // weights)
        for first in range(0, len(variants), count):
            yield variants[first : first + count]

    def heaviest_first(self) -> list[Problem]:
        """Return the problems, the one with most inputs first.

        Its second moment's factor is by far the largest: better in memory with the codes of one problem than of all.
        """
        return sorted(self.inputs.values(), key=lambda problem: (problem.inputs, sum(problem.outputs)), reverse=True)


@dataclass(frozen=True)
class Fit:
    """How well one linear layer was quantized."""

    error: float
    """Squared error of the outputs, summed over the calibration tokens."""
    total: float
    """Squared outputs, summed likewise."""
    damp: float | None = None
    """Damping that was needed; `None` without GPTQ."""
    dead_channels: int = 0


@dataclass(eq=False)
class Solution:
    """A decoder layer as one variant has it."""

    codes: dict[str, Codes] = field(default_factory=dict)
    """Of each linear layer, by its name within the decoder layer."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """The same names."""
    importance: dict[str, Tensor] = field(default_factory=dict)
    """Mean square of input channels that was heeded, by the names of GGUF tensors; only of GGUF variants."""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Other parameters of the decoder layer that go with these codes, such as norms that scales were folded into."""
    seconds: float | None = None
    """That finding it took, where several were found together; each has its share."""

    def weights(self) -> dict[str, Callable[[], Tensor]]:
        """Return what makes the parameters of the decoder layer that are not as they were, dequantized."""
        codes: dict[str, Callable[[], Tensor]] = {f"{name}.weight": x.dequantize for name, x in self.codes.items()}
        return codes | {name: partial(torch.clone, value) for name, value in self.changed.items()}

    def add(
        self,
        problem: Problem,
        codes: Codes,
        *,
        times: Tensor | None = None,
        damp: float | None = None,
        dead: int = 0,
    ) -> None:
        """Take in the codes of a problem's layers and measure them.

        Args:
            problem: What was solved.
            codes: Of all its layers.
            times: What each output is multiplied with later on, where it is.
            damp: Damping that was needed.
            dead: Input channels without activity.
        """
        self.add_parts(problem, problem.parts(codes), times=times, damp=damp, dead=dead)

    def add_parts(
        self,
        problem: Problem,
        parts: Mapping[str, Codes],
        *,
        times: Tensor | None = None,
        damp: float | None = None,
        dead: int = 0,
    ) -> None:
        """Take in codes that came layer by layer, perhaps of different kinds; arguments as of `add`."""
        moment, weights = problem.statistics.second_moment, problem.weight.split(problem.outputs)
        factors = [None] * len(weights) if times is None else times[:, None].split(problem.outputs)
        for (name, part), weight, factor in zip(parts.items(), weights, factors, strict=True):
            error = squared_outputs(weight, moment, less=part, times=factor)
            if not math.isfinite(error) and not all(bool(rows.isfinite().all()) for rows in _rows(weight, part)):
                problem_said = f"weights up to {weight.abs().max():g} need a scale beyond float16"
                raise LlameroError(problem_said, where=f"{problem.prefix}{name}.weight")
            total = problem.totals[name] if factor is None else squared_outputs(weight, moment, times=factor)
            self.codes[name], self.fits[name] = part, Fit(error, total, damp, dead)


def pose(
    layer: Layer,
    shape: LlamaConfig,
    *,
    damp: float,
    refine: int | None = None,
    imatrix: Mapping[str, Tensor] | None = None,
    felt: Callable[[str], Tensor] | None = None,
) -> LayerProblems:
    """Return what is to be solved of a decoder layer.

    Args:
        layer: The layer and what flowed into it.
        shape: Of the whole model.
        damp: Damping asked for.
        refine: Sweeps after GPTQ; `None`: as the width of the codes has it.
        imatrix: Of another file, see `LayerProblems.imatrix`.
        felt: Returns second moments of the loss's gradients by the outputs, of a key of `INPUTS`, if measured.

    Raises:
        LlameroError: If weights are not finite.
    """
    prefix = f"model.layers.{layer.number}."
    weights, coupled = _Latest(), _Latest()

    def problem(source: str, names: tuple[str, ...]) -> Problem:
        statistics = layer.statistics[source]
        outputs = tuple(len(finite_weight(layer.block, prefix, name)) for name in names)

        def factor(by_activation: bool) -> gptq.Factor:
            moment, where = statistics.second_moment, prefix + source
            return gptq.factorize(moment, by_activation=by_activation, damp=damp, where=where)

        def stacked() -> Tensor:
            return weights(source, lambda: _stacked(layer.block, names))

        def couple() -> gptq.Outputs:
            moments = felt
            assert moments is not None
            return coupled(source, lambda: gptq.couple(moments(source).to(statistics.second_moment.device)))

        return Problem(prefix, names, outputs, statistics, stacked, couple if felt else None, factor)

    inputs = {source: problem(source, names) for source, names in INPUTS.items()}
    return LayerProblems(layer.number, layer.block, shape, inputs, refine, imatrix or {})


class _Latest:
    """Keeps the last thing that was made of a kind, and lets go of it before another is made."""

    def __init__(self) -> None:
        self._key: object = None
        self._made: Any = None

    def __call__(self, key: object, make: Callable[[], Any]) -> Any:
        if key != self._key:
            self._key = self._made = None
            self._made = make()
            self._key = key
        return self._made


def _stacked(block: Block, names: tuple[str, ...]) -> Tensor:
    """Return the weights of linear layers one below the other, float32."""
    weights = [block.get_submodule(name).get_parameter("weight").detach() for name in names]
    stacked = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=torch.float32)
    for rows, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        rows.copy_(weight)
    return stacked


def finite_weight(block: Block, prefix: str, name: str) -> Tensor:
    """Return the weight of a linear layer; refuse one that is broken."""
    weight = block.get_submodule(name).get_parameter("weight").detach()
    if not bool(weight.isfinite().all()):
        raise LlameroError("weights that are not finite", where=f"{prefix}{name}.weight")
    return weight


def _unfactored(by_activation: bool) -> gptq.Factor:
    raise NotImplementedError("the factor of scaled inputs")


def squared_outputs(w: Tensor, h: Tensor, *, less: Codes | None = None, times: Tensor | None = None) -> float:
    """Return `tr(w h w.T)`: the squared outputs, summed over the tokens behind `h`.

    Args:
        w: Weight (out, d).
        h: Second moment (d, d) of the inputs.
        less: What is subtracted from the weight.
        times: (out, 1), what each output is multiplied with.
    """
    squares, start = [], 0  # row by row: whatever the number of threads
    for part in _rows(w, less):
        if times is not None:
            part = part * times[start : start + len(part)]
        squares.append(((part @ h) * part).sum(1, dtype=torch.float64))
        start += len(part)
    return float(torch.cat(squares).sum())


def _rows(w: Tensor, less: Codes | None) -> Iterator[Tensor]:
    """Yield some rows after the other, less what codes stand for."""
    start = 0
    for part in w.split(max(1, AT_ONCE // w.shape[1])):
        stop = start + len(part)
        yield part if less is None else part - less.rows(start, stop).dequantize()
        start = stop
