"""bitsandbytes directories: `int8` (rows scaled to 127, LLM.int8) and `nf4` (blocks of 64, scales quantized too).

Names, shapes and the JSON among the tensors are those that Transformers' `save_pretrained` writes and reads.
Dettmers et al. 2022, arXiv:2208.07339; 2023, arXiv:2305.14314.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from llamero.checkpoint import hf
from llamero.checkpoint.codes import Actorder, refuse_unknown_keys
from llamero.core.errors import LlameroError

BLOCK, NESTED_BLOCK = 64, 256

STATE = "weight.quant_state.bitsandbytes__nf4"
_STATE_BYTES = 192
"""Room for the JSON, filled up with spaces: sizes are known before the numbers in it are."""

Kind = Literal["int8", "nf4"]


@runtime_checkable
class Encoded(Protocol):
    """A weight in one of the two kinds."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, d)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers: `values` and `scale` of int8; of nf4 `packed`, `absmax`, `book` and with quantized scales
        `nested_absmax`, `nested_book` and `offset`.
        """
        ...


@dataclass(frozen=True)
class Format:
    """How the quantized layers of a directory are stored."""

    kind: Kind
    double: bool = True
    """Of nf4: scales are quantized too."""

    title: ClassVar[str] = "bitsandbytes"
    config_file: ClassVar[str] = ""

    @property
    def bits(self) -> int:
        """Return the width of a code."""
        return 8 if self.kind == "int8" else 4

    @property
    def marker(self) -> str:
        """Return the tensor by which a packed layer is recognised in files."""
        return "SCB" if self.kind == "int8" else STATE

    def specs(self, inputs: int, outputs: int) -> dict[str, hf.Spec]:
        """Return shape and dtype of what `encode` returns, which stands in place of a `weight`."""
        if self.kind == "int8":
            return {
                "weight": hf.Spec((outputs, inputs), torch.int8),
                "SCB": hf.Spec((outputs,), torch.float32),
                "weight_format": hf.Spec((), torch.uint8),
            }
        blocks = inputs * outputs // BLOCK
        specs = {
            "weight": hf.Spec((inputs * outputs // 2, 1), torch.uint8),
            "weight.absmax": hf.Spec((blocks,), torch.uint8 if self.double else torch.float32),
            "weight.quant_map": hf.Spec((16,), torch.float32),
        }
        if self.double:
            specs["weight.nested_absmax"] = hf.Spec((-(-blocks // NESTED_BLOCK),), torch.float32)
            specs["weight.nested_quant_map"] = hf.Spec((256,), torch.float32)
        return specs | {STATE: hf.Spec((_STATE_BYTES,), torch.uint8)}

    def encode(self, weight: Encoded) -> dict[str, Tensor]:
        """Return the tensors of a linear layer."""
        found = weight.tensors()
        if self.kind == "int8":
            # 0: rows as they are; other numbers are orders of old GPU kernels
            return {
                "weight": found["values"],
                "SCB": found["scale"],
                "weight_format": torch.zeros((), dtype=torch.uint8),
            }
        stored = {
            "weight": found["packed"][:, None],
            "weight.absmax": found["absmax"],
            "weight.quant_map": found["book"],
        }
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float16", "shape": list(weight.shape)}
        if self.double:
            stored["weight.nested_absmax"] = found["nested_absmax"]
            stored["weight.nested_quant_map"] = found["nested_book"]
            offset = float(found["offset"])
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return stored | {STATE: _pack_state(state)}

    def config(self, *, sym: bool, actorder: Actorder = "none", damp: float | None = None) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json, with the keys that Transformers writes.

        Args:
            sym: Of no meaning here: there are no zero points.
            actorder: Likewise.
            damp: Likewise.
        """
        eight = self.kind == "int8"
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": eight,
            "load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "_load_in_4bit": not eight,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": "fp4" if eight else "nf4",
            "bnb_4bit_use_double_quant": not eight and self.double,
            "bnb_4bit_compute_dtype": "float32" if eight else "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }

    def config_beside(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `config_file` says; there is none."""
        return dict(keys)


def _pack_state(state: Mapping[str, Any]) -> Tensor:
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    if len(text) > _STATE_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, there is room for {_STATE_BYTES}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read_state(stored: Tensor, *, shape: tuple[int, int], double: bool, name: str, where: str) -> float:
    """Return the offset of quantized scales (0 without), from the JSON beside a layer; refuse what is not nf4 as here.

    Args:
        stored: Bytes of the JSON.
        shape: (out, d) that the model has.
        double: Whether the config says that scales are quantized.
        name: Of the layer, for errors.
        where: File, for errors.
    """
    try:
        state = json.loads(bytes(stored.tolist()).decode())
    except ValueError as error:
        raise LlameroError(f"`{name}`: its quantization state is not JSON ({error})", where=where) from error
    expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    if double:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, value in expected.items():
        if state.get(key) != value:
            raise LlameroError(
                f"`{name}`: `{key}: {state.get(key)}` of its quantization state, read here: {value}", where=where
            )
    return float(state["nested_offset"]) if double else 0.0


_MUST_BE: dict[str, tuple[Any, ...]] = {
    "llm_int8_has_fp16_weight": (False, None),
    "bnb_4bit_quant_storage": ("uint8", None),
    "bnb_4bit_blocksize": (BLOCK, None),
}
_READ = {
    "quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
}  # fmt: skip
_HARMLESS = {
    "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_compute_dtype",
}  # fmt: skip
"""About how products are computed, or which layers are packed, which is read from the tensors."""


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the layout that a bitsandbytes `quantization_config` describes, or refuse what is not understood."""
    refuse_unknown_keys(keys, known=_READ | _HARMLESS, must_be=_MUST_BE, where=where)
    eight, four = (bool(keys.get(f"load_in_{n}bit", keys.get(f"_load_in_{n}bit", False))) for n in (8, 4))
    if eight == four:
        raise LlameroError("neither, or both, of `load_in_8bit` and `load_in_4bit` are true", where=where)
    if eight:
        return Format("int8")
    kind = keys.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise LlameroError(f"4-bit codes of bitsandbytes' kind `{kind}` are not read here", where=where, fix="nf4")
    return Format("nf4", double=bool(keys.get("bnb_4bit_use_double_quant", False)))
