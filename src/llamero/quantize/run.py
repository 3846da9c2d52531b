"""Quantized variants of a model, all of them from one walk through it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llamero.checkpoint import hf, loaders, packed
from llamero.checkpoint.gguf_names import to_gguf
from llamero.checkpoint.imatrix import Imatrix, write_imatrix
from llamero.core import artifact
from llamero.core import world as environment
from llamero.core.artifact import Identity
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Block, Llama
from llamero.model.load import DTYPES, EMBEDDING, HEAD, empty_model, load_config, stored_names
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World
from llamero.quantize import calibrate, importance, kept, sensitivity, streams
from llamero.quantize.calibrate import Layer
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.gguf import GgufVariantWriter
from llamero.quantize.methods import DAMPED, METHODS, TOGETHER
from llamero.quantize.problem import LayerProblems, Solution, pose
from llamero.quantize.progress import END, REST, Commit, Progress, decided
from llamero.quantize.sensitivity import Sensitivity
from llamero.quantize.statistics import INPUTS, Channels
from llamero.quantize.streams import Stream
from llamero.quantize.tasks import WHOLE, Task, tasks
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

    def __init__(self, variant: Variant, writer: Writer, progress: Progress) -> None:
        self.variant, self.writer, self._progress = variant, writer, progress
        self._parts = (WHOLE,) if variant.method in TOGETHER else tuple(INPUTS)

    def first(self, layers: int) -> int:
        """Return the first decoder layer of which something is missing, or how many there are."""
        return next((number for number in range(layers) if not self.finished(number)), layers)

    def finished(self, layer: int) -> bool:
        """Return whether nothing of a decoder layer is missing."""
        return all(self.done(layer, part) for part in (*self._parts, REST))

    def lacks(self, layer: int, part: str) -> bool:
        """Return whether a part of a decoder layer, in the way in which the method parts it, is not on disk."""
        return part in self._parts and not self.done(layer, part)

    def done(self, layer: int | None, part: str) -> bool:
        """Return whether a part of a decoder layer is on disk, or something outside of them."""
        return self._progress.done(self.variant.name, layer, part)

    def commit(
        self,
        layer: int | None,
        part: str,
        *,
        modules: Sequence[ModuleReport] = (),
        importance: Mapping[str, Tensor] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Force to disk what was written, and note it: from then on it is never done again."""
        name, began = self.variant.name, time.perf_counter()
        tensors = self.writer.sync()
        if importance:
            self._progress.put(_importance(name, layer, part), {k: v.float() for k, v in importance.items()})
        seconds += time.perf_counter() - began
        told = [asdict(module) for module in modules]
        self._progress.commit(name, Commit(layer, part, tensors, told, seconds))

    @property
    def modules(self) -> tuple[ModuleReport, ...]:
        """Return the reports of all linear layers, in the order of the model."""
        leaves = [name for names in INPUTS.values() for name in names]
        commits = (each for each in self._progress.commits(self.variant.name) if each.layer is not None)
        found = [(each.layer, ModuleReport(**module)) for each in commits for module in each.modules]
        places = {name: place for place, name in enumerate(leaves)}
        found.sort(key=lambda each: (each[0], places[each[1].name.split(".", 3)[3]]))
        return tuple(module for _, module in found)

    @property
    def importance(self) -> dict[str, Tensor]:
        """Return the importance of input channels, by the names of GGUF tensors; only of GGUF variants."""
        places = {part: place for place, part in enumerate([*INPUTS, WHOLE, REST])}
        commits = self._progress.commits(self.variant.name)
        commits.sort(key=lambda each: (each.layer is None, each.layer or 0, places.get(each.part, 0), each.part))
        found: dict[str, Tensor] = {}
        for each in commits:
            found |= self._progress.get(_importance(self.variant.name, each.layer, each.part))
        return found

    @property
    def seconds(self) -> float:
        """Return the seconds that were spent on it, in all processes."""
        return sum(each.seconds for each in self._progress.commits(self.variant.name))


def _importance(variant: str, layer: int | None, part: str) -> str:
    return f"importance-{variant}-{part if layer is None else f'{layer}.{part}'}"


LONGEST = 6 * 3600
"""Seconds that a process may keep the others waiting: longer than what it solves of one decoder layer."""


def processes(*, device: str = "cpu", timeout: int = ParallelConfig().timeout) -> World:
    """Return the processes that were started, however many there are, as `run` takes them.

    Args:
        device: As of `ParallelConfig`.
        timeout: Seconds after which a process that is not heard of is missed, by name.
    """
    parallel = ParallelConfig(gpus=environment.size(), device=device, timeout=timeout)
    return World(parallel, longest=max(LONGEST, timeout))


def run(
    config: QuantizeConfig,
    *,
    model: Path,
    out: Callable[[Variant], Path],
    tokens: Sequence[Int[Tensor, " time"]],
    world: World | None = None,
    shard_bytes: int | None = None,
    keep_in: Path | None = None,
    progress: Path | None = None,
) -> list[VariantReport]:
    """Write every variant of a model and return what became of each.

    One decoder layer is in memory at a time. The same model, config and tokens give the same bytes, on however many
    processes. These share the text, the solving and the writing; all of them call this with the same arguments, and
    see the same directories.

    Args:
        config: Variants and how to find them.
        model: Directory of the unquantized model.
        out: Says in which directory a variant goes.
        tokens: Calibration text as sequences of token ids.
        world: The processes that share the work; without it this one is alone, on the CPU.
        shard_bytes: Largest file of weights; each layout has a custom of its own.
        keep_in: Directory where `calibration.keep` keeps statistics, and finds those of earlier runs.
        progress: Directory that remembers what is finished, so that the same call goes on after a kill. It stays,
            for whoever gives the variants their final places; see `progress.forget`.
    """
    world = calibrate.alone() if world is None else world
    with world.together():
        asked = _ask(config, model, tokens, world, keep_in)
        _check_places(model, [out(variant) for variant in asked.variants])
    with world.missing_named(), ExitStack() as stack:
        decides = decided(config, model=model, tokens=tokens, device=world.device, shard_bytes=shard_bytes)
        with world.together():
            place = _place(stack, out(asked.variants[0]).parent) if progress is None and world.speaks else progress
        place = world.told(place)
        assert place is not None

        def begin(place: Path = place) -> tuple[Progress, list[_Work]]:
            so_far = stack.enter_context(closing(Progress(place, decides, rank=world.rank)))
            return so_far, _begin(stack, asked, out, so_far, shard_bytes=shard_bytes)

        so_far, works = world.in_turn(begin)
        reused = _make(stack, asked, works, so_far)
        _hear(works, so_far, world)
        reports: list[VariantReport] = []
        with world.together():
            if world.speaks:
                so_far.lighten()
                reports = [_finish(work, tokens, damp=config.damp, compute=asked.compute) for work in works]
        return world.told([replace(report, reused=reused) for report in reports])


def _place(stack: ExitStack, beside: Path) -> Path:
    """Return a directory that lasts as long as the run."""
    beside.mkdir(parents=True, exist_ok=True)
    return Path(stack.enter_context(TemporaryDirectory(prefix="quantize-", suffix=END, dir=beside)))


def refuse_quantized(model: Path) -> None:
    """Refuse a model that is quantized already."""
    if packed.read_format(model) is not None:
        raise LlameroError("the model is quantized already", where=model, fix="give the model it was made from")


@dataclass(frozen=True)
class _Asked:
    """What is made, of what, and who makes it."""

    config: QuantizeConfig
    variants: Sequence[Variant]
    model: Path
    shape: LlamaConfig
    meta: Llama
    """The unquantized model, on the meta device."""
    tensors: hf.Tensors
    """Its tensors."""
    tokens: Sequence[Tensor]
    world: World
    compute: torch.dtype
    imatrix: Mapping[str, Tensor]
    keep_in: Path | None

    @property
    def outside(self) -> dict[str, str]:
        """Return the names of the tensors that are in no decoder layer: in the model, and in its files."""
        stored = stored_names(self.meta, self.tensors)
        return {name: stored[name] for name in stored if not name.startswith("model.layers.")}


def _ask(config: QuantizeConfig, model: Path, tokens: Sequence[Tensor], world: World, keep_in: Path | None) -> _Asked:
    """Refuse what cannot be made, before any work."""
    refuse_quantized(model)
    shape = load_config(model)
    meta, variants = empty_model(shape), config.parsed()
    refuse_misfits(variants, widths(meta), where=str(model))
    calibrate.check_tokens(tokens, shape)
    imatrix = {} if config.imatrix is None else importance.read_for(config.imatrix, shape)
    compute, tensors = DTYPES[config.calibration.arithmetic], hf.open_tensors(model)
    return _Asked(config, variants, model, shape, meta, tensors, tokens, world, compute, imatrix, keep_in)


def _begin(
    stack: ExitStack,
    asked: _Asked,
    out: Callable[[Variant], Path],
    progress: Progress,
    *,
    shard_bytes: int | None,
) -> list[_Work]:
    """Begin the files of every variant, or go on with them."""
    how = {"source": asked.model, "dtype": DTYPES[asked.config.dtype], "shard_bytes": shard_bytes}
    works = []
    for variant in asked.variants:
        writer = _writer(variant, out(variant), asked.meta, progress, **how)
        stack.callback(writer.abandon)
        works.append(_Work(variant, writer, progress))
    return works


def _hear(works: Sequence[_Work], progress: Progress, world: World) -> None:
    """Hear what the other processes have written."""
    written = progress.exchange(world)
    for work in works:
        work.writer.note(written.get(work.variant.name, ()))


def _make(stack: ExitStack, asked: _Asked, works: Sequence[_Work], progress: Progress) -> bool:
    """Write what is missing, and return whether statistics were those of an earlier run."""
    world, layers, outside = asked.world, asked.shape.num_layers, asked.outside
    if all(work.first(layers) == layers and all(work.done(None, name) for name in outside) for work in works):
        return False
    mine = works[world.rank :: world.size]
    with world.together():
        _copy(mine, {EMBEDDING: outside.pop(EMBEDDING)}, asked.tensors)
    heads, reused = _walk(stack, asked, works, progress)
    with world.together():
        for followers, head in heads:
            heeded = importance.of_head(asked.imatrix, head)
            some = [work for work in followers if work in mine]
            _copy(some, outside, asked.tensors, {} if heeded is None else {HEAD: heeded})
    return reused


def _walk(
    stack: ExitStack, asked: _Asked, works: Sequence[_Work], progress: Progress
) -> tuple[list[tuple[list[_Work], Channels]], bool]:
    """Go through the model and solve what is missing.

    Returns:
        The variants of each stream with what flows into its head; and whether that was known before.
    """
    config, shape, keep_in = asked.config, asked.shape, asked.keep_in
    planned = {each.name: each for each in streams.plan(config, [work.variant for work in works], widths(asked.meta))}
    firsts = {work.variant: work.first(shape.num_layers) for work in works}
    needed = {
        name: min((firsts[variant] for variant in stream.variants), default=shape.num_layers)
        for name, stream in planned.items()
    }
    felt = None
    if min(needed.values()) < shape.num_layers:
        felt = _sensitivity(asked, planned.values(), progress)
    with asked.world.together():
        walk = calibrate.Walk(
            asked.model,
            shape,
            asked.tokens,
            dtype=asked.compute,
            world=asked.world,
            streams=tuple(planned),
            waiting=progress.waiting(needed),
        )
    layers: Iterable[Layer] = walk
    reused = False
    if config.calibration.keep and keep_in is not None:
        who = _statistics(asked, keep_in)
        reused = artifact.find(keep_in, who) is not None
        found = kept.layers(walk, asked.model, shape, who, root=keep_in, first=min(needed.values()))
        layers = stack.enter_context(closing(found))
    followers = {name: [work for work in works if work.variant in stream.variants] for name, stream in planned.items()}
    for layer in layers:
        _solve_layer(layer, asked, followers[layer.stream], planned[layer.stream], felt)
        _hear(works, progress, asked.world)
        if asked.world.speaks:
            _add_rest(layer, followers[layer.stream])
        del layer  # before the next one is read, not after
    return [(followers[name], walk.heads[name]) for name in planned], reused


def _writer(variant: Variant, directory: Path, meta: Llama, progress: Progress, **how: Any) -> Writer:
    """Return what writes a variant, and goes on with what an earlier run, or the first process, has written of it."""
    gone = progress.first and not directory.exists()
    written = None if gone else progress.written(variant.name)
    writer = WRITERS[variant.layout](directory, meta, variant, written=written, **how)
    if written is None:
        progress.begin(variant.name)
    return writer


def _check_places(model: Path, places: list[Path]) -> None:
    resolved = [place.resolve() for place in places]
    for place in resolved:
        if place == model.resolve() or resolved.count(place) > 1:
            raise LlameroError("a variant needs a directory of its own", where=place)


def _copy(
    works: Sequence[_Work],
    names: Mapping[str, str],
    tensors: hf.Tensors,
    importances: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors that are not quantized to every variant, with the importances of input channels that are known."""
    importances = importances or {}
    for name, source in names.items():
        missing = [work for work in works if not work.done(None, name)]
        if not missing:
            continue
        tensor = tensors[source]
        for work in missing:
            work.writer.add(name, tensor, importance=importances.get(name))
            heeded = name in importances and work.variant.layout == "gguf"
            work.commit(None, name, importance={str(to_gguf(name)): importances[name]} if heeded else None)


def _statistics(asked: _Asked, root: Path) -> Identity:
    """Return what decides the statistics; the first process reads the model's files for it."""
    who: Identity | None = None
    with asked.world.together():
        if asked.world.speaks:
            who = kept.identity(asked.model, asked.tokens, dtype=asked.compute, root=root)
    who = asked.world.told(who)
    assert who is not None
    return who


def _sensitivity(asked: _Asked, planned: Iterable[Stream], progress: Progress) -> Sensitivity | None:
    """Measure how the loss feels outputs, if that is asked for; it is kept as long as the progress at least."""
    config, tokens, model, root = asked.config, asked.tokens, asked.model, progress.path
    if not streams.ask_what_is_felt(config, planned):
        return None
    some = sensitivity.some(tokens, config.sensitivity)

    def make(felt: Sensitivity) -> None:
        sensitivity.measure(model, asked.shape, some, into=felt, dtype=asked.compute, world=asked.world)

    if config.calibration.keep and asked.keep_in is not None:
        statistics, root = _statistics(asked, asked.keep_in), asked.keep_in
    else:
        statistics = Identity("calibration", "calibration", {}, {})  # all that decides it decides the progress too
    return sensitivity.kept(root, sensitivity.identity(statistics, some), make, asked.world)


@torch.no_grad()
def _solve_layer(layer: Layer, asked: _Asked, works: Sequence[_Work], stream: Stream, felt: Sensitivity | None) -> None:
    """Quantize a decoder layer once for every variant of a stream, write it, and say how the stream flows on.

    What is on disk already is left out; the variant that a stream follows is solved all the same.
    """
    if stream.leader is None and all(work.finished(layer.number) for work in works):
        return
    config, world = asked.config, asked.world
    moments = None if felt is None else partial(felt.of, layer.number)
    mine: dict[str, Callable[[], Tensor]] = {}
    with world.together():
        how = {"damp": config.damp, "refine": config.refine, "imatrix": asked.imatrix, "felt": moments}
        problems = pose(layer, asked.shape, **how)
        found = tasks(problems, _wanted(layer.number, works, stream.leader), processes=world.size)
        for number in world.claims(len(found)):
            _solve(found[number], problems, layer, works, stream.leader, mine)
    layer.weights.update(_gathered(mine, layer.block, world))


def _wanted(layer: int, works: Sequence[_Work], leader: Variant | None) -> dict[str, list[Variant]]:
    """Return which variants lack a part of a layer, by parts; what a stream flows through always counts."""
    found: dict[str, list[Variant]] = {}
    for part in (*INPUTS, WHOLE):
        lacking = [work.variant for work in works if work.lacks(layer, part)]
        found[part] = [variant for variant in dict.fromkeys([*lacking, leader]) if variant is not None]
    return found


def _solve(
    task: Task,
    problems: LayerProblems,
    layer: Layer,
    works: Sequence[_Work],
    leader: Variant | None,
    flowing: dict[str, Callable[[], Tensor]],
) -> None:
    """Solve a task and write what is missing of it; what the stream flows on through goes into `flowing`."""
    some = task.of(problems)
    missing = {work.variant: work for work in works if work.lacks(layer.number, task.part)}
    solutions = METHODS[task.method](some, task.variants)
    for variant in task.variants:
        began = time.perf_counter()
        solution = next(solutions)
        seconds = time.perf_counter() - began if solution.seconds is None else solution.seconds
        if variant == leader:
            flowing.update(solution.weights())
        if variant in missing:
            _take(missing[variant], layer, task.part, solution, tuple(_reports(some, solution)), seconds)
        del solution


def _gathered(mine: Mapping[str, Callable[[], Tensor]], block: Block, world: World) -> dict[str, Callable[[], Tensor]]:
    """Return what makes the weights that any process has; all processes make all of them, in this order."""
    sources = {name: rank for rank, names in enumerate(world.gather(list(mine))) for name in names}

    def make(name: str) -> Tensor:
        if sources[name] == world.rank:
            value = mine[name]().float().contiguous()
        else:
            value = torch.empty(block.get_parameter(name).shape, device=world.device)
        world.send(value, source=sources[name])
        return value

    return {name: partial(make, name) for name, _ in block.named_parameters() if name in sources}


def _add_rest(layer: Layer, works: Sequence[_Work]) -> None:
    """Write what of a decoder layer is not quantized."""
    for work in works:
        if not work.done(layer.number, REST):
            work.writer.add_rest(layer.number, layer.block)
            work.commit(layer.number, REST)


def _take(
    work: _Work, layer: Layer, part: str, solution: Solution, modules: Sequence[ModuleReport], seconds: float
) -> None:
    """Write a part of a decoder layer."""
    began = time.perf_counter()
    work.writer.add_layer(layer.number, layer.block, solution)
    seconds += time.perf_counter() - began
    work.commit(layer.number, part, modules=modules, importance=solution.importance, seconds=seconds)


def _reports(problems: LayerProblems, solution: Solution) -> Iterator[ModuleReport]:
    for problem in problems.inputs.values():
        for name, outputs in zip(problem.names, problem.outputs, strict=True):
            fit, weights = solution.fits[name], outputs * problem.inputs
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
    heeded = work.importance
    if heeded:
        found = Imatrix(heeded, len(tokens), max(len(ids) for ids in tokens))
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
        modules=work.modules,
        notes=work.writer.notes,
        seconds=work.seconds + time.perf_counter() - started,
    )
