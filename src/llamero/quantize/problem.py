"""What a method is asked, a decoder layer at a time, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block
from llamero.quantize import gptq
from llamero.quantize.calibrate import INPUTS, Layer, Statistics


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
    """Linear layers with the same inputs, stacked, and all that a method may ask of them."""

    prefix: str
    """What stands before their names in the whole model."""
    names: tuple[str, ...]
    """Of the layers, within their decoder layer."""
    weight: Tensor
    """(out, d), float32; the outputs of one layer after those of the one before."""
    outputs: tuple[int, ...]
    """Of each layer."""
    statistics: Statistics
    outputs_felt: gptq.Outputs | None
    """How errors of the outputs add up in the loss, where that was measured."""
    factor: Callable[[bool], gptq.Factor]
    """Factor of the second moment, in the order of activation or not; computed once for all who ask in turn."""

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
        moment, magnitude = self.statistics.second_moment, self.statistics.mean_abs
        statistics = replace(
            self.statistics, second_moment=moment / inputs / inputs[:, None], mean_abs=magnitude / inputs
        )
        return replace(self, weight=self.weight * inputs / outputs[:, None], statistics=statistics, factor=_unfactored)


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

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters of the decoder layer that are not as they were, dequantized."""
        return {f"{name}.weight": codes.dequantize() for name, codes in self.codes.items()} | self.changed

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
        weights = problem.weight.split(problem.outputs)
        factors = (problem.weight.new_ones(len(problem.weight)) if times is None else times).split(problem.outputs)
        for (name, part), weight, factor in zip(parts.items(), weights, factors, strict=True):
            moment, change = problem.statistics.second_moment, weight - part.dequantize()
            if not bool(change.isfinite().all()):
                problem_said = f"weights up to {weight.abs().max():g} need a scale beyond float16"
                raise LlameroError(problem_said, where=f"{problem.prefix}{name}.weight")
            if times is None:
                error, total = squared_outputs(change, moment), problem.totals[name]
            else:
                error, total = (squared_outputs(w * factor[:, None], moment) for w in (change, weight))
            self.codes[name], self.fits[name] = part, Fit(error, total, damp, dead)


def pose(
    layer: Layer,
    shape: LlamaConfig,
    *,
    damp: float,
    refine: int | None = None,
    imatrix: Mapping[str, Tensor] | None = None,
    felt: Mapping[str, Tensor] | None = None,
) -> LayerProblems:
    """Return what is to be solved of a decoder layer.

    Args:
        layer: The layer and what flowed into it.
        shape: Of the whole model.
        damp: Damping asked for.
        refine: Sweeps after GPTQ; `None`: as the width of the codes has it.
        imatrix: Of another file, see `LayerProblems.imatrix`.
        felt: Second moments of the loss's gradients by the outputs, by the keys of `INPUTS`, if they were measured.

    Raises:
        LlameroError: If weights are not finite.
    """
    inputs = {
        source: _problem(layer, source, damp=damp, felt=None if felt is None else felt[source]) for source in INPUTS
    }
    return LayerProblems(layer.number, layer.block, shape, inputs, refine, imatrix or {})


def _problem(layer: Layer, source: str, *, damp: float, felt: Tensor | None) -> Problem:
    statistics, prefix = layer.statistics[source], f"model.layers.{layer.number}."
    weights = [finite_weight(layer.block, prefix, name) for name in INPUTS[source]]

    @lru_cache(maxsize=1)  # of a large layer it takes as much memory as all its weights
    def factor(by_activation: bool) -> gptq.Factor:
        return gptq.factorize(statistics.second_moment, by_activation=by_activation, damp=damp, where=prefix + source)

    outputs = tuple(len(weight) for weight in weights)
    coupled = None if felt is None else gptq.couple(felt.to(weights[0].device))
    return Problem(prefix, INPUTS[source], torch.cat(weights), outputs, statistics, coupled, factor)


def finite_weight(block: Block, prefix: str, name: str) -> Tensor:
    """Return the weight of a linear layer; refuse one that is broken."""
    weight = block.get_submodule(name).get_parameter("weight").detach()
    if not bool(weight.isfinite().all()):
        raise LlameroError("weights that are not finite", where=f"{prefix}{name}.weight")
    return weight


def _unfactored(by_activation: bool) -> gptq.Factor:
    raise NotImplementedError("the factor of scaled inputs")


def squared_outputs(w: Tensor, h: Tensor) -> float:
    """Return `tr(w h w.T)`: the squared outputs, summed over the tokens behind `h`."""
    return float(((w @ h) * w).sum(1, dtype=torch.float64).sum())  # row by row: whatever the number of threads
