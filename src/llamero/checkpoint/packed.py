"""Quantized directories: which way of packing weights a config describes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamero.checkpoint import awq, bitsandbytes, compressed_tensors, gptq, hf
from llamero.core.errors import LlameroError

OnGrids = gptq.Format | awq.Format | compressed_tensors.Format
"""Those whose weights are `codes.GroupCodes`."""

Format = OnGrids | bitsandbytes.Format
"""Union of the descriptions that the parsers below return."""

PARSERS: dict[str, Callable[..., Format]] = {
    "gptq": gptq.parse_format,
    "awq": awq.parse_format,
    "compressed-tensors": compressed_tensors.parse_format,
    "bitsandbytes": bitsandbytes.parse_format,
}
"""Every way of packing that is read, by its `quant_method`. To add one: a file beside `gptq.py` that parses its
config, a line here, its layer and a line in `LAYERS` of model/linear.py."""


_OTHERS = {
    "exl2": " (ExLlamaV2)",
    "exl3": " (ExLlamaV3)",
    "fp8": " (8-bit floating point)",
    "fbgemm_fp8": " (8-bit floating point)",
    "marlin": " (GPTQ laid out for one GPU kernel)",
    "hqq": " (HQQ)",
    "auto-round": " (a container of other layouts)",
    "torchao": " (torchao)",
}


def read_format(directory: Path) -> Format | None:
    """Return how the quantized layers of a directory are packed; `None` if it is not quantized.

    The description stands in config.json, or (GPTQ files of 2023) only in quantize_config.json.
    """
    where, keys = directory / "config.json", hf.read_config(directory).get("quantization_config")
    if keys is None and (directory / "quantize_config.json").exists():
        where = directory / "quantize_config.json"
        keys = {"quant_method": "gptq", **hf.read_json(where)}
    return None if keys is None else parse_format(keys, where=str(where))


def open_tensors(directory: Path, layout: Format | None) -> hf.Tensors:
    """Return the tensors of a directory, with those that older files of its layout leave out."""
    tensors = hf.open_tensors(directory)
    return gptq.with_groups(tensors, layout) if isinstance(layout, gptq.Format) else tensors


def parse_format(keys: Mapping[str, Any], *, where: str) -> Format:
    """Return the packing that a `quantization_config` describes."""
    method = keys.get("quant_method", keys.get("method"))
    if method not in PARSERS:
        raise LlameroError(
            f"the model is quantized with `{method}`{_OTHERS.get(str(method), '')}, which is not read here",
            where=where,
            fix=f"give the model it was made from, or a version of it in: {', '.join(PARSERS)}",
        )
    return PARSERS[method](keys, where=where)
