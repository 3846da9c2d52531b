"""How far variants are from the model that they were made from: perplexity, KL, the same favourite.

The original is walked through once and its hidden states are kept, so that no logits need be; each variant is walked
through once more. One layer is in memory at a time, then two heads.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.corpus.dataset import Dataset
from llamero.infer import walk
from llamero.infer.context import context_length
from llamero.infer.score import KL_PROTOCOL, Tally
from llamero.infer.texts import Text, first_documents, of_file, of_ids
from llamero.model.layered import Layered
from llamero.model.load import load_config
from llamero.parallel.world import World
from llamero.quantize.config import CalibrationSource, source_of
from llamero.quantize.gate import Measure, Measured, Reading
from llamero.quantize.sequences import token_ids
from llamero.text.tokenizer import Tokenizer

RUN = 32
"""Tokens in a row that do not stand in two texts by chance."""
SHARED = 0.05
"""Share of such runs from which on two texts count as one."""


def texts_to_measure_on(
    config: Measure, tokenizer: Tokenizer, *, model: Path, root: Path, mixtures: Mapping[str, Path]
) -> list[Text]:
    """Return the texts that a config names.

    Args:
        config: Which ones, and how much of them.
        tokenizer: Of the model.
        model: Directory of the model, whose context bounds the window.
        root: Directory that paths start from.
        mixtures: Tokenized mixtures by name.
    """
    window, stride = config.sight(context_length(load_config(model)))
    how = {"window": window, "stride": stride, "tokens": config.tokens}
    found = [_text(name, said, root, tokenizer, how) for name, said in config.texts.items()]
    for name in config.validation:
        documents = Dataset(mixtures[name]).tokens("val")
        found.append(first_documents(f"{name}, validation", (d.tolist() for d in documents), **how))
    for text in found:
        if not text.windows:
            problem, fix = (
                f"{len(text.ids)} tokens, which predict nothing",
                "give a longer text, or a larger `val_split`",
            )
            raise LlameroError(problem, where=f"quantize.measure: {text.name}", fix=fix)
    return found


def _text(name: str, said: str, root: Path, tokenizer: Tokenizer, how: Mapping[str, int]) -> Text:
    """Return a text: plain, or rows whose samples follow each other."""
    path = root / said
    if path.suffix == ".txt" and path.exists():
        return of_file(name, path, tokenizer, **how)
    ids = token_ids(CalibrationSource.model_validate(source_of(said, root)), root, tokenizer)
    text = of_ids(name, ids, tokenizer, **how)
    return replace(text, protocol=f"{text.protocol}, sample after sample")


def measure(
    texts: Sequence[Text],
    *,
    original: tuple[str, Path],
    variants: Mapping[str, Path],
    device: str | torch.device = "cpu",
) -> Iterator[Measured]:
    """Yield what was measured: of the original first, then of each variant, in their order.

    A variant that cannot be read or has another vocabulary is measured as such (`Measured.problem`).

    Args:
        texts: The texts.
        original: Name and directory of the model that the variants were made from.
        variants: Their directories by name.
        device: Where to compute.
    """
    began = time.perf_counter()
    reference = Layered(original[1], device=device)
    seen = walk.walk(reference, texts, name=original[0])
    own = walk.compare(reference, seen, texts, reference=reference, seen_by_reference=seen)
    yield Measured(original[0], _readings(texts, own, beside=False), seconds=time.perf_counter() - began)
    for name, directory in variants.items():
        began = time.perf_counter()
        try:
            model = Layered(directory, device=device)
            tallies = walk.compare(
                model,
                walk.walk(model, texts, name=name),
                texts,
                reference=reference,
                seen_by_reference=seen,
            )
        except LlameroError as error:
            yield Measured(name, problem=error.problem, seconds=time.perf_counter() - began)
            continue
        yield Measured(name, _readings(texts, tallies, beside=True), seconds=time.perf_counter() - began)


def measure_together(
    texts: Sequence[Text], *, original: tuple[str, Path], variants: Mapping[str, Path], world: World
) -> list[Measured]:
    """Return what `measure` yields; several processes have variants of their own, and each walks the original.

    Args:
        texts: The texts; without any nothing is measured.
        original: As of `measure`.
        variants: As of `measure`.
        world: The processes, all of which call this.
    """
    if not texts:
        return []
    mine = {name: variants[name] for name in list(variants)[world.rank :: world.size]}
    with world.missing_named():
        with world.together():
            own = list(measure(texts, original=original, variants=mine, device=world.device))
        found = {each.name: each for some in reversed(world.gather(own)) for each in some}
    return [found[name] for name in (original[0], *variants)]


def _readings(texts: Sequence[Text], tallies: Sequence[Tally], *, beside: bool) -> tuple[Reading, ...]:
    return tuple(_reading(text, tally, beside=beside) for text, tally in zip(texts, tallies, strict=True))


def _reading(text: Text, tally: Tally, *, beside: bool) -> Reading:
    perplexity = tally.perplexity.value if tally.tokens else np.inf
    agreement = tally.agreement if tally.tokens and beside else None
    return Reading(
        text=text.name,
        protocol=text.protocol,
        tokens=tally.tokens,
        broken=tally.broken,
        perplexity=perplexity if np.isfinite(perplexity) else None,
        kl=None if agreement is None else agreement.kl,
        top1=None if agreement is None else agreement.top1,
    )


def results_of(measured: Measured, *, tokenizer: str) -> list[Result]:
    """Return numbers as tables and cards take them.

    Args:
        measured: What was measured of a model.
        tokenizer: Digest of the tokenizer that cut the texts.
    """
    found: list[Result] = []
    for reading in measured.readings:
        inputs = {"dtype": "float32", "tokenizer": tokenizer, "text": reading.text}
        how = f"{reading.protocol}, {reading.tokens + reading.broken:,} tokens"
        lost = (
            f"{measured.name}: NaN or infinity at {reading.broken:,} positions of {reading.text}, which count nowhere"
        )
        notes = (lost,) if reading.broken else ()
        if reading.perplexity is not None:
            metrics = {"perplexity": reading.perplexity, "tokens": reading.tokens}
            found.append(Result("perplexity", measured.name, metrics, how, inputs, notes))
        if reading.kl is not None and reading.top1 is not None:
            metrics = {"kl": reading.kl, "top1": reading.top1, "tokens": reading.tokens}
            found.append(Result("agreement", measured.name, metrics, f"{KL_PROTOCOL}, {how}", inputs, notes))
    return found


def refuse_what_was_calibrated_on(texts: Sequence[Text], calibration: Sequence[Tensor]) -> None:
    """Refuse texts of which many runs of tokens stand in the calibration text too, under whatever name.

    Raises:
        LlameroError: Naming the text, and how much of it was calibrated on.
    """
    # sequences are cut from one text, wherever their ends fall
    known = set(_runs(torch.cat(list(calibration)).numpy(), step=1)) if len(calibration) else set[bytes]()
    for text in texts:
        runs = list(_runs(np.asarray(text.ids), step=RUN))
        shared = sum(run in known for run in runs)
        if runs and shared > SHARED * len(runs):
            raise LlameroError(
                f"{shared / len(runs):.0%} of it was calibrated on: what is measured on it says nothing",
                where=text.name,
                fix="measure on another text (`quantize.measure`), or calibrate on another",
            )


def _runs(ids: np.ndarray, *, step: int) -> Iterator[bytes]:
    flat = np.ascontiguousarray(ids, dtype=np.int32)
    return (flat[at : at + RUN].tobytes() for at in range(0, len(flat) - RUN + 1, step))
