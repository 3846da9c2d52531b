"""The command that makes quantized variants of a model, or says how large they would be and what loads them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Column, Table

from llamero.checkpoint import loaders
from llamero.cli import measured
from llamero.cli.display import Bars, out, say_left_out, size
from llamero.cli.options import import_uninterrupted
from llamero.core import world as environment
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from llamero.infer.texts import Text
    from llamero.model.config import LlamaConfig
    from llamero.parallel.world import World
    from llamero.quantize.config import QuantizeConfig
    from llamero.quantize.gate import Measured
    from llamero.quantize.run import VariantReport
    from llamero.quantize.sequences import Drawn
    from llamero.quantize.sizes import Size
    from llamero.quantize.variants import Variant

Several = Parameter(consume_multiple=False, negative=())


def quantize(
    model: Annotated[
        str,
        Parameter(
            help="Model directory, or owner/name[:revision] of the hub; for --plan also config.json or a recipe."
        ),
    ],
    out_dir: Annotated[Path | None, Parameter(help="Directory that gets one directory per variant.")] = None,
    *,
    variant: Annotated[tuple[str, ...], Several] = (),
    text: Annotated[tuple[str, ...], Several] = (),
    template: str = "auto",
    sequence: int = 512,
    tokens: int = 65_536,
    imatrix: Path | None = None,
    damp: float = 0.01,
    sensitivity: int = 8192,
    refine: int | None = None,
    sym: bool = True,
    dtype: Literal["float16", "bfloat16"] = "float16",
    measure: bool = True,
    measure_text: Annotated[tuple[str, ...], Several] = (),
    max_kl: float | None = None,
    publish_anyway: Annotated[tuple[str, ...], Several] = (),
    compute: Literal["auto", "float32", "bfloat16"] = "auto",
    propagation: Literal["shared", "reference", "per-bits", "exact"] = "shared",
    keep: Annotated[bool, Parameter(negative=())] = False,
    device: Literal["cpu", "cuda", "auto"] = "cpu",
    plan: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Quantize a model to any number of variants, from one look at a calibration text.

    Under torchrun all processes share the work, and the bytes are those of one process.

    Parameters
    ----------
    variant
        gptq-4bit-128g-actorder_True, awq-4bit-128g and so on; may be given several times. Without it, the table that
        quantizers publish, and beside each variant that vLLM refuses one that it takes.
    text
        What to calibrate on: a file or directory of text or conversations (.txt, .jsonl, .json, .parquet, also packed),
        or a published data set with its split, such as wikitext-2-v1:test; may be given several times. Without it,
        the training text of WikiText-2, from the hub.
    template
        Chat template of conversations; the model's own by default.
    sequence
        Tokens of a calibration sequence.
    tokens
        Calibration tokens in all.
    imatrix
        File of llama.cpp's importances, for GGUF variants instead of what the calibration text says.
    damp
        Dampening, as a fraction of the mean of the Hessian's diagonal.
    sensitivity
        Calibration tokens on which it is measured how the loss feels the outputs of each layer; 0 is plain GPTQ.
    refine
        Sweeps that fit GPTQ's codes and scales to each other once more, only with --sensitivity 0.
    sym
        Symmetric grids.
    dtype
        Of what is not quantized: embeddings, norms, head.
    measure
        Measure every variant beside the original, and hold back what is too far from it.
    measure_text
        What to measure on, as for --text, but not calibrated on; may be given several times. Without it, the test text
        of WikiText-2 and the validation text of SlimPajama, from the hub.
    max_kl
        Largest KL(original ‖ variant) on any text, in nats per token, of a variant that is not held back; 0.5 by
        default. The directory of one that is ends in `.rejected`, and so does the command with 1.
    publish_anyway
        Variant that is not held back whatever was measured; may be given several times.
    compute
        Dtype in which the text goes through the model; bfloat16 where the processor multiplies it faster.
    propagation
        Which activations layers are looked at with: those of the unquantized model, of one variant, of one for each
        width, or each variant's own.
    keep
        Keep in OUT what was found on the text; with --keep other variants then need no new pass.
    device
        Where to compute; with cuda, or auto where there is CUDA, each process takes the device of its local rank.
    plan
        Only say how large each variant would be and which programs load it; needs no weights and no text.
    json
        With --plan: print it as JSON.
    """
    keys: dict[str, Any] = {"damp": damp, "sensitivity": sensitivity, "refine": refine, "sym": sym, "dtype": dtype}
    if imatrix is not None:
        keys["imatrix"] = str(imatrix)
    if variant:
        keys["variants"] = _known(variant, sym=sym)
    if plan:
        keys["calibration"] = {"sequence": sequence, "tokens": tokens}
        if environment.rank():
            return
        _say_plan(model, keys, as_json=json)
        return
    if out_dir is None or json:
        raise LlameroError(
            "--json is for --plan" if json else "no directory to write to is named",
            fix="llamero quantize MODEL OUT, or llamero quantize MODEL --plan",
        )
    from llamero.quantize.config import source_of

    keys["calibration"] = {
        "sources": [source_of(said, Path()) for said in text],
        "sequence": sequence,
        "tokens": tokens,
        "compute": compute,
        "propagation": propagation,
        "keep": keep,
    }
    keys |= measured.keys(measure=measure, texts=measure_text, max_kl=max_kl, anyway=publish_anyway)
    _make(model, out_dir, keys, template=template, device=device)


def _known(names: Sequence[str], *, sym: bool) -> tuple[str, ...]:
    """Return names of variants, or the nearest to the first that is none."""
    from llamero.quantize.variants import parse

    return tuple(parse(name, sym=sym).name for name in names)


def _config(keys: dict[str, Any]) -> QuantizeConfig:
    from llamero.core.config import parse
    from llamero.quantize.config import QuantizeConfig

    return parse(QuantizeConfig, keys)


# -- making


@dataclass(frozen=True)
class _Job:
    """What is made: the same for all processes that make it."""

    config: QuantizeConfig
    model: Path
    tokens: Sequence[Tensor]
    out: Path
    progress: Path
    texts: Sequence[Text]
    """To measure on."""

    @property
    def partial(self) -> dict[str, Path]:
        """Return where each variant is made, by name."""
        return {name: self.progress / name for name in self.config.variants}


@dataclass(frozen=True)
class _Prepared:
    """A job, and what is said of it."""

    job: _Job
    drawn: Drawn
    texts: measured.Texts
    left: dict[str, str]
    """Default variants that cannot be made, and why."""


def _make(model: str, out_dir: Path, keys: dict[str, Any], *, template: str, device: str) -> None:
    from llamero.core.files import disk_errors_named

    config = _config(keys)
    import_uninterrupted("llamero.quantize.run")
    from llamero.quantize.progress import forget
    from llamero.quantize.run import processes

    world = processes(device=device)
    if not world.speaks:
        with world.together():
            pass  # the first process prepares
        told: _Job | None = world.told(None)
        assert told is not None
        _carry_out(told, world)
        world.barrier()
        return
    with Bars(), disk_errors_named(out_dir), ExitStack() as stack:
        with world.together():
            prepared = _prepare(stack, config, model, out_dir, template=template, device=world.device)
        job = world.told(prepared.job)
        reports, found = _carry_out(job, world)
        outcome = measured.judged(job.config, found)
        measured.write_report(out_dir, reports, prepared.drawn, outcome)
        (job.progress / PLACING).touch()
        for name, path in job.partial.items():
            path.rename(out_dir / (name if outcome.verdicts[name].published else name + measured.REJECTED))
        forget(job.progress)
        world.barrier()
    _say(prepared, reports, outcome)
    if not all(verdict.published for verdict in outcome.verdicts.values()):
        raise SystemExit(1)


def _prepare(
    stack: ExitStack, config: QuantizeConfig, model: str, out_dir: Path, *, template: str, device: torch.device
) -> _Prepared:
    """Return what is to be done, and refuse what cannot be; hold the place of it."""
    from llamero.core.artifact import alone_in
    from llamero.core.download import resolve_model
    from llamero.model.load import load_config
    from llamero.quantize.choose import choose
    from llamero.quantize.progress import END, decided, place
    from llamero.quantize.run import refuse_quantized
    from llamero.quantize.sequences import draw
    from llamero.text.tokenizer import load_tokenizer

    directory = resolve_model(model)
    refuse_quantized(directory)
    chosen, left = choose(config, load_config(directory), source=directory, where=model)
    config = config.model_copy(update={"variants": tuple(variant.name for variant in chosen)})
    if not any(out_dir.glob(f"*{END}")):
        _refuse_taken(out_dir, config.variants)
    tokenizer = load_tokenizer(directory)
    drawn = draw(config.calibration, tokenizer, root=Path(), template=template)
    texts = measured.read_texts(config, tokenizer, directory, drawn)
    progress = place(out_dir, decided(config, model=directory, tokens=drawn.sequences, device=device))
    _say_unfinished(out_dir, progress)
    _take_back(out_dir, progress, config.variants)
    _refuse_taken(out_dir, config.variants)
    stack.enter_context(alone_in(progress))
    _say_needs(config, directory, drawn)
    return _Prepared(_Job(config, directory, drawn.sequences, out_dir, progress, texts.texts), drawn, texts, left)


def _carry_out(job: _Job, world: World) -> tuple[list[VariantReport], list[Measured]]:
    """Make and measure every variant, with the other processes."""
    from llamero.quantize.measure import measure_together
    from llamero.quantize.run import run

    places = job.partial
    reports = run(
        job.config,
        model=job.model,
        out=lambda variant: places[variant.name],
        tokens=job.tokens,
        world=world,
        keep_in=job.out,
        progress=job.progress,
    )
    original = (job.model.name, job.model)
    return reports, measure_together(job.texts, original=original, variants=places, world=world)


def _say_needs(config: QuantizeConfig, directory: Path, drawn: Drawn) -> None:
    """Say how much memory and disk it takes."""
    from llamero.model.load import load_config
    from llamero.quantize.needs import needs

    about = needs(load_config(directory), [len(ids) for ids in drawn.sequences], config)
    disk = about.file + (about.kept if config.calibration.keep else 0)
    each = " in each process" if environment.size() > 1 else ""
    said = f"about {size(about.memory)} of memory{each}"
    out.print(f"calibration takes {said}" + (f", {size(disk)} of disk beside the variants" if disk else ""))


def _say(prepared: _Prepared, reports: Sequence[VariantReport], outcome: measured.Outcome) -> None:
    """Say what was made, of what, and how near it is to the original."""
    _say_calibration(prepared.drawn)
    passed = "statistics of an earlier run were used" if reports[0].reused else "one pass through the model"
    shared = f", shared by {environment.size()} processes" if environment.size() > 1 else ""
    out.print(f"{passed}{shared}, in {reports[0].compute}")
    measured.say(reports, prepared.texts, outcome)
    _say_escalated(reports)
    for report in reports:
        for note in report.notes:
            out.print(f"note: {report.variant.name}: {note}", highlight=False, markup=False, soft_wrap=True)
    say_left_out(prepared.left)
    out.print(f"written to {prepared.job.out}", soft_wrap=True)


PLACING = "placing"
"""File that tells that variants are being given their final names."""


def _refuse_taken(out_dir: Path, variants: Sequence[str]) -> None:
    places = [out_dir / (name + end) for name in variants for end in ("", measured.REJECTED)]
    taken = [str(path) for path in places if path.exists()]
    if taken:
        raise LlameroError(f"is there already: {', '.join(taken)}", where=out_dir, fix="choose another directory")


def _take_back(out_dir: Path, progress: Path, variants: Sequence[str]) -> None:
    """Undo what a run had done that was cut off while it gave variants their names."""
    if not (progress / PLACING).exists():
        return
    for name in variants:
        for path in (out_dir / name, out_dir / (name + measured.REJECTED)):
            if path.exists() and not (progress / name).exists():
                path.rename(progress / name)
    (progress / PLACING).unlink()


def _say_unfinished(out_dir: Path, progress: Path) -> None:
    """Say what other commands have left unfinished, and whether this one goes on with what it had begun."""
    from llamero.quantize.progress import END

    if progress.exists():
        out.print(f"going on with what {progress} has", soft_wrap=True, highlight=False, markup=False)
    for path in sorted(out_dir.glob(f"*{END}")):
        if path != progress:
            said = f"{path} is what another command has left unfinished; that command goes on with it, or remove it"
            out.print(f"note: {said}", soft_wrap=True, highlight=False, markup=False)


def _say_calibration(drawn: Drawn) -> None:
    """Say what was calibrated on."""
    table = Table("calibrated on", "split", "layout")
    for column in ("samples", "left out", "sequences", "tokens"):
        table.add_column(column, justify="right")
    for part in drawn.sources:
        left_out = sum(part.left_out.values()) + part.empty
        cells = [f"{part.samples:,}", f"{left_out:,}", f"{part.sequences:,} × {drawn.sequence:,}", f"{part.tokens:,}"]
        table.add_row(escape(part.source), escape(part.split), part.layout, *cells)
    out.print(table)


def _say_escalated(reports: Sequence[VariantReport]) -> None:
    for report in reports:
        if report.escalated:
            most = max(module.damp or 0.0 for module in report.escalated)
            said = f"{len(report.escalated)} layers needed more damping than {report.damp:g}, up to {most:g}"
            out.print(f"note: {report.variant.name}: {said}", highlight=False)


# -- planning


def _say_plan(model: str, keys: dict[str, Any], *, as_json: bool) -> None:
    import_uninterrupted("llamero.quantize.sizes")
    from llamero.model.load import DTYPES, empty_model
    from llamero.quantize.choose import choose
    from llamero.quantize.needs import needs
    from llamero.quantize.sizes import size as foretell

    shape, config, known_from, source = _shape(model, keys)
    chosen, left = choose(config, shape, source=source, where=known_from)
    meta, dtype = empty_model(shape), DTYPES[config.dtype]
    sizes = [foretell(meta, variant, dtype=dtype, source=source) for variant in chosen]
    if as_json:
        said = [_to_json(found) for found in sizes]
        out.print_json(dumps({"model": known_from, "variants": said, "left_out": left}))
        return
    table = Table(Column("variant", no_wrap=True), title=f"{known_from} (GB: 10⁹ bytes)")
    for column in ("published", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("loads in")
    for found in sizes:
        published = "–" if found.as_published is None else size(found.as_published)
        table.add_row(found.variant.name, published, size(found.ours), _loads_in(found.variant))
    out.print(table)
    out.print("published: one file, GPTQ's with a bias of zeros for each linear layer; ours have none", soft_wrap=True)
    if any(found.without_tokenizer for found in sizes):
        out.print("GGUF files hold the tokenizer too, which is not counted: it is not at hand", soft_wrap=True)
    text = config.calibration
    chosen_ones = config.model_copy(update={"variants": tuple(variant.name for variant in chosen)})
    about = needs(shape, [text.sequence] * (text.tokens // text.sequence), chosen_ones)
    disk = f"{size(about.file)} of disk while it lasts" if about.file else "no disk"
    out.print(f"all of ours: {size(sum(found.ours for found in sizes))}", highlight=False)
    said = f"about {size(about.memory)} of memory, {disk}; its statistics with --keep {size(about.kept)}"
    out.print(f"calibration on {text.tokens:,} tokens: {said}", highlight=False, soft_wrap=True)
    _say_why([found.variant for found in sizes])
    say_left_out(left)


def _loads_in(variant: Variant) -> str:
    return ", ".join(name for name in loaders.accepting(variant) if name != loaders.OWN)


def _say_why(variants: Sequence[Variant]) -> None:
    """Say why programs refuse variants, and what they need for others."""
    out.print(f"looked at: {loaders.looked_at()}; llamero loads all", highlight=False, soft_wrap=True)
    for said, names in loaders.remarks(variants):
        who = "all of them" if len(names) == len(variants) else ", ".join(names)
        out.print(f"{said}: {who}", highlight=False, soft_wrap=True, markup=False)


def _to_json(found: Size) -> dict[str, Any]:
    verdicts = loaders.verdicts(found.variant)
    return {
        "name": found.variant.name,
        "as_published": found.as_published,
        "ours": found.ours,
        "without_tokenizer": found.without_tokenizer,
        "loaders": {name: {"loads": each.loads, "why": each.why} for name, each in verdicts.items()},
    }


def _shape(model: str, keys: dict[str, Any]) -> tuple[LlamaConfig, QuantizeConfig, str, Path | None]:
    """Return the shape of a model, what it is to become, where the shape is known from, and the tokenizer's directory.

    A model is a directory, a config.json, a recipe (whose `quantize` counts where the command says nothing), or a name.
    """
    from llamero.checkpoint import hf
    from llamero.core.download import resolve_model
    from llamero.model.config import from_hf
    from llamero.model.load import load_config
    from llamero.plan import base
    from llamero.recipe.load import load

    path = Path(model)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        recipe = load(path, ())
        shape, known_from = base.base_config(recipe, path.parent)
        config = recipe.quantize if recipe.quantize and "variants" not in keys else _config(keys)
        return base.trained_config(shape, recipe), config, f"{recipe.name} ({known_from})", None
    if path.suffix == ".json" and path.is_file():
        return from_hf(hf.read_json(path), where=str(path)), _config(keys), model, None
    directory = resolve_model(model, weights=False)
    return load_config(directory), _config(keys), model, directory
