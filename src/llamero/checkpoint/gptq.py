"""GPTQ directories: codes as bit streams along the inputs, with scales, zero points and group numbers beside them.

Layout v1 (AutoGPTQ's) stores each zero point minus one, v2 as it is. Frantar et al. 2022, arXiv:2210.17323.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from llamero.checkpoint import hf
from llamero.checkpoint.codes import Actorder, GroupCodes, groups_of, pack, period, refuse_unknown_keys, signed, unpack
from llamero.core.errors import LlameroError

BITS = (2, 3, 4, 8)
"""Widths of a code that readers of this format know."""

MULTIPLE = 32
"""Readers need input and output channels to be multiples of this."""

_WORD = 0xFFFFFFFF


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
    values, words = period(bits)
    if words > 1:
        return (unpack(qzeros.T, bits).T + 1) & (2**bits - 1)
    ones = int(pack(torch.ones(values, 1, dtype=torch.uint8), bits))
    added = (qzeros.long() & _WORD) + (ones & _WORD)
    return unpack(signed(added & _WORD).T, bits).T


@dataclass(frozen=True)
class Format:
    """How the quantized layers of a directory are stored."""

    bits: int
    group_size: int
    """Input channels of a group; -1 is all of them."""
    zero_offset: int = 1
    """What is subtracted from stored zero points: 1 in layout v1, 0 in v2."""
    desc_act: bool = field(default=False, compare=False)
    """Whether a config says that groups are not side by side, so that no layer may lack its `g_idx`."""

    title: ClassVar[str] = "GPTQ"
    marker: ClassVar[str] = "qweight"
    """Tensor by which a packed layer is recognised in files."""
    config_file: ClassVar[str] = "quantize_config.json"
    """File beside config.json that readers look into too, some of them first."""

    def specs(self, inputs: int, outputs: int) -> dict[str, hf.Spec]:
        """Return shape and dtype of what `encode` returns, which stands in place of a `weight`."""
        groups = groups_of(inputs, self.group_size)
        return {
            "qweight": hf.Spec((inputs * self.bits // 32, outputs), torch.int32),
            "qzeros": hf.Spec((groups, outputs * self.bits // 32), torch.int32),
            "scales": hf.Spec((groups, outputs), torch.float16),
            "g_idx": hf.Spec((inputs,), torch.int32),
        }

    def encode(self, weight: GroupCodes) -> dict[str, Tensor]:
        """Return the tensors of a linear layer; in layout v1 every zero point must be at least 1."""
        if self.zero_offset and bool((weight.zeros == 0).any()):
            raise ValueError("a zero point of 0 cannot be stored minus one")
        return {
            "qweight": pack(weight.codes.T, self.bits),
            "qzeros": pack(weight.zeros - self.zero_offset, self.bits).T.contiguous(),
            "scales": weight.scales.T.contiguous(),
            "g_idx": weight.g_idx.to(torch.int32),
        }

    def decode(self, stored: Mapping[str, Tensor]) -> GroupCodes:
        """Return the codes of a linear layer, the inverse of `encode`."""
        return GroupCodes(
            unpack(stored["qweight"], self.bits).T,
            stored["scales"].T,
            decode_zeros(stored["qzeros"], self.bits, offset=self.zero_offset).T,
            stored["g_idx"],
            self.bits,
        )

    def step(self, width: int, *, outputs: bool) -> int:
        """Return at multiples of how many channels the tensors can be cut.

        Args:
            width: Channels there are.
            outputs: Whether outputs are to be cut, or inputs.
        """
        return period(self.bits)[0]

    def cut(self, stored: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        """Return one of some equal shares of a layer's outputs, or of its inputs."""
        if outputs:
            return {**stored, **{name: stored[name].chunk(of, 1)[share] for name in ("qweight", "qzeros", "scales")}}
        # an input says which group is its own, so all groups stay
        return {**stored, **{name: stored[name].chunk(of)[share] for name in ("qweight", "g_idx")}}

    def damage(self, stored: Mapping[str, Tensor]) -> str:
        """Return what is wrong with the tensors, or nothing."""
        groups, low, high = len(stored["scales"]), int(stored["g_idx"].min()), int(stored["g_idx"].max())
        return f"g_idx names groups {low} to {high}, there are {groups}" if low < 0 or high >= groups else ""

    def config_beside(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `config_file` says where config.json says `keys`: the same."""
        return dict(keys)

    def config(self, *, sym: bool, actorder: Actorder = "none", damp: float | None = None) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json: what loaders ask for and no local path.

        Args:
            sym: All zero points are in the middle.
            actorder: In which order columns were solved; `desc` formed groups in it, and readers need `g_idx`.
            damp: Damping asked for, as a fraction of the mean diagonal; `None` where none was needed.
        """
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            **({} if damp is None else {"damp_percent": damp}),
            "desc_act": actorder == "desc",
            "static_groups": actorder == "static",
            "sym": sym,
            "true_sequential": False,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.zero_offset else "gptq_v2",
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
    "data_type": ("int", None),
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
    "auto_forward_data_parallel", "autoround_version", "provider", "static_attention_granularity",
    "static_kv_granularity",
}  # fmt: skip
"""Keys about how the codes were found, or about other loaders: which layers are packed, in what order and with how
many bits is read from the tensors themselves."""


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the layout that a GPTQ `quantization_config` describes, or refuse what is not understood."""
    refuse_unknown_keys(keys, known=_READ | _HARMLESS, must_be=_MUST_BE, where=where)
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
    return Format(bits, group_size, _OFFSETS[layout], desc_act=bool(keys.get("desc_act", False)))


def with_groups(tensors: hf.Tensors, layout: Format) -> hf.Tensors:
    """Return the tensors with a `g_idx` for every packed layer; files of early 2023 have none.

    Raises:
        LlameroError: If one is missing and the config says that groups are not side by side.
    """
    without = [
        name.removesuffix(layout.marker)
        for name in tensors
        if name.endswith(f".{layout.marker}") and f"{name.removesuffix(layout.marker)}g_idx" not in tensors
    ]
    if not without:
        return tensors
    if layout.desc_act:
        raise LlameroError(
            f"`{without[0]}g_idx` is missing ({len(without)} are), and `desc_act` says that groups lie in its order",
            where=tensors.directory,
            fix="download it again; if groups are side by side, say `desc_act: false`",
        )
    made: dict[str, Tensor] = {}
    for prefix in without:
        inputs = tensors.specs[f"{prefix}{layout.marker}"].shape[0] * 32 // layout.bits
        size = inputs if layout.group_size == -1 else layout.group_size
        made[f"{prefix}g_idx"] = (torch.arange(inputs) // size).to(torch.int32)

    def read(_: Path, name: str) -> Tensor:
        return made[name] if name in made else tensors[name]

    files = tensors.files | {name: tensors.files[name.removesuffix("g_idx") + layout.marker] for name in made}
    specs = tensors.specs | {name: hf.Spec(tuple(value.shape), value.dtype) for name, value in made.items()}
    return replace(tensors, files=files, specs=specs, _read=read, _read_part=None)
