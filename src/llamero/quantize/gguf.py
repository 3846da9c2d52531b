"""A GGUF file in the making: layers come as they are solved, everything else is rounded here."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from llamero.checkpoint.gguf_names import ROPE_FREQUENCIES, rows_to_gguf, to_gguf
from llamero.checkpoint.gguf_write import GgufWriter
from llamero.core.errors import LlameroError
from llamero.model.kquants import BlockCodes, round_to
from llamero.model.llama import Block, Llama
from llamero.model.load import load_config
from llamero.model.rope import Llama3
from llamero.quantize import gguf_mix, gguf_sizes
from llamero.quantize.gguf_metadata import metadata
from llamero.quantize.problem import AT_ONCE, Solution
from llamero.quantize.variants import Variant
from llamero.quantize.write import carry_over, quantized_layers

SHARD_BYTES = 45_000_000_000
"""Largest file; the hub takes 50 GB."""


class GgufVariantWriter:
    """Writes one GGUF variant, with the model's small files beside it.

    Args:
        directory: Where to; made if need be.
        model: The unquantized model, on the meta device.
        variant: What it becomes.
        source: Directory of the unquantized model.
        dtype: Of what is not quantized in other layouts; here the mix decides.
        shard_bytes: Largest file.
        written: As of `VariantWriter`.
    """

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
        config = load_config(source)
        self._head_dim = config.head_dim
        self._specs = gguf_sizes.specs(config, variant.mix)
        described = metadata(source, config, variant.mix)
        self.notes = (*described.notes, *_fallen_back(gguf_mix.choices(config, variant.mix)))
        self.bits_per_weight = self._bits_per_weight(model)
        shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        stem = f"model-{variant.mix}"
        values, specs = described.values, self._specs
        self._file = GgufWriter(directory, stem, values, specs, shard_bytes=shard_bytes, written=written)
        if isinstance(config.rope, Llama3) and ROPE_FREQUENCIES in self._file.missing:
            self._file.add(ROPE_FREQUENCIES, config.rope.divisors())

    def add(self, name: str, tensor: Tensor, *, importance: Tensor | None = None) -> None:
        """Write a tensor of which no solution is known: embedding, head, norms, biases; see `Writer.add`."""
        theirs = _named(name)
        kind = self._specs[theirs].type
        value = tensor.detach().float()
        if not bool(value.isfinite().all()):
            raise LlameroError("values that are not finite", where=name, fix="the weights of the model are broken")
        codes = BlockCodes(value, kind.name) if kind.name == "F32" else _rounded(value, kind.name, name, importance)
        self._write(name, codes)

    def add_layer(self, number: int, block: Block, solution: Solution) -> None:
        """Write what is solved of a decoder layer; arguments as of `VariantWriter.add_layer`."""
        prefix = f"model.layers.{number}."
        for owner, codes in solution.codes.items():
            if not isinstance(codes, BlockCodes):
                raise ValueError(f"{prefix}{owner} was not solved for a GGUF file")
            self._write(f"{prefix}{owner}.weight", codes)
        for name, value in solution.changed.items():
            self.add(prefix + name, value)

    def add_rest(self, number: int, block: Block) -> None:
        """Write what has not come of a decoder layer, unchanged."""
        prefix = f"model.layers.{number}."
        for name, parameter in block.named_parameters():
            if _named(prefix + name) in self._file.missing:
                self.add(prefix + name, parameter)

    def sync(self) -> list[str]:
        """Force to disk what was written since the last time, and return the names of these tensors."""
        return self._file.sync()

    def note(self, names: Iterable[str]) -> None:
        """Wait no longer for what another process has written: tensors that its `sync` named."""
        self._file.note(names)

    def finish(self, *, damp: float | None) -> int:
        """Write what stands beside the weights and return the size of the weights in bytes.

        There is no config.json: a directory that has one is taken for a model of another layout.
        """
        self._file.close()
        carry_over(self._source, self.directory)
        return sum(path.stat().st_size for path in self._file.paths)

    def abandon(self) -> None:
        """Close what is open and leave it unfinished."""
        self._file.abandon()

    def _write(self, name: str, codes: BlockCodes) -> None:
        theirs = _named(name)
        if codes.kind != self._specs[theirs].type.name:
            raise ValueError(f"{theirs} is to be {self._specs[theirs].type.name}, came {codes.kind}")
        self._file.add(theirs, rows_to_gguf(name, codes.data, self._head_dim))

    def _bits_per_weight(self, model: Llama) -> float:
        specs = [self._specs[_named(f"{name}.weight")] for name in quantized_layers(model)]
        return 8 * sum(spec.nbytes for spec in specs) / sum(spec.shape[0] * spec.shape[1] for spec in specs)


def _rounded(value: Tensor, kind: str, name: str, importance: Tensor | None) -> BlockCodes:
    codes, rows = round_to(value, kind, importance=importance), max(1, AT_ONCE // value.shape[-1])
    parts = (codes.rows(start, start + rows) for start in range(0, len(value), rows))
    if not all(bool(part.dequantize().isfinite().all()) for part in parts):
        raise LlameroError(f"its values (up to {value.abs().max():g}) do not fit into {kind}", where=name)
    return codes


def _named(name: str) -> str:
    theirs = to_gguf(name)
    if theirs is None:
        raise ValueError(f"{name} has no name in GGUF")
    return theirs


def _fallen_back(choices: dict[str, gguf_mix.Choice]) -> tuple[str, ...]:
    """Return how many tensors are of another type than the mix says, for each pair of types."""
    counts: dict[tuple[str, str], int] = {}
    for choice in choices.values():
        if choice.type != choice.wanted:
            counts[choice.wanted, choice.type] = counts.get((choice.wanted, choice.type), 0) + 1
    return tuple(
        f"{count} tensors have rows that are no multiple of {gguf_mix.block(wanted)} and became {kind}, not {wanted}"
        for (wanted, kind), count in counts.items()
    )
