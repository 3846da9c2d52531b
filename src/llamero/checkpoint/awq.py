"""AWQ directories (layout `gemm`): 4-bit codes packed along the outputs, eight to a word, with scales and zero points.

Lin et al. 2023, arXiv:2306.00978. How the input channels were scaled stands in no file: it is folded into the layer
before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from llamero.checkpoint import hf
from llamero.checkpoint.codes import Actorder, GroupCodes, groups_of, refuse_unknown_keys, signed
from llamero.core.errors import LlameroError

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output channel, of each eight, whose code is in each nibble of a word, the lowest first."""

_BITS = 4


@dataclass(frozen=True)
class Format:
    """How the quantized layers of a directory are stored."""

    group_size: int
    """Input channels of a group; -1 is all of them."""

    bits: ClassVar[int] = _BITS
    title: ClassVar[str] = "AWQ"
    marker: ClassVar[str] = "qweight"
    """Tensor by which a packed layer is recognised in files."""
    config_file: ClassVar[str] = "quant_config.json"
    """File beside config.json, in the words of the first AWQ files."""

    def specs(self, inputs: int, outputs: int) -> dict[str, hf.Spec]:
        """Return shape and dtype of what `encode` returns, which stands in place of a `weight`."""
        groups = groups_of(inputs, self.group_size)
        return {
            "qweight": hf.Spec((inputs, outputs // 8), torch.int32),
            "qzeros": hf.Spec((groups, outputs // 8), torch.int32),
            "scales": hf.Spec((groups, outputs), torch.float16),
        }

    def encode(self, weight: GroupCodes) -> dict[str, Tensor]:
        """Return the tensors of a linear layer, whose groups must lie side by side."""
        if weight.bits != _BITS or not weight.side_by_side:
            raise ValueError("AWQ stores 4-bit codes in groups of neighbouring channels")
        return {
            "qweight": pack(weight.codes.T),
            "qzeros": pack(weight.zeros.T),
            "scales": weight.scales.T.contiguous(),
        }

    def decode(self, stored: Mapping[str, Tensor]) -> GroupCodes:
        """Return the codes of a linear layer, the inverse of `encode`."""
        codes, scales = unpack(stored["qweight"]).T, stored["scales"].T
        size = -(-codes.shape[1] // scales.shape[1])
        group = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // size
        return GroupCodes(codes, scales, unpack(stored["qzeros"]).T, group, _BITS)

    def step(self, width: int, *, outputs: bool) -> int:
        """Return at multiples of how many channels the tensors can be cut.

        Args:
            width: Channels there are.
            outputs: Whether outputs are to be cut, or inputs.
        """
        return 8 if outputs else 1 if self.group_size == -1 else self.group_size

    def cut(self, stored: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        """Return one of some equal shares of a layer's outputs, or of its inputs."""
        if outputs:
            return {name: tensor.chunk(of, 1)[share] for name, tensor in stored.items()}
        whole = self.group_size == -1
        return {
            name: tensor if whole and name != "qweight" else tensor.chunk(of)[share] for name, tensor in stored.items()
        }

    def damage(self, stored: Mapping[str, Tensor]) -> str:
        """Return what is wrong with the tensors, or nothing."""
        return ""

    def config_beside(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `config_file` says where config.json says `keys`."""
        return {"zero_point": True, "q_group_size": keys["group_size"], "w_bit": keys["bits"], "version": "GEMM"}

    def config(self, *, sym: bool, actorder: Actorder = "none", damp: float | None = None) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json; the format itself always has zero points."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "modules_to_not_convert": None,
        }


def pack(codes: UInt8[Tensor, "rows columns"]) -> Int[Tensor, "rows words"]:
    """Return rows of 4-bit codes, eight neighbours in a word in the order of `_ORDER`."""
    if codes.shape[1] % 8:
        raise ValueError(f"{codes.shape[1]} codes of 4 bits do not fill 32-bit words")
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64, device=codes.device)
    for nibble, column in enumerate(_ORDER):
        words |= codes[:, column::8].long() << (4 * nibble)
    return signed(words)


def unpack(words: Int[Tensor, "rows words"]) -> UInt8[Tensor, "rows columns"]:
    """Return the codes of rows of words, the inverse of `pack`."""
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(_ORDER):
        codes[:, column::8] = ((words >> (4 * nibble)) & 0xF).to(torch.uint8)
    return codes


_READ = {"quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version"}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "do_fuse": (False, None),
    "modules_to_fuse": (None, {}),
    "exllama_config": (None, {}),
}
"""Keys whose other values are for one loader."""
_HARMLESS = {"backend", "fuse_max_seq_len", "format", "checkpoint_format", "method", "lm_head", "desc_act", "sym",
    "damp_percent", "pack_dtype", "meta", "model_file_base_name", "dynamic", "modules_to_not_convert"}  # fmt: skip
"""Which layers are packed is read from the tensors themselves."""


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the layout that an AWQ `quantization_config` describes, or refuse what is not understood."""
    refuse_unknown_keys(keys, known=_READ | _HARMLESS, must_be=_MUST_BE, where=where)
    version = str(keys.get("version", "gemm")).lower()
    if version != "gemm":
        raise LlameroError(f"AWQ layout `{version}` is not read here", where=where, fix="one of: gemm")
    if keys.get("zero_point", True) is not True:
        raise LlameroError("`zero_point` is not true: files without zero points are another layout", where=where)
    bits, group_size = keys.get("bits", keys.get("w_bit")), keys.get("group_size", keys.get("q_group_size"))
    if bits != _BITS:
        raise LlameroError(f"`bits: {bits}` is not an AWQ width", where=where, fix="4")
    if not isinstance(group_size, int) or (group_size != -1 and group_size <= 0):
        raise LlameroError(
            f"`group_size: {group_size}` is not a group size", where=where, fix="a number above 0, or -1"
        )
    return Format(group_size)
