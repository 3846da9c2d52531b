"""Adapter directories in PEFT's layout: adapter_config.json, and adapter_model.safetensors with the update's factors.

A tensor is named as in the model, after `base_model.model.`; a layer's factors are `lora_A.weight` (rank, in) and
`lora_B.weight` (out, rank), and stand for alpha / rank · B·A beside its weight. Modules that were trained whole are
stored under their own names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llamero.checkpoint import hf
from llamero.core import files
from llamero.core.errors import LlameroError

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""Stands before the name of every tensor."""
FACTORS = ("lora_A.weight", "lora_B.weight")

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order of hf.CONTAINERS


@dataclass(frozen=True)
class Adapter:
    """What an adapter_config.json says."""

    base: str
    """Directory or hub name of the model that the adapter belongs to; empty if it does not say."""
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    """Ends of the names of the layers that have an update, or a pattern that a whole name must match."""
    rslora: bool = False
    """Whether alpha is divided by the root of the rank."""
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    """Ends of the names of the modules that were trained whole."""
    gaussian: bool = False
    """Whether the first factor began as normal numbers; it began uniform otherwise."""
    tied: bool = False
    """Whether embedding and head, tied in the base, stayed so."""
    exclude: str | tuple[str, ...] = ()
    """Layers without an update among those of `targets`, said in the same way."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that have one; all by default."""
    revision: str | None = None
    """Of the base on the hub."""

    @property
    def scale(self) -> float:
        """Return the factor of the update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def covers(self, name: str) -> bool:
        """Return whether the linear layer of this name has an update."""
        if self.layers is not None:
            number = re.search(r"\blayers\.(\d+)\.", name)
            if number is None or int(number[1]) not in self.layers:
                return False
        return matches(name, self.targets) and not matches(name, self.exclude)


def matches(name: str, said: str | tuple[str, ...]) -> bool:
    """Return whether a module's name ends in one of some names, or matches a pattern as a whole."""
    if isinstance(said, str):
        return re.fullmatch(said, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in said)


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter rather than a model."""
    return (directory / CONFIG).exists()


_INITS = {True: False, "gaussian": True, False: False, "orthogonal": False, "eva": False}
"""Ways to begin that leave the base as it is, and whether they are `gaussian`."""

_READ = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "modules_to_save", "init_lora_weights", "ensure_weight_tying",
    "revision",
}  # fmt: skip

_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Keys that do not change what a finished adapter computes."""


def read(directory: Path) -> Adapter:
    """Return the description of an adapter, or refuse the key that is not understood: it could change the result."""
    where, keys = directory / CONFIG, hf.read_json(directory / CONFIG)
    if keys.get("peft_type") != "LORA":
        raise LlameroError(f"`peft_type: {keys.get('peft_type')}` is not read here, only LORA", where=where)
    for key, value in keys.items():
        if key == "bias" and value == "none":
            continue
        if key not in _READ | _HARMLESS and value not in (None, False, {}, []):
            raise LlameroError(f"`{key}: {value}` is not understood; it may change the result", where=where)
    init = keys.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise LlameroError(
            f"`init_lora_weights: {init}` changes the base's weights",
            where=where,
            fix="let PEFT convert the adapter: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    rank, alpha = keys.get("r"), keys.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise LlameroError(f"`r: {rank}` and `lora_alpha: {alpha}` are not a rank and a number", where=where)
    layers = keys.get("layers_to_transform")
    return Adapter(
        base=keys.get("base_model_name_or_path") or "",
        rank=rank,
        alpha=alpha,
        targets=_names(keys.get("target_modules")),
        rslora=bool(keys.get("use_rslora")),
        dropout=keys.get("lora_dropout") or 0.0,
        modules_to_save=tuple(keys.get("modules_to_save") or ()),
        gaussian=_INITS[init],
        tied=bool(keys.get("ensure_weight_tying")),
        exclude=_names(keys.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        revision=keys.get("revision"),
    )


def _names(said: str | list[str] | None) -> str | tuple[str, ...]:
    return said if isinstance(said, str) else tuple(sorted(said or ()))


def open_tensors(directory: Path) -> hf.Tensors:
    """Return the tensors of an adapter, under the names that they have in its files."""
    for name, container in zip(_WEIGHTS, hf.CONTAINERS, strict=True):
        if (directory / name).exists():
            return container.open(directory, None, [directory / name])
    raise LlameroError(f"no weights: no {' and no '.join(_WEIGHTS)}", where=directory)


def write(directory: Path, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter so that PEFT loads it; its config is written last.

    Args:
        directory: Made if need be.
        adapter: Its description.
        tensors: By their names in the model.
    """
    specs = {name: hf.Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    stream(directory, adapter, specs, tensors.items())


def stream(
    directory: Path, adapter: Adapter, specs: Mapping[str, hf.Spec], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write an adapter whose tensors come one at a time.

    Args:
        directory: Made if need be.
        adapter: Its description.
        specs: Of all tensors, by their names in the model.
        tensors: In the same order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = ((PREFIX + name, value) for name, value in tensors)
    # one file, however large: PEFT does not look for shards
    named = {PREFIX + name: spec for name, spec in specs.items()}
    hf.write_tensors(directory, named, stored, stem="adapter_model", shard_bytes=1 << 62)
    files.write_json(directory / CONFIG, _config(adapter))


def _config(adapter: Adapter) -> dict[str, Any]:
    targets = adapter.targets
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if adapter.gaussian else True,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(adapter.modules_to_save) or None,
        **({"ensure_weight_tying": True} if adapter.tied else {}),
    }
