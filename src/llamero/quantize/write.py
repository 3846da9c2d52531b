"""A quantized model directory in the making: layers are written as they are solved."""

import logging
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.model.llama import Block, Llama
from llamero.quantize.problem import Solution
from llamero.quantize.variants import Variant

log = logging.getLogger(__name__)

CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
"""Files that belong to the model and do not change when it is quantized."""


class Writer(Protocol):
    """Writes one variant; the decoder layers come in their order, what is outside of them before or after."""

    directory: Path
    bits_per_weight: float
    """Of the linear layers of the decoder layers, scales and all included."""
    notes: tuple[str, ...]
    """What was done otherwise than the variant's name says, for the report."""

    def add(self, name: str, tensor: Tensor, *, importance: Tensor | None = None) -> None:
        """Write a tensor from outside of the decoder layers, by its name in the model.

        Args:
            name: In the model.
            tensor: The tensor.
            importance: Mean square of its input channels, for layouts in which it is quantized.
        """
        ...

    def add_layer(self, number: int, block: Block, solution: Solution) -> None:
        """Write what is solved of a decoder layer."""
        ...

    def add_rest(self, number: int, block: Block) -> None:
        """Write what has not come of a decoder layer, unchanged."""
        ...

    def sync(self) -> list[str]:
        """Force to disk what was written since the last time, and return the names of these tensors in the files."""
        ...

    def note(self, names: Iterable[str]) -> None:
        """Wait no longer for what another process has written: tensors that its `sync` named."""
        ...

    def finish(self, *, damp: float | None) -> int:
        """Write what stands beside the weights, given the damping asked for, and return their size in bytes."""
        ...

    def abandon(self) -> None:
        """Close the files that are open; what is there is recognised as unfinished, and can be gone on with."""
        ...


class VariantWriter:
    """Writes one quantized directory.

    Args:
        directory: Where to; made if need be.
        model: The unquantized model, on the meta device.
        variant: What it becomes.
        source: Directory of the unquantized model.
        dtype: Dtype of what is not quantized.
        shard_bytes: Largest file of weights.
        written: Tensors that `sync` named to an earlier writer of the same variant; `None`: there was none.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        directory: Path,
        model: Llama,
        variant: Variant,
        *,
        source: Path,
        dtype: torch.dtype,
        shard_bytes: int | None = None,
        written: Collection[str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._source = directory, source
        self.bits_per_weight = _bits_per_weight(variant, model)
        shard_bytes = hf.SHARD_BYTES if shard_bytes is None else shard_bytes
        self._variant, self._dtype = variant, dtype
        specs = tensor_specs(model, variant, dtype)
        self._shards = hf.ShardWriter(directory, specs, shard_bytes=shard_bytes, written=written)

    def add(self, name: str, tensor: Tensor, *, importance: Tensor | None = None) -> None:
        """Write a tensor that is not quantized."""
        value = tensor.detach().to(self._dtype)
        if not bool(value.isfinite().all()):
            raise LlameroError(
                f"its values (up to {tensor.abs().max().item():g}) do not fit into {_name(self._dtype)}",
                where=name,
                fix="set `dtype: bfloat16`" if self._dtype == torch.float16 else "the weights of the model are broken",
            )
        self._shards.add(name, value)

    def add_layer(self, number: int, block: Block, solution: Solution) -> None:
        """Write what is solved of a decoder layer.

        Args:
            number: Of the layer.
            block: The layer, unquantized.
            solution: What some of its linear layers, and what goes with them, became.
        """
        prefix = f"model.layers.{number}."
        for owner, solved in solution.codes.items():
            codes: Any = solved  # of the kind that the layout stores
            for leaf, tensor in self._variant.format.encode(codes).items():
                self._shards.add(f"{prefix}{owner}.{leaf}", tensor)
        for name, value in solution.changed.items():
            self.add(prefix + name, value)

    def add_rest(self, number: int, block: Block) -> None:
        """Write what has not come of a decoder layer, unchanged; arguments as of `add_layer`."""
        prefix = f"model.layers.{number}."
        for name, parameter in block.named_parameters():
            if prefix + name in self._shards.missing:
                self.add(prefix + name, parameter)

    def sync(self) -> list[str]:
        """Force to disk what was written since the last time, and return the names of these tensors."""
        return self._shards.sync()

    def note(self, names: Iterable[str]) -> None:
        """Wait no longer for what another process has written: tensors that its `sync` named."""
        self._shards.note(names)

    def finish(self, *, damp: float | None) -> int:
        """Write what stands beside the weights, config.json last, and return the size of the weights in bytes.

        Args:
            damp: Damping asked for, `None` if the method knows none.
        """
        self._shards.close()
        carry_over(self._source, self.directory)
        variant = self._variant
        layout = variant.format
        quantization = layout.config(sym=variant.sym, actorder=variant.actorder, damp=damp)
        config = {
            **without_paths(hf.read_config(self._source)),
            "torch_dtype": _name(self._dtype),
            "quantization_config": quantization,
        }
        config.pop("_name_or_path", None)  # of another model
        if "dtype" in config:
            config["dtype"] = _name(self._dtype)
        written = {layout.config_file: layout.config_beside(quantization)} if layout.config_file else {}
        for name, keys in (written | {"config.json": config}).items():
            files.write_json(self.directory / name, keys)
            (self.directory / name).chmod(0o644)
        return sum(path.stat().st_size for path in self._shards.paths)

    def abandon(self) -> None:
        """Close the files that are open; the directory stays without a config.json."""
        self._shards.abandon()


def tensor_specs(model: Llama, variant: Variant, dtype: torch.dtype) -> dict[str, hf.Spec]:
    """Return name, shape and dtype of every tensor of a quantized model, in order."""
    specs: dict[str, hf.Spec] = {}
    linears = quantized_layers(model)
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        if owner in linears:
            layer = linears[owner]
            inputs, outputs = layer.in_features, layer.out_features
            parts = variant.format.specs(inputs, outputs)
            specs |= {f"{owner}.{leaf}": spec for leaf, spec in parts.items()}
        else:
            specs[name] = hf.Spec(tuple(parameter.shape), dtype)
    return specs


def _bits_per_weight(variant: Variant, meta: Llama) -> float:
    weights = stored = 0
    for layer in quantized_layers(meta).values():
        parts = variant.format.specs(layer.in_features, layer.out_features)
        weights += layer.in_features * layer.out_features
        stored += 8 * sum(spec.nbytes for spec in parts.values())
    return stored / weights


def quantized_layers(model: Llama) -> dict[str, nn.Linear]:
    """Return the linear layers that are quantized: those of the decoder layers, not the head."""
    return {
        f"model.layers.{name}": layer
        for name, layer in model.model.layers.named_modules()
        if isinstance(layer, nn.Linear)
    }


def widths(model: Llama) -> set[tuple[int, int]]:
    """Return input and output channels of the layers that are quantized, each pair once."""
    return {(layer.in_features, layer.out_features) for layer in quantized_layers(model).values()}


def carry_over(source: Path, directory: Path) -> None:
    """Copy tokenizer, generation settings, chat templates and licence, byte for byte.

    Only a `tokenizer_config.json` that names files of its maker's machine is written anew, without them.
    """
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
            (directory / name).chmod(0o644)
    said = directory / "tokenizer_config.json"
    if said.exists() and (keys := hf.read_json(said)) != without_paths(keys):
        files.write_json(said, without_paths(keys))
        said.chmod(0o644)
    known = {*CARRIED, "config.json"}
    weights = (".safetensors", ".bin", ".index.json", ".pth", ".gguf")
    left = sorted(p.name for p in source.iterdir() if p.name not in known and not p.name.endswith(weights))
    if left:
        log.info("not carried over from %s: %s", source, ", ".join(left))


def without_paths(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the keys whose values are paths of its maker's machine."""
    return {key: value for key, value in keys.items() if not (isinstance(value, str) and _PATH.fullmatch(value))}


_PATH = re.compile(r"(~|\.\.?)[/\\]\S+|([A-Za-z]:)?([/\\][^/\\\s]+){2,}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
