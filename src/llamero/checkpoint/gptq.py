"""GPTQ directories: low-bit codes as dense bit streams, with scales, zero points and group numbers beside them.

Layout v1 (AutoGPTQ's) stores each zero point minus one, v2 as it is. Frantar et al. 2022, arXiv:2210.17323.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llamero.checkpoint import hf
from llamero.core.errors import LlameroError

BITS = (2, 3, 4, 8)
"""Widths of a code that readers of this format know."""

MULTIPLE = 32
"""Readers need input and output channels to be multiples of this."""

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""What stands in place of a `weight`."""

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class GroupCodes:
    """A weight matrix on low-bit grids: `scale * (code - zero)`, one grid per output and group of inputs."""

    codes: UInt8[Tensor, "out d"]
    scales: Float[Tensor, "out groups"]
    """float16, as they are stored."""
    zeros: UInt8[Tensor, "out groups"]
    g_idx: Int[Tensor, " d"]
    """Group of each input channel, int32."""
    bits: int

    def rows(self, start: int, stop: int) -> "GroupCodes":
        """Return some of the output channels."""
        part = slice(start, stop)
        return GroupCodes(self.codes[part], self.scales[part], self.zeros[part], self.g_idx, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
        """Return the weights that the codes stand for; exact in float32 (11 bits times at most 9)."""
        group = self.g_idx.long()
        steps = self.codes.to(dtype) - self.zeros.to(dtype)[:, group]
        return steps * self.scales.to(dtype)[:, group]


def pack(codes: UInt8[Tensor, "n columns"], bits: int) -> Int[Tensor, "words columns"]:
    """Return each column as a little-endian bit stream cut into int32 words; value i has bits [i*b, i*b + b).

    Args:
        codes: Values below 2^bits; `n * bits` is a multiple of 32.
        bits: Width of a value.
    """
    values, words = _period(bits)
    if codes.shape[0] % values:
        raise ValueError(f"{codes.shape[0]} codes of {bits} bits do not fill 32-bit words")
    parts = codes.unflatten(0, (-1, values)).long()  # (periods, values, columns)
    stream = torch.zeros(parts.shape[0], words, *codes.shape[1:], dtype=torch.int64, device=codes.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        stream[:, word] |= parts[:, i] << shift
        if shift + bits > 32:
            stream[:, word + 1] |= parts[:, i] >> (32 - shift)
    return _signed(stream & _WORD).flatten(0, 1)


def unpack(stream: Int[Tensor, "words columns"], bits: int) -> UInt8[Tensor, "n columns"]:
    """Return the values of bit streams, the inverse of `pack`."""
    values, words = _period(bits)
    parts = stream.unflatten(0, (-1, words))  # (periods, words, columns)
    codes = torch.empty(parts.shape[0], values, *stream.shape[1:], dtype=torch.uint8, device=stream.device)
    mask = (1 << bits) - 1
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = parts[:, word] >> shift
        if shift + bits > 32:
            # the sign must not be shifted in above the bits that this word still has
            value = (value & ((1 << (32 - shift)) - 1)) | (parts[:, word + 1] << (32 - shift))
        codes[:, i] = (value & mask).to(torch.uint8)
    return codes.flatten(0, 1)


def _period(bits: int) -> tuple[int, int]:
    """Return after how many values, and words, a stream meets a word boundary again."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def period(bits: int) -> int:
    """Return after how many values a stream of codes meets a word boundary again: it can be cut there."""
    return _period(bits)[0]


def _signed(words: Tensor) -> Tensor:
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def encode(weight: GroupCodes) -> dict[str, Tensor]:
    """Return the tensors of a linear layer as layout v1 stores them; every zero point must be at least 1."""
    if bool((weight.zeros == 0).any()):
        raise ValueError("a zero point of 0 cannot be stored minus one")
    return {
        "qweight": pack(weight.codes.T, weight.bits),
        "qzeros": pack(weight.zeros - 1, weight.bits).T.contiguous(),
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.g_idx.to(torch.int32),
    }


def specs(inputs: int, outputs: int, *, bits: int, groups: int) -> dict[str, hf.Spec]:
    """Return shape and dtype of what `encode` returns."""
    return {
        "qweight": hf.Spec((inputs * bits // 32, outputs), torch.int32),
        "qzeros": hf.Spec((groups, outputs * bits // 32), torch.int32),
        "scales": hf.Spec((groups, outputs), torch.float16),
        "g_idx": hf.Spec((inputs,), torch.int32),
    }


def decode_zeros(qzeros: Int[Tensor, "groups words"], bits: int, *, offset: int) -> UInt8[Tensor, "groups out"]:
    """Return zero points.

    Where codes do not cross words, the one is added back to whole words: writers that subtract it from whole
    words let a zero point of 0 borrow from its neighbour, and only the same addition returns it. Where all
    are at least 1 there is no difference.

    Args:
        qzeros: As stored.
        bits: Width of a code.
        offset: What was subtracted: 1 in layout v1, 0 in v2.
    """
    if not offset:
        return unpack(qzeros.T, bits).T
    values, words = _period(bits)
    if words > 1:
        return (unpack(qzeros.T, bits).T + 1) & (2**bits - 1)
    ones = int(pack(torch.ones(values, 1, dtype=torch.uint8), bits))
    added = (qzeros.long() & _WORD) + (ones & _WORD)
    return unpack(_signed(added & _WORD).T, bits).T


@dataclass(frozen=True)
class Format:
    """How the quantized layers of a directory are to be read."""

    bits: int
    group_size: int
    """Input channels of a group; -1 is all of them."""
    zero_offset: int
    """What was subtracted from stored zero points."""

    def groups(self, inputs: int) -> int:
        """Return how many groups a layer with so many inputs has."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)


def quantization_config(
    *, bits: int, group_size: int, desc_act: bool, static_groups: bool, sym: bool, damp: float | None
) -> dict[str, Any]:
    """Return the `quantization_config` of a config.json: what loaders ask for and no local path.

    Args:
        bits: Width of a code.
        group_size: Input channels of a group, -1 for all.
        desc_act: Groups were formed in the order of activation; readers need `g_idx`.
        static_groups: Columns were solved in the order of activation, groups lie side by side.
        sym: All zero points are in the middle.
        damp: Damping asked for, as a fraction of the mean diagonal; `None` where none was needed.
    """
    return {
        "bits": bits,
        "group_size": group_size,
        **({} if damp is None else {"damp_percent": damp}),
        "desc_act": desc_act,
        "static_groups": static_groups,
        "sym": sym,
        "true_sequential": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "model_file_base_name": "model",
    }


_OFFSETS = {"gptq": 1, "gptq_v2": 0}

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "pack_dtype": ("int32", None),
    "dynamic": (None, {}),
    "is_marlin_format": (False, None),
    "use_marlin": (False, None),
    "adapter": (None, {}),
    "rotation": (None, ""),
}
"""Keys whose other values are another layout."""

_READ = {"bits", "group_size", "quant_method", "method", "checkpoint_format", "format"}

_HARMLESS = {
    "desc_act", "static_groups", "sym", "true_sequential", "damp_percent", "damp_auto_increment", "lm_head", "mse",
    "model_name_or_path", "model_file_base_name", "meta", "act_group_aware", "gptaq", "v2", "v2_alpha", "fail_safe",
    "tokenizer", "dataset", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "backend",
    "pad_token_id", "disable_exllama", "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs",
    "modules_in_block_to_quantize", "use_cuda_fp16", "model_seqlen", "offload_to_disk", "offload_to_disk_path",
    "compute_device_filter", "hyb_act", "mock_quantization", "quant_path", "parallel_packing",
    "auto_forward_data_parallel",
}  # fmt: skip
"""Keys about how the codes were found, or about other loaders: which layers are packed, in what order and with how
many bits is read from the tensors themselves."""


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the layout that a GPTQ `quantization_config` describes, or refuse what is not understood."""
    for key, value in keys.items():
        allowed = _MUST_BE.get(key)
        if (allowed is not None and value not in allowed) or (allowed is None and key not in _READ | _HARMLESS):
            raise LlameroError(
                f"quantization key `{key}: {value}` is not understood; it may change how codes are stored",
                where=where,
                fix="remove it if you are sure that it does not",
            )
    layout = (
        keys.get("checkpoint_format", keys.get("format")) or "gptq"
    )  # files of 2023 name none: v1 was all there was
    if layout not in _OFFSETS:
        raise LlameroError(
            f"GPTQ layout `{layout}` is not read here", where=where, fix=f"one of: {', '.join(_OFFSETS)}"
        )
    bits, group_size = keys.get("bits"), keys.get("group_size")
    if bits not in BITS:
        raise LlameroError(f"`bits: {bits}` is not a GPTQ width", where=where, fix="one of: 2, 3, 4, 8")
    if not isinstance(group_size, int) or (group_size != -1 and group_size <= 0):
        raise LlameroError(
            f"`group_size: {group_size}` is not a group size", where=where, fix="a number above 0, or -1"
        )
    return Format(bits, group_size, _OFFSETS[layout])
