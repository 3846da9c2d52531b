"""compressed-tensors directories (`pack-quantized`): codes of 2 to 8 bits, each output a bit stream.

The format of vLLM's own quantizer; its kernels take widths and asymmetric grids that they refuse in GPTQ files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llamero.checkpoint import hf
from llamero.checkpoint.codes import Actorder, GroupCodes, groups_of, pack, period, unpack
from llamero.core.errors import LlameroError

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of a code."""

VERSION = "0.15.0"
"""Release of the compressed-tensors library since which this layout is read."""


@dataclass(frozen=True)
class Format:
    """How the quantized layers of a directory are stored."""

    bits: int
    group_size: int
    """Input channels of a group; -1 is all of them."""
    sym: bool
    """Zero points are in the middle, and not stored."""
    dtype: torch.dtype = torch.float16
    """Of the scales: that of the rest of the model."""

    title: ClassVar[str] = "compressed-tensors"
    marker: ClassVar[str] = "weight_packed"
    """Tensor by which a packed layer is recognised in files."""
    config_file: ClassVar[str] = ""
    """There is no file beside config.json: one that is meant for other formats would mislead their readers."""

    def specs(self, inputs: int, outputs: int) -> dict[str, hf.Spec]:
        """Return shape and dtype of what `encode` returns, which stands in place of a `weight`."""
        groups = groups_of(inputs, self.group_size)
        specs = {
            "weight_packed": hf.Spec((outputs, inputs * self.bits // 32), torch.int32),
            "weight_scale": hf.Spec((outputs, groups), self.dtype),
            "weight_shape": hf.Spec((2,), torch.int64),
        }
        if not self.sym:
            specs["weight_zero_point"] = hf.Spec((outputs * self.bits // 32, groups), torch.int32)
        return specs

    def encode(self, weight: GroupCodes) -> dict[str, Tensor]:
        """Return the tensors of a linear layer, whose groups must lie side by side."""
        if not weight.side_by_side:
            raise ValueError("compressed-tensors stores groups of neighbouring channels")
        if not bool((weight.scales.to(self.dtype) == weight.scales).all()):
            raise ValueError(f"scales of {weight.scales.dtype} that {self.dtype} cannot hold")
        stored = {
            "weight_packed": pack(weight.codes.T, self.bits).T.contiguous(),
            "weight_scale": weight.scales.to(self.dtype).contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not self.sym:
            stored["weight_zero_point"] = pack(weight.zeros, self.bits)
        elif not bool((weight.zeros == 2 ** (self.bits - 1)).all()):
            raise ValueError("a zero point that is not in the middle")
        return stored

    def decode(self, stored: Mapping[str, Tensor]) -> GroupCodes:
        """Return the codes of a linear layer, the inverse of `encode`."""
        codes, scales = unpack(stored["weight_packed"].T, self.bits).T, stored["weight_scale"]
        size = -(-codes.shape[1] // scales.shape[1])
        group = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // size
        if self.sym:
            zeros = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=codes.device)
        else:
            zeros = unpack(stored["weight_zero_point"], self.bits)
        return GroupCodes(codes, scales, zeros, group, self.bits)

    def step(self, width: int, *, outputs: bool) -> int:
        """Return at multiples of how many channels the tensors can be cut.

        Args:
            width: Channels there are.
            outputs: Whether outputs are to be cut, or inputs.
        """
        words = period(self.bits)[0]
        if outputs:
            return 1 if self.sym else words
        return words if self.group_size == -1 else math.lcm(words, self.group_size)

    def cut(self, stored: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        """Return one of some equal shares of a layer's outputs, or of its inputs."""
        if outputs:
            return {name: tensor.chunk(of)[share] for name, tensor in stored.items()}
        whole = self.group_size == -1
        return {
            name: tensor if whole and name != "weight_packed" else tensor.chunk(of, 1)[share]
            for name, tensor in stored.items()
        }

    def damage(self, stored: Mapping[str, Tensor]) -> str:
        """Return what is wrong with the tensors, or nothing."""
        return ""

    def config_beside(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def config(self, *, sym: bool, actorder: Actorder = "none", damp: float | None = None) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json: what loaders ask for and no local path.

        Args:
            sym: All zero points are in the middle.
            actorder: In which order columns were solved; only said of groups, vLLM fails where rows have it.
            damp: Damping asked for; readers have no key for it.
        """
        grouped = self.group_size != -1
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": sym,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "actorder": "static" if grouped and actorder == "static" else None,
            "block_structure": None,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {
            "format": "pack-quantized",
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }


_OTHER_FORMATS = {
    "int-quantized": "8-bit weights, mostly with 8-bit activations",
    "float-quantized": "8-bit floating point",
    "naive-quantized": "8-bit floating point or integers",
    "nvfp4-pack-quantized": "4-bit floating point",
    "mxfp4-pack-quantized": "4-bit floating point",
    "marlin-24": "half of the weights left out",
    "dense": "not quantized",
}

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed",),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_MUST_BE_OF_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "type": ("int",),
    "strategy": ("group", "channel"),
    "actorder": (None, "static", "weight"),
    "block_structure": (None,),
    "dynamic": (False,),
}


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the layout that a compressed-tensors `quantization_config` describes, or refuse what is not understood."""
    kind = keys.get("format")
    if kind in _OTHER_FORMATS:
        raise LlameroError(
            f"compressed-tensors of format `{kind}` ({_OTHER_FORMATS[kind]}) are not read here",
            where=where,
            fix="a version of the model in `pack-quantized`, or the model it was made from",
        )
    _refuse_other(keys, _MUST_BE, where=where)
    groups = keys.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise LlameroError("`config_groups` must describe one group of layers", where=where)
    (group,) = groups.values()
    if group.get("targets") != ["Linear"] or group.get("input_activations") or group.get("output_activations"):
        raise LlameroError(
            "only the weights of all linear layers together are read (`targets: [Linear]`, no activations)", where=where
        )
    weights = group.get("weights") or {}
    _refuse_other(weights, _MUST_BE_OF_WEIGHTS, where=where)
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if bits not in BITS:
        raise LlameroError(f"`num_bits: {bits}` is not a width", where=where, fix=f"one of {BITS}")
    if weights["strategy"] == "channel":
        size = -1
    elif not isinstance(size, int) or size <= 0:
        raise LlameroError(f"`group_size: {size}` is not a group size", where=where)
    return Format(bits, size, bool(weights.get("symmetric", True)))


def _refuse_other(keys: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], *, where: str) -> None:
    for key, values in allowed.items():
        if keys.get(key) not in values and not (key not in keys and None in values):
            raise LlameroError(
                f"quantization key `{key}: {keys.get(key)}` is not understood; it may change how codes are stored",
                where=where,
                fix=f"read here: {', '.join(map(str, values))}",
            )
