"""What `llamero quantize` measures of its variants, what it says of them, and which it holds back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from llamero.cli.display import out, say_faults, size
from llamero.core import files
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamero.infer.texts import Text
    from llamero.quantize.config import QuantizeConfig
    from llamero.quantize.gate import Measured, Reading, Verdict
    from llamero.quantize.run import VariantReport
    from llamero.quantize.sequences import Drawn
    from llamero.text.tokenizer import Tokenizer

DEFAULT_TEXTS = ("wikitext-2-raw-v1:test", "slimpajama:validation")
"""Measured on where no text is named, as far as they can be read."""
REPORT = "report.json"
REJECTED = ".rejected"
"""Ends the name of the directory of a variant that is held back."""


def keys(*, measure: bool, texts: Sequence[str], max_kl: float | None, anyway: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a config that options of the command line stand for.

    Args:
        measure: Whether to measure at all.
        texts: Files, or published data sets with their split.
        max_kl: Of the gate; `None` is the default.
        anyway: Variants that are not held back.
    """
    if not measure and (texts or max_kl is not None or anyway):
        raise LlameroError("without a measurement nothing is held back", fix="leave out --no-measure")
    named = {_name(text): text for text in texts}
    if len(named) < len(texts):
        raise LlameroError("two texts of one name cannot be told apart in a table", where="--measure-text")
    found: dict[str, Any] = {"measure": {"texts": named} if measure else None, "publish_anyway": tuple(anyway)}
    return found if max_kl is None else found | {"max_kl": max_kl}


def _name(text: str) -> str:
    """Return what tables call a text; never a path of somebody's machine."""
    return Path(text).name if Path(text).expanduser().exists() else text.replace(":", ", ")


@dataclass(frozen=True)
class Texts:
    """What variants are measured on."""

    texts: Sequence[Text] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Texts that would have been read by default, and why they are not."""


def read_texts(config: QuantizeConfig, tokenizer: Tokenizer, model: Path, drawn: Drawn) -> Texts:
    """Return the texts to measure on, before any work is done.

    Args:
        config: With the texts; where it names none, the default ones that can be read and were not calibrated on.
        tokenizer: Of the model.
        model: Its directory.
        drawn: What is calibrated on.

    Raises:
        LlameroError: A text that was named cannot be read, or was calibrated on.
    """
    from llamero.quantize.measure import refuse_what_was_calibrated_on, texts_to_measure_on

    def read(texts: Mapping[str, str]) -> list[Text]:
        assert config.measure is not None
        measure = config.measure.model_copy(update={"texts": dict(texts)})
        found = texts_to_measure_on(measure, tokenizer, model=model, root=Path(), mixtures={})
        refuse_what_was_calibrated_on(found, drawn.sequences)
        return found

    if config.measure is None:
        return Texts()
    if config.measure.texts:
        return Texts(read(config.measure.texts))
    found: list[Text] = []
    left_out: dict[str, str] = {}
    for said in DEFAULT_TEXTS:
        try:
            found += read({_name(said): said})
        except LlameroError as error:
            left_out[_name(said)] = error.problem
    return Texts(found, left_out)


@dataclass(frozen=True)
class Outcome:
    """What was measured, and what follows from it."""

    original: Measured | None
    """`None` where nothing was measured."""
    measured: Mapping[str, Measured]
    verdicts: Mapping[str, Verdict]


def judged(config: QuantizeConfig, found: Sequence[Measured]) -> Outcome:
    """Return what was measured of every variant, and whether it is held back.

    Args:
        config: With the variants and the gate.
        found: What was measured, of the original first; nothing where it was not.
    """
    from llamero.quantize.gate import judge

    measured = {each.name: each for each in found[1:]}
    verdicts = {
        variant: judge(measured.get(variant), max_kl=config.max_kl, anyway=config.publish_anyway)
        for variant in config.variants
    }
    return Outcome(found[0] if found else None, measured, verdicts)


def write_report(directory: Path, reports: Sequence[VariantReport], drawn: Drawn, outcome: Outcome) -> None:
    """Write what was made, of what, and what was measured of it."""
    variants = [
        {
            **report.to_json(),
            "seconds": report.seconds,
            "measured": _to_json(outcome.measured.get(report.variant.name)),
            "held_back": not outcome.verdicts[report.variant.name].published,
            "wrong": outcome.verdicts[report.variant.name].reason,
        }
        for report in reports
    ]
    original = _to_json(outcome.original)
    files.write_json(directory / REPORT, {"calibration": drawn.to_json(), "original": original, "variants": variants})


def _to_json(measured: Measured | None) -> dict[str, Any] | None:
    return None if measured is None else {**measured.to_json(), "seconds": measured.seconds}


def say(reports: Sequence[VariantReport], texts: Texts, outcome: Outcome) -> None:
    """Show what every variant is, what it lost, and what is held back."""
    table = _table("size", "bits", "error", "seconds")
    for report in reports:
        bits, error = f"{report.bits_per_weight:.2f}", f"{report.error_per_weight:.3e}"
        table.add_row(report.variant.name, size(report.size_bytes), bits, error, f"{report.seconds:.1f}")
    out.print(table)
    out.print("bits: of a weight of the quantized layers, scales included; error: squared, of outputs, per weight")
    models = [] if outcome.original is None else [outcome.original, *outcome.measured.values()]
    for number, text in enumerate(texts.texts):
        table = _table("perplexity", "KL", "top-1 %", title=escape(text.name))
        table.caption = escape(f"{text.protocol}, {len(text.ids):,} tokens")
        for model in models:
            cells = _cells(model.readings[number]) if model.readings else ["–"] * 3
            table.add_row(escape(model.name), *cells, end_section=model is outcome.original)
        out.print(table)
    if models:
        seconds = ", ".join(f"{model.name} {model.seconds:.1f}" for model in models)
        out.print("KL(original ‖ variant), in nats per token; top-1: tokens at which both have the same favourite")
        out.print(f"seconds of measuring: {seconds}", soft_wrap=True, highlight=False, markup=False)
    for name, why in texts.left_out.items():
        out.print(f"not measured on {name}: {why}", highlight=False, soft_wrap=True, markup=False)
    if not models:
        out.print("[bold]not measured[/bold]: how far the variants are from the original is not known", soft_wrap=True)
        out.print("  fix: name texts that are not calibrated on: --measure-text FILE", soft_wrap=True)
    say_faults(outcome.verdicts)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(Column("variant", no_wrap=True), title=title)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(reading: Reading) -> list[str]:
    share = None if reading.top1 is None else 100 * reading.top1
    return [_number(reading.perplexity, ".3f"), _number(reading.kl, ".3g"), _number(share, ".2f")]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
