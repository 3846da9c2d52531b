"""How much memory and disk a calibration takes, from the shape of a model and what is asked for alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llamero.model.config import LlamaConfig
from llamero.model.load import DTYPES
from llamero.quantize import gptq, kept, problem, refine, sensitivity, streams
from llamero.quantize.calibrate import GROUP_TOKENS, PASS_BYTES, moments, passing, resting, weights
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.methods import REFINED, TOGETHER
from llamero.quantize.variants import Variant

_PROGRAM = 600_000_000
"""Bytes of Python, torch and what they load."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a calibration takes at its height, about."""

    memory: int
    """Of the process."""
    file: int
    """Of what waits on disk while it lasts: activations before and after a layer, and what the loss feels."""
    kept: int
    """Of statistics on disk where they are kept."""


def needs(shape: LlamaConfig, lengths: Sequence[int], asked: QuantizeConfig | None = None, *, stored: int = 2) -> Needs:
    """Return what a calibration takes: the highest of what its parts take one after the other.

    Args:
        shape: Of the model.
        lengths: Tokens of each sequence.
        asked: What is made; without it nothing is solved, and bfloat16 goes through the layers.
        stored: Bytes of a weight in the files of the model.
    """
    itemsize = 2 if asked is None else DTYPES[asked.calibration.arithmetic].itemsize
    followed = 1 if asked is None else len(_streams(asked, shape))
    waits = 2 * followed * sum(lengths) * shape.hidden_size * itemsize
    heights = list(_passing(shape, lengths, itemsize))
    if asked is not None:
        base = weights(shape) * stored + sum(moments(shape))
        heights += [base + height for height in _solving(shape, asked)]
        if streams.ask_what_is_felt(asked, _streams(asked, shape)):
            some = sensitivity.some_lengths(lengths, asked.sensitivity)
            heights += _measuring(shape, some, stored)
            found = shape.num_layers * sum(stack.felt for stack in _stacks(shape))
            # on the way back a layer's inputs go as what was found of it comes; activations come after all of that
            waits = max(shape.num_layers * sum(some) * shape.hidden_size * itemsize, found + waits)
    return Needs(_PROGRAM + max(heights), waits, kept.bytes_of(shape))


def _streams(asked: QuantizeConfig, shape: LlamaConfig) -> list[streams.Stream]:
    widths = {(stack.inputs, out) for stack in _stacks(shape) for out in stack.outputs}
    return streams.plan(asked, asked.parsed(), widths)


# -- text goes through a layer


def _passing(shape: LlamaConfig, lengths: Sequence[int], itemsize: int) -> Iterator[int]:
    """Yield the bytes while text goes through a layer, and while the sums become second moments."""
    group = passing(shape, min(sum(lengths), GROUP_TOKENS + max(lengths)), itemsize)
    rest = resting(shape, itemsize)
    at_once = min(torch.get_num_threads(), max(1, (PASS_BYTES - rest) // group))
    yield rest + group * min(at_once, -(-sum(lengths) // GROUP_TOKENS))
    yield sum(moments(shape)) + max(moments(shape))


def _measuring(shape: LlamaConfig, lengths: Sequence[int], stored: int) -> Iterator[int]:
    """Yield the bytes while it is measured how the loss feels outputs: at the end of the model and in a layer."""
    hidden, inner, words = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    flowing = 3 * 4 * sum(lengths) * hidden
    yield flowing + words * hidden * (4 + stored) + 4 * 4 * sensitivity.CHUNK * words
    made = 4 * max(lengths) * (12 * hidden + 8 * inner)
    yield flowing + 4 * weights(shape) + made + 2 * sum(stack.felt for stack in _stacks(shape))


# -- a layer is solved


@dataclass(frozen=True)
class _Stack:
    """Linear layers with the same inputs."""

    inputs: int
    outputs: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of weights."""
        return self.inputs * sum(self.outputs)

    @property
    def felt(self) -> int:
        """Return the bytes of what couples its outputs."""
        return 4 * sum(self.outputs) * sensitivity.set_size(sum(self.outputs))

    @property
    def given(self) -> int:
        """Return the bytes of its weights in float32."""
        return 4 * self.size

    @property
    def moment(self) -> int:
        """Return the bytes of the second moment of its inputs, or of the factor of that."""
        return 4 * self.inputs**2


def _stacks(shape: LlamaConfig) -> list[_Stack]:
    """Return the stacks of a layer in the order in which they are solved."""
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    values = shape.num_kv_heads * shape.head_dim
    found = [
        _Stack(hidden, (heads, values, values)), _Stack(heads, (hidden,)), _Stack(hidden, (inner, inner)),
        _Stack(inner, (hidden,)),
    ]  # fmt: skip
    return sorted(found, key=lambda stack: (stack.inputs, sum(stack.outputs)), reverse=True)


def _solving(shape: LlamaConfig, asked: QuantizeConfig) -> Iterator[int]:
    """Yield the bytes while each stack is solved by each method, beside the layer and the second moments."""
    by_method: dict[str, list[Variant]] = {}
    for variant in asked.parsed():
        by_method.setdefault(variant.method, []).append(variant)
    for method, variants in by_method.items():
        held = 0
        for stack in _stacks(shape):
            some = min(len(variants), max(1, problem.HELD // stack.size)) if method in {"gptq", "gguf"} else 1
            yield held + stack.given + _at_work(stack, variants, some, asked)
            held += stack.size if method in TOGETHER else 0


def _at_work(stack: _Stack, variants: Sequence[Variant], together: int, asked: QuantizeConfig) -> int:
    """Return the bytes while a stack is solved, beside what was there, its weights and the codes of other stacks."""
    method, codes = variants[0].method, (together + 1) * stack.size
    if method == "gptq":
        if asked.sensitivity:
            return 2 * stack.felt + codes + max(stack.moment + _coupled(stack, together), _errors(stack))
        again = [REFINED.get(variant.bits, 0) if asked.refine is None else asked.refine for variant in variants]
        refined = stack.moment + 7 * 4 * refine.ROWS * stack.inputs if any(again) else 0
        return codes + max(stack.moment + 3 * 4 * gptq.COLUMNS * stack.inputs, refined, _errors(stack))
    if method == "gguf":
        return stack.moment + codes + _errors(stack)
    largest = 4 * stack.inputs * max(stack.outputs)
    if method == "awq":
        return stack.moment + stack.given + largest + codes + _errors(stack)
    return codes + (5 * largest if method == "bitsandbytes" else _errors(stack))


def _errors(stack: _Stack) -> int:
    """Return the bytes for measuring the errors of some weights."""
    return 5 * 4 * min(problem.AT_ONCE, stack.size)


def _coupled(stack: _Stack, together: int) -> int:
    """Return the bytes of weights that wait for their turn, once for each variant and twice for all."""
    size = sensitivity.set_size(sum(stack.outputs))
    a_set = 4 * size * stack.inputs
    sets = min(sum(stack.outputs) // size, max(1, gptq.WAITING // (together * a_set)))
    return (together + 2) * sets * a_set + 3 * 4 * together * sets * max(
        gptq.OUTPUTS, size // gptq.MOST_STEPS
    ) * stack.inputs
