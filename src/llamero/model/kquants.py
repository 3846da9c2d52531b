"""The block formats of GGUF files: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the k-quants Q2_K … Q6_K, to bytes and back.

A k-quant cuts a row into super-blocks of 256 weights, these into 8 or 16 small groups. A group has a scale (and in
Q2_K, Q4_K and Q5_K a minimum) of a few bits, which the super-block's float16 scales multiply. Byte layouts are those of
ggml's `block_q*` structures.

Encoding minimizes the squared error of the weights, each counted with the importance of its input channel (the diagonal
of GPTQ's second moment, llama.cpp's "imatrix"). Every group tries several ranges with its scale and minimum fitted by
weighted least squares; then the small scales are rounded, the weights rounded again with what is really stored, and the
super-block's two scales fitted once more to the codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llamero.checkpoint.gguf import TYPES, dtype_of

SWEEPS = 3
"""How often codes and the scales of a super-block are fitted to each other."""

COARSE = 6
"""Of how many ranges that could be tried one is, where not all are; half as many for codes of up to `FEW` bits. Codes
and scales of wider ones are then fitted to each other once. GPTQ rounds on such grids as well as on the best: KL of a
trained model of 7 M parameters is within 1 %."""

FEW = 3
"""Bits of codes that so few ranges are too few for: KL at 2 bits would be 7 % higher."""

_NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

KINDS = {name: TYPES[name] for name in _NAMES}
"""Every block format that is written and read here."""


# -- whole matrices


def encode(
    w: Float[Tensor, "out d"], kind: str, *, importance: Float[Tensor, " d"] | None = None
) -> UInt8[Tensor, "out bytes"]:
    """Return a matrix as the bytes of its rows.

    Args:
        w: Weight, its inputs a multiple of the kind's block.
        kind: A name of `KINDS`.
        importance: How much the error of each input channel counts; all alike where it is not given.
    """
    rows = []
    for part in w.float().split(max(1, _AT_ONCE // w.shape[1])):
        rows.append(_PACKERS[kind](fit(part, kind, importance=importance)).view(len(part), -1))
    return torch.cat(rows)


def fit(
    w: Float[Tensor, "out d"],
    kind: str,
    *,
    importance: Float[Tensor, "*out d"] | None = None,
    thorough: bool = True,
) -> "Fitted":
    """Return the blocks of a matrix, row after row: scales and codes whose weighted squared error is small.

    Args:
        w: Weight, its inputs a multiple of the kind's block.
        kind: A name of `KINDS`.
        importance: How much the error of each input channel counts; all alike where it is not given.
        thorough: Whether all ranges are tried, or every `COARSE`th: for weights that others will yet answer for.
    """
    form = KINDS[kind]
    if w.shape[1] % form.block:
        raise ValueError(f"{w.shape[1]} inputs are no multiple of the {form.block} weights of a block of {kind}")
    blocks = w.float().reshape(-1, form.block)
    weight = torch.ones_like(blocks)
    if importance is not None:
        weight = importance.float().clamp(min=1e-12).expand_as(w).reshape(-1, form.block)
    return _FITTERS[kind](blocks, weight, 1 if thorough else COARSE)


def pack(found: "Fitted", kind: str, *, rows: int) -> UInt8[Tensor, "out bytes"]:
    """Return the bytes of the rows that blocks make up."""
    return _PACKERS[kind](found).view(rows, -1)


class Fitted(Protocol):
    """Blocks whose scales are decided: a weight is `step · code − low`."""

    @property
    def codes(self) -> Tensor:
        """Return the code of every weight."""
        ...

    @property
    def ends(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        ...

    def grid(self) -> tuple[Float[Tensor, "blocks n"], Float[Tensor, "blocks n"]]:
        """Return step and low of every weight."""
        ...

    def recoded(self, codes: Float[Tensor, "blocks n"]) -> "Fitted":
        """Return the same blocks with other codes."""
        ...


def decode(data: UInt8[Tensor, "out bytes"], kind: str) -> Float[Tensor, "out d"]:
    """Return the matrix that some bytes stand for, in float32."""
    form = KINDS[kind]
    return _DECODERS[kind](data.reshape(-1, form.size)).view(len(data), -1)


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """A weight matrix in a type of GGUF, plain (F32, F16, BF16) or of blocks."""

    data: Tensor
    """Of a plain type (out, d) in its dtype, else the bytes (out, bytes) of the rows."""
    kind: str
    """A name of `checkpoint.gguf.TYPES`."""

    def rows(self, start: int, stop: int) -> "BlockCodes":
        """Return some of the output channels."""
        return BlockCodes(self.data[start:stop], self.kind)

    def dequantize(self) -> Float[Tensor, "out d"]:
        """Return the weights that are meant, in float32."""
        return decode(self.data, self.kind) if self.kind in KINDS else self.data.float()


def round_to(w: Float[Tensor, "out d"], kind: str, *, importance: Float[Tensor, " d"] | None = None) -> BlockCodes:
    """Return a matrix in a type, plain or of blocks; arguments as of `encode`."""
    dtype = dtype_of(TYPES[kind])
    return BlockCodes(encode(w, kind, importance=importance) if dtype is None else w.to(dtype), kind)


_AT_ONCE = 1 << 17
"""Weights that are encoded together: what is computed of them stays in the cache of a core."""


# -- bytes and halves


def _half(values: Float[Tensor, " blocks"]) -> UInt8[Tensor, "blocks 2"]:
    return values.half().view(torch.uint8).view(-1, 2)


def _unhalf(data: UInt8[Tensor, "blocks 2"]) -> Float[Tensor, "blocks 1"]:
    return data.contiguous().view(torch.float16).float()


def _stored(values: Tensor) -> Tensor:
    """Return values as float16 holds them."""
    return values.half().float()


def _safe(values: Tensor) -> Tensor:
    """Return values that can be divided by; what they divide is 0 where they are."""
    return torch.where(values == 0, 1.0, values)


# -- Q4_0, Q5_0, Q8_0: one scale for 32 weights; Q4_1, Q5_1: a lowest value too


@dataclass(frozen=True, eq=False)
class Plain:
    """Blocks of one grid each."""

    codes: Int[Tensor, "blocks n"]
    step: Float[Tensor, "blocks 1"]
    low: Float[Tensor, "blocks 1"]
    """What is subtracted; both as float16 holds them."""
    ends: tuple[int, int]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return step and low of every weight."""
        return self.step.expand(self.codes.shape), self.low.expand(self.codes.shape)

    def recoded(self, codes: Tensor) -> "Plain":
        """Return the same blocks with other codes."""
        return replace(self, codes=codes.to(self.codes.dtype))


def _scaled(w: Tensor, scale: Tensor, low: int, high: int) -> Plain:
    codes = (w / _safe(scale)).round().clamp(low, high).to(torch.int8)
    return Plain(codes, scale, torch.zeros_like(scale), (low, high))


def _nearest_scale(w: Tensor, weight: Tensor, low: int, high: int, every: int) -> Tensor:
    """Return for each block the scale, of those that map its largest weight to an end, that errs least."""
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))  # with its sign: it goes to the longer end, `low`
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for step in range(-(9 // every) * every, 10, every):
        inverse = (low + 0.1 * step * (1 if low < -8 else 0.7)) / _safe(largest)
        codes = (w * inverse).round().clamp(low, high)
        scale = _stored(
            (weight * w * codes).sum(1, keepdim=True) / _safe((weight * codes * codes).sum(1, keepdim=True))
        )
        codes = (w / _safe(scale)).round().clamp(low, high)
        error = (weight * (w - scale * codes) ** 2).sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return torch.where(largest == 0, 0.0, best)


def _fit_q4_0(w: Tensor, weight: Tensor, every: int) -> Plain:
    return _scaled(w, _nearest_scale(w, weight, -8, 7, every), -8, 7)


def _pack_q4_0(found: Plain) -> Tensor:
    codes = (found.codes + 8).to(torch.uint8)
    return torch.cat([_half(found.step[:, 0]), codes[:, :16] | codes[:, 16:] << 4], 1)


def _decode_q4_0(data: Tensor) -> Tensor:
    codes = torch.cat([data[:, 2:] & 15, data[:, 2:] >> 4], 1)
    return _unhalf(data[:, :2]) * (codes.float() - 8)


def _fit_q5_0(w: Tensor, weight: Tensor, every: int) -> Plain:
    return _scaled(w, _nearest_scale(w, weight, -16, 15, every), -16, 15)


def _pack_q5_0(found: Plain) -> Tensor:
    codes = (found.codes + 16).to(torch.uint8)
    low = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4
    return torch.cat([_half(found.step[:, 0]), _bits(codes >> 4), low], 1)


def _decode_q5_0(data: Tensor) -> Tensor:
    codes = torch.cat([data[:, 6:] & 15, data[:, 6:] >> 4], 1) | _unbits(data[:, 2:6]) << 4
    return _unhalf(data[:, :2]) * (codes.float() - 16)


def _bits(flags: UInt8[Tensor, "blocks n"]) -> UInt8[Tensor, "blocks bytes"]:
    """Return flags as bits, the first one lowest."""
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.unflatten(1, (-1, 8)) << shifts).sum(2, dtype=torch.uint8)


def _unbits(data: UInt8[Tensor, "blocks bytes"]) -> UInt8[Tensor, "blocks n"]:
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> shifts) & 1).flatten(1)


def _fit_q8_0(w: Tensor, weight: Tensor, every: int) -> Plain:
    return _scaled(w, _stored(w.abs().amax(1, keepdim=True) / 127), -127, 127)


def _pack_q8_0(found: Plain) -> Tensor:
    return torch.cat([_half(found.step[:, 0]), found.codes.view(torch.uint8)], 1)


def _decode_q8_0(data: Tensor) -> Tensor:
    return _unhalf(data[:, :2]) * data[:, 2:].contiguous().view(torch.int8).float()


def _ranged(w: Tensor, weight: Tensor, last: int, every: int) -> Plain:
    """Return the blocks of those grids that fit ranges around that of its weights."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best_step, best_low = torch.zeros_like(low), _stored(low)
    least = torch.full_like(low, torch.inf)
    for tried in range(-(10 // every) * every, 21, every):
        trial = (high - low) / (last + 0.1 * tried * (last / 15 if last < 15 else 1))
        codes = ((w - low) / _safe(trial)).round().clamp(0, last)
        step, start = (_stored(value) for value in _line(w, weight, codes))
        codes = ((w - start) / _safe(step)).round().clamp(0, last)
        error = (weight * (step * codes + start - w) ** 2).sum(1, keepdim=True)
        better = (error < least) & (step > 0)
        best_step, best_low = torch.where(better, step, best_step), torch.where(better, start, best_low)
        least = torch.where(better, error, least)
    codes = torch.where(best_step == 0, 0.0, ((w - best_low) / _safe(best_step)).round().clamp(0, last))
    return Plain(codes.to(torch.uint8), best_step, -best_low, (0, last))


def _line(w: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and lowest value with which codes come nearest to the weights of their block."""

    def total(values: Tensor) -> Tensor:
        return (weight * values).sum(1, keepdim=True)

    ones, c, cc, x, xc = total(torch.ones_like(w)), total(codes), total(codes * codes), total(w), total(w * codes)
    determinant = ones * cc - c * c
    step = torch.where(determinant <= 0, 0.0, (ones * xc - x * c) / _safe(determinant))
    return step, (x - step * c) / _safe(ones)


def _fit_q4_1(w: Tensor, weight: Tensor, every: int) -> Plain:
    return _ranged(w, weight, 15, every)


def _pack_q4_1(found: Plain) -> Tensor:
    nibbles = found.codes[:, :16] | found.codes[:, 16:] << 4
    return torch.cat([_half(found.step[:, 0]), _half(-found.low[:, 0]), nibbles], 1)


def _decode_q4_1(data: Tensor) -> Tensor:
    codes = torch.cat([data[:, 4:] & 15, data[:, 4:] >> 4], 1)
    return _unhalf(data[:, :2]) * codes.float() + _unhalf(data[:, 2:4])


def _fit_q5_1(w: Tensor, weight: Tensor, every: int) -> Plain:
    return _ranged(w, weight, 31, every)


def _pack_q5_1(found: Plain) -> Tensor:
    codes = found.codes
    nibbles = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4
    return torch.cat([_half(found.step[:, 0]), _half(-found.low[:, 0]), _bits(codes >> 4), nibbles], 1)


def _decode_q5_1(data: Tensor) -> Tensor:
    codes = torch.cat([data[:, 8:] & 15, data[:, 8:] >> 4], 1) | _unbits(data[:, 4:8]) << 4
    return _unhalf(data[:, :2]) * codes.float() + _unhalf(data[:, 2:4])


# -- groups with a scale and a minimum: Q2_K, Q4_K, Q5_K


@dataclass(frozen=True, eq=False)
class Affine:
    """Super-blocks of groups `d · scale · code − dmin · minimum`."""

    codes: UInt8[Tensor, "blocks groups n"]
    scales: UInt8[Tensor, "blocks groups"]
    minimums: UInt8[Tensor, "blocks groups"]
    d: Float[Tensor, " blocks"]
    dmin: Float[Tensor, " blocks"]
    """Both as float16 holds them."""
    last: int
    """Largest code."""

    @property
    def ends(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        return 0, self.last

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return step and low of every weight, (blocks, 256)."""
        step, low = self._grid()
        return step.expand(self.codes.shape).flatten(1), low.expand(self.codes.shape).flatten(1)

    def recoded(self, codes: Tensor) -> "Affine":
        """Return the same blocks with other codes, (blocks, 256)."""
        return replace(self, codes=codes.to(torch.uint8).view(self.codes.shape))

    def weights(self) -> Float[Tensor, "blocks groups n"]:
        """Return what they stand for."""
        step, low = self._grid()
        return step * self.codes - low

    def _grid(self) -> tuple[Tensor, Tensor]:
        step = (self.d[:, None] * self.scales)[..., None]
        return step, (self.dmin[:, None] * self.minimums)[..., None]


def affine(
    w: Float[Tensor, "blocks groups n"],
    weight: Float[Tensor, "blocks groups n"],
    *,
    bits: int,
    scale_bits: int,
    every: int = 1,
) -> Affine:
    """Return codes whose weighted squared error is small.

    Args:
        w: Weights.
        weight: How much the error of each counts.
        bits: Of a code.
        scale_bits: Of a group's scale and of its minimum.
        every: Of how many ranges one is tried.
    """
    last, top = 2**bits - 1, 2**scale_bits - 1
    every, sweeps = _effort(every, bits)
    if bits != 4:
        # large weights are to be hit first: by measurement (KL of a trained model of 7 M parameters), without it a
        # third higher at 2 bits and a quarter higher at 5, but 7 % lower at 4
        weight = weight * (w.square().mean((1, 2), keepdim=True).sqrt() + w.abs())
    step, low = _affine_search(w, weight, last, every)
    d, scales = _rounded_scales(step, weight.sum(2), top)
    dmin, minimums = _rounded_scales(low, weight.sum(2), top)
    found = _affine_codes(w, d, scales, dmin, minimums, last)
    best, least = found, _error(w, found.weights(), weight)
    for _ in range(sweeps):
        d, dmin = _affine_refit(w, weight, found)
        scales, minimums = _affine_rescale(w, weight, found, d, dmin, top)
        found = _affine_codes(w, d, scales, dmin, minimums, last)
        error = _error(w, found.weights(), weight)
        best, least = _better(best, found, error < least), torch.minimum(error, least)
    return best


def _effort(every: int, bits: int) -> tuple[int, int]:
    """Return of how many ranges one is tried for codes of a width, and how often codes and scales are fitted."""
    if every == 1:
        return 1, SWEEPS
    return (max(1, every // 2), SWEEPS) if bits <= FEW else (every, 1)


def _affine_search(w: Tensor, weight: Tensor, last: int, every: int) -> tuple[Tensor, Tensor]:
    """Return step and minimum (≥ 0) of every group, not rounded yet."""
    high, low = w.amax(2, keepdim=True).clamp(min=0), (-w.amin(2, keepdim=True)).clamp(min=0)
    step = (high + low) / last
    best_step, best_low = step, low
    least = torch.full_like(step, torch.inf)
    for tried in range(-(10 // every) * every, 21, every):
        # the range shrinks and grows around that of the weights
        trial = (high + low) / (last + 0.1 * tried * (last / 15 if last < 15 else 1))
        codes = ((w + low) / _safe(trial)).round().clamp(0, last)
        fit_step, fit_low = _least_squares(w, weight, codes)
        codes = ((w + fit_low) / _safe(fit_step)).round().clamp(0, last)
        error = (weight * (fit_step * codes - fit_low - w) ** 2).sum(2, keepdim=True)
        better = error < least
        best_step, best_low = torch.where(better, fit_step, best_step), torch.where(better, fit_low, best_low)
        least = torch.minimum(error, least)
    return best_step[..., 0], best_low[..., 0]


def _least_squares(w: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and minimum ≥ 0 with which codes come nearest to the weights of their group."""

    def total(values: Tensor) -> Tensor:
        return values.sum(2, keepdim=True)

    felt = weight * codes
    ones, c, cc, x, xc = total(weight), total(felt), total(felt * codes), total(weight * w), total(felt * w)
    determinant = ones * cc - c * c
    step = (ones * xc - x * c) / _safe(determinant)
    low = -(cc * x - c * xc) / _safe(determinant)
    alone = xc / _safe(cc)  # where the best minimum is below 0, none is better
    flat = (determinant <= 0) | (low < 0) | (step <= 0)
    return torch.where(flat, alone.clamp(min=0), step), torch.where(flat, 0.0, low)


def _rounded_scales(values: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return a common float16 factor and the integers that it multiplies, for values ≥ 0 of each super-block."""
    largest = values.amax(1, keepdim=True)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for tried in range(-4, 5):
        factor = largest / (top + 0.5 * tried)
        numbers = (values / _safe(factor)).round().clamp(0, top)
        factor = _stored(
            (weight * values * numbers).sum(1, keepdim=True) / _safe((weight * numbers**2).sum(1, keepdim=True))
        )
        numbers = (values / _safe(factor)).round().clamp(0, top)
        error = (weight * (values - factor * numbers) ** 2).sum(1, keepdim=True)
        best, least = torch.where(error < least, factor, best), torch.minimum(error, least)
    best = torch.where(largest == 0, 0.0, best)
    return best[:, 0], (values / _safe(best)).round().clamp(0, top).to(torch.uint8)


def _affine_codes(w: Tensor, d: Tensor, scales: Tensor, dmin: Tensor, minimums: Tensor, last: int) -> Affine:
    step, low = (d[:, None] * scales)[..., None], (dmin[:, None] * minimums)[..., None]
    codes = torch.where(step == 0, 0.0, ((w + low) / _safe(step)).round().clamp(0, last))
    return Affine(codes.to(torch.uint8), scales, minimums, d, dmin, last)


def _affine_refit(w: Tensor, weight: Tensor, found: Affine) -> tuple[Tensor, Tensor]:
    """Return the two factors of each super-block that fit its codes best, all else staying as it is."""
    a = (found.scales[..., None] * found.codes.float()).flatten(1)
    b = -found.minimums.float()[..., None].expand_as(w).flatten(1)
    x, c = w.flatten(1), weight.flatten(1)
    aa, bb, ab = ((c * p * q).sum(1) for p, q in ((a, a), (b, b), (a, b)))
    ax, bx = (c * a * x).sum(1), (c * b * x).sum(1)
    determinant = aa * bb - ab * ab
    sure = determinant > 1e-6 * aa * bb
    d = torch.where(sure, (bb * ax - ab * bx) / _safe(determinant), (ax - ab * found.dmin) / _safe(aa))
    dmin = torch.where(sure, (aa * bx - ab * ax) / _safe(determinant), found.dmin)
    wrong = (d <= 0) | (dmin < 0)
    return _stored(torch.where(wrong, found.d, d)), _stored(torch.where(wrong, found.dmin, dmin))


def _affine_rescale(
    w: Tensor, weight: Tensor, found: Affine, d: Tensor, dmin: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of every group as integers, of those near the best ones for its codes."""
    step, low = _least_squares(w, weight, found.codes.float())
    return tuple(
        torch.where(
            factor[:, None] == 0, old.float(), (value[..., 0] / _safe(factor)[:, None]).round().clamp(0, top)
        ).to(torch.uint8)
        for value, factor, old in ((step, d, found.scales), (low, dmin, found.minimums))
    )  # type: ignore[return-value]


def _error(w: Tensor, made: Tensor, weight: Tensor) -> Tensor:
    return (weight * (w - made) ** 2).sum((1, 2))


def _better(best: Affine, found: Affine, where: Tensor) -> Affine:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where.view(-1, *[1] * (a.dim() - 1)), a, b)

    return Affine(
        choose(found.codes, best.codes),
        choose(found.scales, best.scales),
        choose(found.minimums, best.minimums),
        choose(found.d, best.d),
        choose(found.dmin, best.dmin),
        found.last,
    )


def _fit_q4_k(w: Tensor, weight: Tensor, every: int) -> Affine:
    return affine(w.view(-1, 8, 32), weight.view(-1, 8, 32), bits=4, scale_bits=6, every=every)


def _fit_q5_k(w: Tensor, weight: Tensor, every: int) -> Affine:
    return affine(w.view(-1, 8, 32), weight.view(-1, 8, 32), bits=5, scale_bits=6, every=every)


def _pack_affine(found: Affine) -> Tensor:
    codes = found.codes.view(-1, 4, 2, 32)  # two groups share 32 bytes
    low = codes & 15
    nibbles = (low[:, :, 0] | low[:, :, 1] << 4).flatten(1)
    parts = [_half(found.d), _half(found.dmin), _six_bits(found.scales, found.minimums)]
    if found.last > 15:
        shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
        parts.append((found.codes >> 4 << shifts).sum(1, dtype=torch.uint8))
    return torch.cat([*parts, nibbles], 1)


def _decode_q4_k(data: Tensor) -> Tensor:
    return _affine_weights(data, data[:, 16:], None)


def _decode_q5_k(data: Tensor) -> Tensor:
    return _affine_weights(data, data[:, 48:], data[:, 16:48])


def _affine_weights(data: Tensor, nibbles: Tensor, high: Tensor | None) -> Tensor:
    nibbles = nibbles.view(-1, 4, 32)
    codes = torch.stack([nibbles & 15, nibbles >> 4], 2).view(-1, 8, 32)
    if high is not None:
        shifts = torch.arange(8, dtype=torch.uint8, device=data.device)[:, None]
        codes = codes | ((high[:, None] >> shifts) & 1) << 4
    scales, minimums = _unsix_bits(data[:, 4:16])
    d, dmin = _unhalf(data[:, :2])[:, 0], _unhalf(data[:, 2:4])[:, 0]
    return Affine(codes, scales, minimums, d, dmin, 31 if high is not None else 15).weights().flatten(1)


def _six_bits(scales: UInt8[Tensor, "blocks 8"], minimums: UInt8[Tensor, "blocks 8"]) -> UInt8[Tensor, "blocks 12"]:
    """Return eight scales and eight minimums of 6 bits as ggml packs them."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minimums[:, :4] | minimums[:, 4:] >> 4 << 6
    return torch.cat([first, second, scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4], 1)


def _unsix_bits(data: UInt8[Tensor, "blocks 12"]) -> tuple[UInt8[Tensor, "blocks 8"], UInt8[Tensor, "blocks 8"]]:
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], 1)
    return scales, torch.cat([second & 63, rest >> 4 | second >> 6 << 4], 1)


def _fit_q2_k(w: Tensor, weight: Tensor, every: int) -> Affine:
    return affine(w.view(-1, 16, 16), weight.view(-1, 16, 16), bits=2, scale_bits=4, every=every)


def _pack_q2_k(found: Affine) -> Tensor:
    return torch.cat([found.scales | found.minimums << 4, _two_bits(found.codes), _half(found.d), _half(found.dmin)], 1)


def _decode_q2_k(data: Tensor) -> Tensor:
    codes = _untwo_bits(data[:, 16:80]).view(-1, 16, 16)
    d, dmin = _unhalf(data[:, 80:82])[:, 0], _unhalf(data[:, 82:84])[:, 0]
    return Affine(codes, data[:, :16] & 15, data[:, :16] >> 4, d, dmin, 3).weights().flatten(1)


def _two_bits(codes: UInt8[Tensor, "blocks groups n"]) -> UInt8[Tensor, "blocks 64"]:
    """Return 256 codes of 2 bits: of each half, four runs of 32 share 32 bytes."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)[:, None]
    return (codes.reshape(-1, 2, 4, 32) << shifts).sum(2, dtype=torch.uint8).flatten(1)


def _untwo_bits(data: UInt8[Tensor, "blocks 64"]) -> UInt8[Tensor, "blocks 256"]:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)[:, None]
    return ((data.reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


# -- groups with a scale alone: Q3_K, Q6_K


@dataclass(frozen=True, eq=False)
class Linear:
    """Super-blocks of groups `d · scale · code`, both signed."""

    codes: Int[Tensor, "blocks groups n"]
    scales: Int[Tensor, "blocks groups"]
    d: Float[Tensor, " blocks"]
    """As float16 holds it."""
    ends: tuple[int, int]
    """Smallest and largest code."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return step and low of every weight, (blocks, 256)."""
        step = (self.d[:, None] * self.scales)[..., None].expand(self.codes.shape).flatten(1)
        return step, torch.zeros_like(step)

    def recoded(self, codes: Tensor) -> "Linear":
        """Return the same blocks with other codes, (blocks, 256)."""
        return replace(self, codes=codes.to(torch.int8).view(self.codes.shape))

    def weights(self) -> Float[Tensor, "blocks groups n"]:
        """Return what they stand for."""
        return (self.d[:, None] * self.scales)[..., None] * self.codes


def symmetric(
    w: Float[Tensor, "blocks groups n"],
    weight: Float[Tensor, "blocks groups n"],
    *,
    bits: int,
    scale_bits: int,
    every: int = 1,
) -> Linear:
    """Return codes from −2^(bits−1) up whose weighted squared error is small.

    Args:
        w: Weights.
        weight: How much the error of each counts.
        bits: Of a code.
        scale_bits: Of a group's scale, its sign included.
        every: Of how many ranges one is tried.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    every, sweeps = _effort(every, bits)
    ends = -(2 ** (scale_bits - 1)), 2 ** (scale_bits - 1) - 1
    weight = weight * (w.square().mean((1, 2), keepdim=True).sqrt() + w.abs())
    step = _linear_search(w, weight, low, high, every)
    largest = step.gather(1, step.abs().argmax(1, keepdim=True))
    best: Linear | None = None
    least = torch.full_like(largest[:, 0], torch.inf)
    for tried in range(-4, 5, 4 if every > 1 else 1):
        d = _stored(largest[:, 0] / (ends[0] + 0.25 * tried))
        found = _linear_codes(w, d, step, low, high, ends)
        for _ in range(sweeps):
            found = _linear_refit(w, weight, found, low, high, ends)
        error = _error(w, found.weights(), weight)
        if best is None:
            best, least = found, error
            continue
        better = error < least
        best = Linear(
            torch.where(better[:, None, None], found.codes, best.codes),
            torch.where(better[:, None], found.scales, best.scales),
            torch.where(better, found.d, best.d),
            found.ends,
        )
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _linear_search(w: Tensor, weight: Tensor, low: int, high: int, every: int) -> Tensor:
    """Return the step of every group, not rounded yet: its sign says which end the largest weight goes to."""
    largest = w.gather(2, w.abs().argmax(2, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for tried in range(-(9 // every) * every, 10, every):
        codes = (w * (low + 0.1 * tried) / _safe(largest)).round().clamp(low, high)
        step = (weight * w * codes).sum(2, keepdim=True) / _safe((weight * codes * codes).sum(2, keepdim=True))
        codes = (w / _safe(step)).round().clamp(low, high)
        error = (weight * (w - step * codes) ** 2).sum(2, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return torch.where(largest == 0, 0.0, best)[..., 0]


def _linear_codes(w: Tensor, d: Tensor, step: Tensor, low: int, high: int, ends: tuple[int, int]) -> Linear:
    scales = (step / _safe(d)[:, None]).round().clamp(*ends)
    scales = torch.where(d[:, None] == 0, 0.0, scales)
    actual = (d[:, None] * scales)[..., None]
    codes = torch.where(actual == 0, 0.0, (w / _safe(actual)).round().clamp(low, high))
    return Linear(codes.to(torch.int8), scales.to(torch.int8), d, (low, high))


def _linear_refit(w: Tensor, weight: Tensor, found: Linear, low: int, high: int, ends: tuple[int, int]) -> Linear:
    codes = found.codes.float()
    shape = found.scales[..., None] * codes
    d = (weight * w * shape).sum((1, 2)) / _safe((weight * shape * shape).sum((1, 2)))
    d = torch.where(d == 0, found.d, _stored(d))
    step = (weight * w * codes).sum(2) / _safe((weight * codes * codes).sum(2))
    step = torch.where(step == 0, found.d[:, None] * found.scales, step)
    return _linear_codes(w, d, step, low, high, ends)


def _fit_q6_k(w: Tensor, weight: Tensor, every: int) -> Linear:
    return symmetric(w.view(-1, 16, 16), weight.view(-1, 16, 16), bits=6, scale_bits=8, every=every)


def _pack_q6_k(found: Linear) -> Tensor:
    codes = (found.codes + 32).view(torch.uint8).view(-1, 2, 4, 32)
    low = (codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4).flatten(1)  # 0 with 2, 1 with 3
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)[:, None]
    high = (codes >> 4 << shifts).sum(2, dtype=torch.uint8).flatten(1)
    return torch.cat([low, high, found.scales.view(torch.uint8), _half(found.d)], 1)


def _decode_q6_k(data: Tensor) -> Tensor:
    low = data[:, :128].view(-1, 2, 2, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)[:, None]
    high = (data[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = torch.cat([low & 15, low >> 4], 2) | high << 4
    scales = data[:, 192:208].contiguous().view(torch.int8)
    signed = codes.reshape(-1, 16, 16).to(torch.int8) - 32
    return Linear(signed, scales, _unhalf(data[:, 208:])[:, 0], (-32, 31)).weights().flatten(1)


def _fit_q3_k(w: Tensor, weight: Tensor, every: int) -> Linear:
    return symmetric(w.view(-1, 16, 16), weight.view(-1, 16, 16), bits=3, scale_bits=6, every=every)


def _pack_q3_k(found: Linear) -> Tensor:
    codes = (found.codes + 4).view(torch.uint8).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
    mask = (codes >> 2 << shifts).sum(1, dtype=torch.uint8)
    scales = (found.scales + 32).view(torch.uint8)
    nibbles = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)[:, None]
    tops = (scales.view(-1, 4, 4) >> 4 << pairs).sum(1, dtype=torch.uint8)
    return torch.cat([mask, _two_bits(codes & 3), nibbles, tops, _half(found.d)], 1)


def _decode_q3_k(data: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)[:, None]
    third = ((data[:, None, :32] >> shifts) & 1).flatten(1)
    codes = (_untwo_bits(data[:, 32:96]) | third << 2).to(torch.int8) - 4
    nibbles, tops = data[:, 96:104], data[:, 104:108]
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)[:, None]
    scales = torch.cat([nibbles & 15, nibbles >> 4], 1) | (((tops[:, None] >> pairs) & 3) << 4).flatten(1)
    return (
        Linear(codes.view(-1, 16, 16), scales.to(torch.int8) - 32, _unhalf(data[:, 108:])[:, 0], (-4, 3))
        .weights()
        .flatten(1)
    )


_FITTERS: dict[str, Callable[[Tensor, Tensor, int], Fitted]] = {
    "Q4_0": _fit_q4_0,
    "Q4_1": _fit_q4_1,
    "Q5_0": _fit_q5_0,
    "Q5_1": _fit_q5_1,
    "Q8_0": _fit_q8_0,
    "Q2_K": _fit_q2_k,
    "Q3_K": _fit_q3_k,
    "Q4_K": _fit_q4_k,
    "Q5_K": _fit_q5_k,
    "Q6_K": _fit_q6_k,
}
_PACKERS: dict[str, Callable[[Any], Tensor]] = {
    "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1,
    "Q5_0": _pack_q5_0,
    "Q5_1": _pack_q5_1,
    "Q8_0": _pack_q8_0,
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_affine,
    "Q5_K": _pack_affine,
    "Q6_K": _pack_q6_k,
}
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}
