"""Rotary position embeddings: which angle each pair of channels turns by, per token.

Su et al. 2021, arXiv:2104.09864. Each way of stretching the context is a small class that knows its
mathematics (`frequencies`) and its form in a model's config.json (`to_hf`). Phases are float32 always.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llamero.core.errors import LlameroError, did_you_mean


@runtime_checkable
class Rope(Protocol):
    """What the model asks of a rotary embedding."""

    @property
    def theta(self) -> float:
        """Base of the wavelengths."""
        ...

    @property
    def attention_scale(self) -> float:
        """Factor on cosine and sine; 1 except for YaRN."""
        ...

    @property
    def depends_on_length(self) -> bool:
        """Whether sequences of different lengths turn at different speeds."""
        ...

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return radians per token for a sequence of `length` tokens."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """Return the `rope_parameters` of a config.json."""
        ...


def rotations(
    positions: Int[Tensor, " tokens"], frequencies: Float[Tensor, "*tokens half"], *, scale: float = 1.0
) -> Float[Tensor, "tokens half 2"]:
    """Return cosine and sine of each token's phases, float32.

    Args:
        positions: Position of each token in its sequence.
        frequencies: Radians per token, shared (half) or for each token its own (tokens, half).
        scale: Factor on both, `Rope.attention_scale`.
    """
    phase = positions[:, None].float() * frequencies.float()
    # all cosines lie before all sines in memory: `rotate` reads each by itself, over and over
    return (torch.stack((phase.cos(), phase.sin())) * scale).movedim(0, -1)


def rotate(
    x: Float[Tensor, "tokens heads d"], rotation: Float[Tensor, "tokens half 2"]
) -> Float[Tensor, "tokens heads d"]:
    """Turn channel i with channel i + d/2, the pairing of Hugging Face checkpoints."""
    cos, sin = rotation[:, None, :, 0], rotation[:, None, :, 1]  # (tokens, 1, half)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def plain_frequencies(theta: float, head_dim: int) -> Float[Tensor, " half"]:
    """Return theta^(-2i/d), in float32 and in the order of operations that every other loader uses."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


@dataclass(frozen=True)
class Default:
    """No scaling."""

    theta: float
    head_dim: int
    attention_scale = 1.0
    depends_on_length = False

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return the plain frequencies, whatever the length."""
        return plain_frequencies(self.theta, self.head_dim)

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`."""
        return {"rope_type": "default", "rope_theta": self.theta}


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    theta: float
    head_dim: int
    factor: float
    attention_scale = 1.0
    depends_on_length = False

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return the plain frequencies divided by `factor`."""
        return plain_frequencies(self.theta, self.head_dim) / self.factor

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`."""
        return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}


@dataclass(frozen=True)
class Dynamic:
    """Base grown with the length beyond the original context ("dynamic NTK").

    The length is that of the whole sequence, fixed when it begins: a base that grew while tokens are
    generated would disagree with the keys already in the cache.
    """

    theta: float
    head_dim: int
    factor: float
    original_context: int
    attention_scale = 1.0
    depends_on_length = True

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return the frequencies of a sequence of `length` tokens."""
        stretch = self.factor * max(length, self.original_context) / self.original_context - (self.factor - 1)
        theta = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return plain_frequencies(theta, self.head_dim)

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`; the original context is the config's max_position_embeddings."""
        return {"rope_type": "dynamic", "rope_theta": self.theta, "factor": self.factor}


@dataclass(frozen=True)
class Yarn:
    """Slow channels interpolated, fast ones left alone, attention sharpened (Peng et al. 2023, arXiv:2309.00071)."""

    theta: float
    head_dim: int
    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    depends_on_length = False

    @property
    def attention_scale(self) -> float:
        """Return the temperature of section 3.4, or what the config states."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _channel(self, turns: float) -> float:
        """Return the channel pair that turns `turns` times over the original context."""
        wavelength = self.original_context / (turns * 2 * math.pi)
        return self.head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return frequencies blended by a ramp over the channels ("NTK-by-parts")."""
        low, high = self._channel(self.beta_fast), self._channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        wavelengths = self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        keep = 1 - ((torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`; what is at its default is left out."""
        optional = {
            "attention_factor": self.attention_factor,
            "mscale": self.mscale,
            "mscale_all_dim": self.mscale_all_dim,
        }
        return {
            "rope_type": "yarn",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_context,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            **({} if self.truncate else {"truncate": False}),
            **{key: value for key, value in optional.items() if value is not None},
        }


@dataclass(frozen=True)
class Llama3:
    """Only the rotations that do not complete within the original context are slowed (Llama 3.1)."""

    theta: float
    head_dim: int
    factor: float
    original_context: int
    low_freq_factor: float
    high_freq_factor: float
    attention_scale = 1.0
    depends_on_length = False

    def divisors(self) -> Float[Tensor, " half"]:
        """Return what the plain frequencies are divided by; GGUF files hold these."""
        turns = self.original_context / (2 * math.pi / plain_frequencies(self.theta, self.head_dim))
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = 1 / ((1 - keep) / self.factor + keep)
        return torch.where(keep < 0, self.factor, torch.where(keep > 1, 1.0, blended))

    def frequencies(self, length: int) -> Float[Tensor, " half"]:
        """Return frequencies divided by `factor` below `low_freq_factor` turns, kept above the high one."""
        plain = plain_frequencies(self.theta, self.head_dim)
        turns = self.original_context / (2 * math.pi / plain)  # over the original context
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - keep) * plain / self.factor + keep * plain
        return torch.where(keep < 0, plain / self.factor, torch.where(keep > 1, plain, blended))

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`."""
        return {
            "rope_type": "llama3",
            "rope_theta": self.theta,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_context,
        }


def llama3_of(
    divisors: Float[Tensor, " half"], *, theta: float, head_dim: int, original_context: int
) -> Llama3 | Default | None:
    """Return the scaling whose frequencies are the plain ones divided by these, `None` if no Llama's are.

    GGUF files hold only the divisors. The original context cannot be told from the bounds that are counted in it (twice
    of it and twice of both bounds divide the same), so it must be given. Where no frequency is slow enough to be
    divided by the whole factor, many factors divide the same; the one with Llama 3.1's own bounds is preferred.

    Args:
        divisors: Of each frequency.
        theta: Base of the wavelengths.
        head_dim: Channels of a head.
        original_context: Tokens that the model was first made for.
    """
    if bool((divisors == 1).all()):
        return Default(theta, head_dim)
    plain = plain_frequencies(theta, head_dim)
    turns = original_context * plain.double() / math.tau
    for factor, low, high in _scalings(divisors.double(), turns):
        if low < high and factor > 1:
            found = Llama3(theta, head_dim, factor, original_context, low, high)
            if torch.allclose(found.frequencies(original_context) * divisors, plain, rtol=1e-4, atol=0):
                return found
    return None


def _scalings(divisors: Tensor, turns: Tensor) -> Iterator[tuple[float, float, float]]:
    """Yield factors with their low and high bounds that may divide so, the likeliest first."""
    factor = float(divisors.max())
    yield factor, 1.0, 4.0
    slowed = divisors > 1 + 1e-5
    for number in torch.nonzero(slowed)[:, 0].tolist():
        keep = (float(turns[number]) - 1) / 3  # between the bounds 1 and 4
        rest = 1 / float(divisors[number]) - keep
        if 0 < keep < 1 and rest > 0:
            yield float(f"{(1 - keep) / rest:.4g}"), 1.0, 4.0
    for inside in (slowed & (divisors < factor * (1 - 1e-5)), slowed):  # the slowest has the whole factor, or not yet
        t, y = turns[inside].tolist(), (1 / divisors[inside]).tolist()
        if len(t) >= 2 and y[0] > y[-1]:
            # 1 / divisor is a line over turns, from 1 / factor at the low bound to 1 at the high one
            slope = (y[0] - y[-1]) / (t[0] - t[-1])
            start = y[0] - slope * t[0]
            yield factor, (1 / factor - start) / slope, (1 - start) / slope
            yield 1 / (slope + start), 1.0, (1 - start) / slope


TYPES: dict[str, type[Default | Linear | Dynamic | Yarn | Llama3]] = {
    "default": Default,
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "llama3": Llama3,
}
"""Every RoPE type there is. To add one: a class above, a line here, a row in the parity test."""

_NEEDS_CONTEXT = ("dynamic", "yarn", "llama3")


def from_hf(parameters: Mapping[str, Any], *, head_dim: int, context: int, where: str) -> Rope:
    """Return the rotary embedding that a config.json describes.

    Args:
        parameters: `rope_parameters`, or `rope_scaling` with `rope_theta` added; `type` and `rope_type` are one.
        head_dim: Channels of a head.
        context: The config's max_position_embeddings, original context where the parameters name none.
        where: File, for errors.
    """
    keys = dict(parameters)
    kind = keys.pop("rope_type", keys.pop("type", "default"))
    keys.pop("type", None)
    if kind not in TYPES:
        raise LlameroError(f"unknown RoPE type `{kind}`", where=where, fix=did_you_mean(str(kind), TYPES))
    if keys.pop("partial_rotary_factor", 1.0) != 1.0:
        raise LlameroError("`partial_rotary_factor` other than 1 is not a Llama's", where=where)
    original = keys.pop("original_max_position_embeddings", None)
    if kind in _NEEDS_CONTEXT:
        keys["original_context"] = context if kind == "dynamic" or original is None else original
    theta = float(keys.pop("rope_theta"))
    keys = {key: value for key, value in keys.items() if value is not None}
    return _build(kind, {"theta": theta, "head_dim": head_dim, **keys}, where)


def _build(kind: str, keys: dict[str, Any], where: str) -> Rope:
    known = fields(TYPES[kind])
    for key in keys.keys() - {field.name for field in known}:
        raise LlameroError(f"RoPE type `{kind}` does not know the key '{key}'", where=where)
    for field in known:
        if field.default is MISSING and field.name not in keys:
            raise LlameroError(f"RoPE type `{kind}` lacks the key '{field.name}'", where=where)
        value = keys.get(field.name)
        if isinstance(value, str) or (field.name == "factor" and not value):
            raise LlameroError(f"RoPE type `{kind}`: '{field.name}' must be a number, is {value!r}", where=where)
    return TYPES[kind](**keys)
