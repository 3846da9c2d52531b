"""AWQ: scale up the input channels that matter before rounding, and clip the weights that stretch a grid for nothing.

Lin et al. 2023, arXiv:2306.00978, section 3. There the error of a candidate is that of real forward passes; here it is
`tr(dW H dW.T)` with the second moment `H` of the same inputs, which is the same number for a linear layer and costs one
product. The scales are folded into what comes before: a norm, or the rows of the layer that makes the inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.checkpoint.codes import GroupCodes
from llamero.model import rtn
from llamero.quantize.problem import AT_ONCE, LayerProblems, Problem, Solution

BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""What makes the inputs of each problem: scales are folded into its rows."""

_UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
"""Their outputs are multiplied with each other, so that a clipped outlier costs more than its own error."""

RATIOS = tuple(step / 20 for step in range(20))
"""How much activity counts against the size of weights in the scales that are tried, beside no scales at all."""

SHRINKS = tuple(1 - step / 20 for step in range(10))
"""Shares of a group's range that are tried, from all of it to a little over half."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """By how much input channels are scaled before rounding."""

    scales: Float[Tensor, " d"]
    error: float
    """Squared error of the outputs after plain rounding, summed over tokens."""


def search(
    w: Float[Tensor, "out d"],
    h: Float[Tensor, "d d"],
    mean_abs: Float[Tensor, " d"],
    *,
    bits: int,
    group_size: int,
    sym: bool = False,
) -> Scaled:
    """Return the scales `s` with which rounding `w * s` and using `x / s` changes the outputs least.

    Args:
        w: Weight of a linear layer, or of several with the same inputs.
        h: Second moment `x @ x.T` of the inputs.
        mean_abs: Mean magnitude of each input channel.
        bits: Width of a code.
        group_size: Input channels that share one grid, or -1.
        sym: Whether zero is in the middle of every grid.
    """
    best: Scaled | None = None
    for s in _candidates(w, mean_abs, size=w.shape[1] if group_size == -1 else group_size):
        error = 0.0
        for part in _rows(w):
            change = part - rtn.nearest(part * s, bits=bits, group_size=group_size, sym=sym).div_(s)
            error += float((change @ h).mul_(change).sum(dtype=torch.float64))
        if best is None or error < best.error:
            best = Scaled(s, error)
    assert best is not None
    return best


def _candidates(w: Tensor, mean_abs: Tensor, *, size: int) -> Iterator[Tensor]:
    yield torch.ones_like(mean_abs)
    sums = []
    for part in _rows(w):
        groups = part.abs().unflatten(1, (-1, size))
        sums.append((groups / (groups.amax(2, keepdim=True) + 1e-6)).flatten(1).sum(0))
    weight = torch.stack(sums).sum(0) / len(w)  # (d,)
    for ratio in RATIOS:
        s = (mean_abs**ratio / (weight ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        yield s / (s.max() * s.min()).sqrt()


def clip(
    w: Float[Tensor, "out d"], h: Float[Tensor, "d d"], *, bits: int, group_size: int, sym: bool = False
) -> Float[Tensor, "out d"]:
    """Return the weights cut off where a smaller range makes the outputs of their group change less.

    Args:
        w: Weight of a linear layer.
        h: Second moment of its inputs.
        bits: Width of a code.
        group_size: Input channels that share one grid, or -1.
        sym: Whether zero is in the middle of every grid.
    """
    size = w.shape[1] if group_size == -1 else group_size
    clipped = torch.empty_like(w)
    for start, moment in _blocks(h, size):
        part = w[:, start : start + size]
        reach, least = part.abs().amax(1, keepdim=True), None
        best = part
        for shrink in SHRINKS:
            cut = part.clamp(-reach * shrink, reach * shrink)
            change = part - rtn.nearest(cut, bits=bits, group_size=-1, sym=sym)
            error = ((change @ moment) * change).sum(1)
            if least is None:
                best, least = cut, error
            else:
                better = error < least
                best, least = torch.where(better[:, None], cut, best), torch.minimum(error, least)
        clipped[:, start : start + size] = best
    return clipped


def _blocks(h: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(h), size):
        yield start, h[start : start + size, start : start + size]


def _clipped(problem: Problem, *, bits: int, group_size: int, sym: bool) -> dict[str, GroupCodes]:
    """Return the codes of a problem's layers, clipped first where that helps."""
    moment, codes = problem.statistics.second_moment, {}
    for name, part in zip(problem.names, problem.weight.split(problem.outputs), strict=True):
        weight = part if name in _UNCLIPPED else clip(part, moment, bits=bits, group_size=group_size, sym=sym)
        codes[name] = rtn.quantize(weight, bits=bits, group_size=group_size, sym=sym)
    return codes


def solve(layer: LayerProblems, *, bits: int, group_size: int, sym: bool = False) -> Solution:
    """Return a decoder layer with scaled, clipped and rounded weights, and with what the scales were folded into.

    Where heads share values (grouped queries), the inputs of `o_proj` stay as they are: a value's row feeds several.
    """
    parameters = dict(layer.block.named_parameters())
    folded: dict[str, Tensor] = {}
    for source, problem in layer.inputs.items():
        if len(parameters[f"{BEFORE[source]}.weight"]) == problem.inputs:
            about = problem.statistics
            found = search(
                problem.weight, about.second_moment, about.mean_abs, bits=bits, group_size=group_size, sym=sym
            )
            folded[BEFORE[source]] = found.scales
    solution = Solution()
    for source, problem in layer.inputs.items():
        ones = torch.ones_like(problem.statistics.mean_abs)
        rows = [
            folded.get(name, ones.new_ones(count)) for name, count in zip(problem.names, problem.outputs, strict=True)
        ]
        scaled = problem.scaled(folded.get(BEFORE[source], ones), torch.cat(rows))
        codes = _clipped(scaled, bits=bits, group_size=group_size, sym=sym)
        solution.add_parts(scaled, codes, times=torch.cat(rows))
        del scaled  # before the next ones are made, not after
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        if owner in folded and (leaf == "bias" or owner not in solution.codes):
            solution.changed[name] = value.detach().float() / folded[owner]
    return solution


def _rows(w: Tensor) -> tuple[Tensor, ...]:
    return w.split(max(1, AT_ONCE // w.shape[1]))
