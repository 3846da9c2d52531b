"""Quantized variants of a model, all of them from one walk through it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llamero.checkpoint import hf, loaders, packed
from llamero.checkpoint.gguf_names import to_gguf
from llamero.checkpoint.imatrix import Imatrix, write_imatrix
from llamero.core import artifact
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.load import DTYPES, EMBEDDING, HEAD, empty_model, load_config, stored_names
from llamero.quantize import calibrate, importance, kept, sensitivity, streams
from llamero.quantize.calibrate import Layer
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.gguf import GgufVariantWriter
from llamero.quantize.methods import DAMPED, METHODS
from llamero.quantize.problem import LayerProblems, Solution, pose
from llamero.quantize.sensitivity import Sensitivity
from llamero.quantize.streams import Stream
from llamero.quantize.variants import Layout, Variant, refuse_misfits
from llamero.quantize.write import VariantWriter, Writer, widths

WRITERS: dict[Layout, Callable[..., Writer]] = {
    "gptq": VariantWriter,
    "gptq_v2": VariantWriter,
    "awq": VariantWriter,
    "compressed-tensors": VariantWriter,
    "gguf": GgufVariantWriter,
    "bitsandbytes": VariantWriter,
}
"""What writes each layout; arguments are those of `VariantWriter`."""


@dataclass(frozen=True)
class ModuleReport:
    """How well one linear layer was quantized."""

    name: str
    error_per_weight: float
    """Mean over tokens of the squared error of the outputs, divided by the number of weights."""
    relative_error: float
    """The same error as a share of the squared outputs."""
    damp: float | None
    """Damping that was needed; more than was asked for where that was too little, `None` without GPTQ."""
    dead_channels: int
    """Input channels that were zero on all calibration text; GPTQ sets their weights to zero."""


@dataclass(frozen=True)
class VariantReport:
    """What became of one variant."""

    variant: Variant
    path: Path
    damp: float | None
    """Damping asked for."""
    size_bytes: int
    """Of the files of weights."""
    bits_per_weight: float
    """Of the quantized layers, scales and all included."""
    tokens: int
    """Calibration tokens."""
    sequences: int
    compute: str
    """Dtype in which they went through the model."""
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
    """What was done otherwise than the variant's name says, such as layers in another type."""
    seconds: float = field(compare=False)
    """Solving, packing and writing, without the walk that variants share; differs from run to run."""
    reused: bool = field(default=False, compare=False)
    """Whether the statistics were those of an earlier run."""

    @property
    def error_per_weight(self) -> float:
        """Return the mean over linear layers."""
        return sum(module.error_per_weight for module in self.modules) / len(self.modules)

    def to_json(self) -> dict[str, Any]:
        """Return what the card and the stages after this one need, the same for every run."""
        return {
            "name": self.variant.name,
            "method": self.variant.method,
            "layout": self.variant.layout,
            "bits": self.variant.bits,
            "group_size": self.variant.group_size,
            "actorder": self.variant.actorder,
            "sym": self.variant.sym,
            "loaders": {name: asdict(verdict) for name, verdict in loaders.verdicts(self.variant).items()},
            "damp": self.damp,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "compute": self.compute,
            "error_per_weight": self.error_per_weight,
            "notes": list(self.notes),
            "modules": [asdict(module) for module in self.modules],
        }

    @property
    def escalated(self) -> tuple[ModuleReport, ...]:
        """Return the layers that needed more damping than was asked for."""
        return tuple(m for m in self.modules if m.damp is not None and self.damp is not None and m.damp > self.damp)


class _Work:
    """One variant in progress."""

    def __init__(self, variant: Variant, writer: Writer) -> None:
        self.variant, self.writer = variant, writer
        self.modules: list[ModuleReport] = []
        self.importance: dict[str, Tensor] = {}
        """Of input channels, by the names of GGUF tensors; only of GGUF variants."""
        self.seconds = 0.0


def run(
    config: QuantizeConfig,
    *,
    model: Path,
    out: Callable[[Variant], Path],
    tokens: Sequence[Int[Tensor, " time"]],
    device: str | torch.device = "cpu",
    shard_bytes: int | None = None,
    keep_in: Path | None = None,
) -> list[VariantReport]:
    """Write every variant of a model and return what became of each.

    One decoder layer is in memory at a time. The same model, config and tokens give the same bytes.

    Args:
        config: Variants and how to find them.
        model: Directory of the unquantized model.
        out: Says in which directory a variant goes.
        tokens: Calibration text as sequences of token ids.
        device: Where to compute.
        shard_bytes: Largest file of weights; each layout has a custom of its own.
        keep_in: Directory where `calibration.keep` keeps statistics, and finds those of earlier runs.
    """
    if packed.read_format(model) is not None:
        raise LlameroError("the model is quantized already", where=model, fix="give the model it was made from")
    shape = load_config(model)
    meta, variants = empty_model(shape), config.parsed()
    refuse_misfits(variants, widths(meta), where=str(model))
    calibrate.check_tokens(tokens, shape)
    _check_places(model, [out(variant) for variant in variants])
    imatrix = {} if config.imatrix is None else importance.read_for(config.imatrix, shape)
    dtype, compute = DTYPES[config.dtype], DTYPES[config.calibration.arithmetic]
    tensors = hf.open_tensors(model)
    stored = stored_names(meta, tensors)
    with ExitStack() as stack:
        works = []
        for variant in variants:
            write = WRITERS[variant.layout]
            writer = write(out(variant), meta, variant, source=model, dtype=dtype, shard_bytes=shard_bytes)
            works.append(_Work(variant, writer))
            stack.callback(works[-1].writer.abandon)
        place = works[0].writer.directory.parent
        felt = _sensitivity(stack, config, model=model, tokens=tokens, place=place, keep_in=keep_in, device=device)
        outside = [name for name in stored if not name.startswith("model.layers.")]
        _copy(works, {EMBEDDING: stored[EMBEDDING]}, tensors)
        planned = {stream.name: stream for stream in streams.plan(config, variants, widths(meta))}
        walk = calibrate.Walk(
            model, shape, tokens, dtype=compute, device=device, streams=tuple(planned), spill=out(variants[0])
        )
        layers: Iterable[Layer] = walk
        reused = False
        if config.calibration.keep and keep_in is not None:
            who = kept.identity(model, tokens, dtype=compute, root=keep_in)
            reused = artifact.find(keep_in, who) is not None
            layers = stack.enter_context(closing(kept.layers(walk, model, shape, who, root=keep_in)))
        for layer in layers:
            _solve_layer(layer, shape, works, config, planned[layer.stream], imatrix, felt)
            del layer  # before the next one is read, not after
        ends = {name: stored[name] for name in outside if name != EMBEDDING}
        heeded = importance.of_head(imatrix, walk.head)
        _copy(works, ends, tensors, {} if heeded is None else {HEAD: heeded})
        reports = [_finish(work, tokens, damp=config.damp, compute=compute) for work in works]
        return [replace(report, reused=reused) for report in reports]


def _check_places(model: Path, places: list[Path]) -> None:
    resolved = [place.resolve() for place in places]
    for place in resolved:
        if place == model.resolve() or resolved.count(place) > 1:
            raise LlameroError("a variant needs a directory of its own", where=place)


def _copy(
    works: list[_Work], names: dict[str, str], tensors: hf.Tensors, importances: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors that are not quantized to every variant, with the importances of input channels that are known."""
    importances = importances or {}
    for name, source in names.items():
        tensor = tensors[source]
        for work in works:
            work.writer.add(name, tensor, importance=importances.get(name))
            if name in importances and work.variant.layout == "gguf":
                work.importance[str(to_gguf(name))] = importances[name].float().cpu()


def _sensitivity(
    stack: ExitStack,
    config: QuantizeConfig,
    *,
    model: Path,
    tokens: Sequence[Tensor],
    place: Path,
    keep_in: Path | None,
    device: str | torch.device,
) -> Sensitivity | None:
    """Measure how the loss feels outputs, if GPTQ asks for it; where it is not kept it goes with the stack."""
    if config.sensitivity == 0 or all(variant.method != "gptq" for variant in config.parsed()):
        return None
    some = sensitivity.some(tokens, config.sensitivity)

    def make(felt: Sensitivity) -> None:
        sensitivity.measure(model, load_config(model), some, into=felt, device=device)

    if config.calibration.keep and keep_in is not None:
        statistics = kept.identity(model, tokens, dtype=DTYPES[config.calibration.arithmetic], root=keep_in)
        return sensitivity.kept(keep_in, sensitivity.identity(statistics, some), make)
    felt = stack.enter_context(sensitivity.passing(place))
    make(felt)
    return felt


@torch.no_grad()
def _solve_layer(
    layer: Layer,
    shape: LlamaConfig,
    works: list[_Work],
    config: QuantizeConfig,
    stream: Stream,
    imatrix: Mapping[str, Tensor],
    felt: Sensitivity | None,
) -> None:
    """Quantize a decoder layer once for every variant of a stream, write it, and say how the stream flows on."""
    moments = None if felt is None else felt.of(layer.number)
    problems = pose(layer, shape, damp=config.damp, refine=config.refine, imatrix=imatrix, felt=moments)
    at_work = {work.variant: work for work in works if work.variant in stream.variants}
    asked = [*at_work, stream.leader] if stream.leader not in {None, *at_work} else list(at_work)
    for name, method in METHODS.items():
        mine = [variant for variant in asked if variant is not None and variant.method == name]
        solutions = method(problems, mine)
        for variant in mine:
            started = time.perf_counter()
            solution = next(solutions)
            found = time.perf_counter()
            if variant == stream.leader:
                layer.weights.update(solution.weights())
            if variant in at_work:
                work = at_work[variant]
                work.modules += _reports(problems, solution)
                work.importance |= {name: values.float().cpu() for name, values in solution.importance.items()}
                work.writer.add_layer(layer.number, layer.block, solution)
                work.seconds += found - started if solution.seconds is None else solution.seconds
                work.seconds += time.perf_counter() - found


def _reports(problems: LayerProblems, solution: Solution) -> Iterator[ModuleReport]:
    for problem in problems.inputs.values():
        for name, outputs in zip(problem.names, problem.outputs, strict=True):
            fit, weights = solution.fits[name], outputs * problem.weight.shape[1]
            yield ModuleReport(
                f"model.layers.{problems.number}.{name}",
                error_per_weight=fit.error / problem.statistics.tokens / weights,
                relative_error=fit.error / fit.total if fit.total else 0.0,
                damp=fit.damp,
                dead_channels=fit.dead_channels,
            )


def _finish(work: _Work, tokens: Sequence[Tensor], *, damp: float, compute: torch.dtype) -> VariantReport:
    asked = damp if work.variant.method in DAMPED else None
    started = time.perf_counter()
    size = work.writer.finish(damp=asked)
    if work.importance:
        found = Imatrix(work.importance, len(tokens), max(len(ids) for ids in tokens))
        write_imatrix(work.writer.directory / "imatrix.dat", found)
    return VariantReport(
        variant=work.variant,
        path=work.writer.directory,
        damp=asked,
        size_bytes=size,
        bits_per_weight=work.writer.bits_per_weight,
        tokens=sum(len(ids) for ids in tokens),
        sequences=len(tokens),
        compute=str(compute).removeprefix("torch."),
        modules=tuple(work.modules),
        notes=work.writer.notes,
        seconds=work.seconds + time.perf_counter() - started,
    )
