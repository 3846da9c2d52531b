"""What to quantize a model to, and on which text to look at it first."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llamero.core.config import Strict
from llamero.core.errors import LlameroError, did_you_mean
from llamero.corpus import known
from llamero.quantize import variants
from llamero.quantize.gate import MAX_KL, Measure

AFTERWARDS = frozenset({"measure", "max_kl", "publish_anyway"})
"""Keys about variants that are there: when they change, nothing is quantized again."""


class CalibrationSource(Strict):
    """Text or conversations to calibrate on: a mixture of the recipe, files, or a data set of the hub."""

    mixture: str | None = None
    """Mixture of the recipe, tokenized; its training samples are taken."""
    source: str = ""
    """Name, for reports; of a published data set it is enough: `wikitext-2-v1`."""
    path: Path | None = None
    """Text, JSON, JSONL or Parquet file (also .gz, .zst, .tar.gz), or a directory of them, relative to the recipe."""
    hub: str | None = None
    """`owner/name` of a hub data set, read through `datasets` (`pip install llamero[data]`)."""
    subset: str | None = None
    """Configuration of the hub data set, where it has several."""
    data_files: str | None = None
    """File of the hub data set to read, where it has several."""
    split: str = ""
    """Split that the text is of, `train` of the hub by default; of files only reports say it, as their name has it by
    default."""
    layout: str | None = None
    """Layout of the rows, as of a mixture's source; recognised by their keys where it is not stated."""
    limit: int | None = Field(default=None, gt=0)
    """Rows to read at most."""
    share: float = Field(default=1.0, gt=0)
    """Part of the calibration tokens, relative to the other sources."""

    @property
    def name(self) -> str:
        """Return what reports call it; never a path of somebody's machine."""
        return self.mixture or self.source or (self.path.name if self.path else "") or str(self.hub)

    @property
    def part(self) -> str:
        """Return the split, as stated or as a file's name says it."""
        if self.split:
            return self.split
        if self.path is None:
            return "train"
        words = re.split(r"[^a-z]+", self.path.name.lower())
        return next((_SPLITS[word] for word in words if word in _SPLITS), "whole")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, said: Any) -> Any:
        """Fill in where a published data set is."""
        if not isinstance(said, dict) or said.get("path") or said.get("hub") or said.get("mixture"):
            return said
        found = known.lookup(str(said.get("source", "")))
        if found is None:
            return said
        keys = ("hub", "subset", "data_files", "split", "layout")
        return {**{key: getattr(found, key) for key in keys if getattr(found, key)}, **said}

    @model_validator(mode="after")
    def _one_place(self) -> CalibrationSource:
        if [self.mixture, self.path, self.hub].count(None) != 2:
            hint = did_you_mean(self.source, known.KNOWN)
            near = f" ({hint})" if self.source and hint.startswith("did you mean") else ""
            raise ValueError(f"give one of `mixture`, `path` and `hub`, or the `source` of a published data set{near}")
        return self


_SPLITS = {"train": "train", "training": "train", "test": "test", "valid": "validation", "validation": "validation",
    "val": "validation", "dev": "validation"}  # fmt: skip
"""Words in names of files that say which split they are."""


@cache
def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16: with them it multiplies twice as fast as in float32
    or better, without them several times slower.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux: nothing is known, float32 is never wrong
        return False
    return re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", flags, re.MULTILINE) is not None


def _known(name: str) -> None:
    try:
        variants.parse(name)
    except LlameroError as error:
        raise ValueError(f"{error.problem}; {error.fix}") from error


def source_of(said: str, root: Path) -> dict[str, str]:
    """Return the source that somebody means: a path, or a published data set and its split (`wikitext-2-raw-v1:test`).

    Args:
        said: What was said.
        root: Directory that relative paths start from.

    Raises:
        LlameroError: It is neither.
    """
    path, (name, _, split) = Path(said).expanduser(), said.partition(":")
    if (root / path).exists():
        return {"path": str(path)}
    if known.lookup(name) is None:
        near = did_you_mean(name, known.KNOWN)
        fix = f"{near} or give the path of a file" if near.startswith("did you mean") else "give the path of a file"
        raise LlameroError("no such text, and no published data set of that name", where=said, fix=fix)
    return {"source": name, **({"split": split} if split else {})}


class Calibration(Strict):
    """The text that shows which inputs each layer sees: one source or several.

    Where none is named, the mixture that the model was last tuned on, if there is one, and WikiText-2's training text.
    """

    mixture: str | None = None
    """Mixture of the recipe to draw from; the text that the model was tuned on is the best there is."""
    text: Path | None = None
    """A file of text, or of rows in any layout that mixtures read."""
    sources: tuple[CalibrationSource, ...] = ()
    """Sources with a split, a layout or a share of their own, beside `mixture` and `text`."""
    sequence: int = Field(default=512, gt=1)
    """Tokens of a sequence; longer ones cost time and memory, and should not exceed the model's context."""
    tokens: int = Field(default=65_536, gt=0)
    """Tokens in all; fewer than a layer has inputs leave GPTQ guessing."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which the text goes through the model; `auto` is bfloat16 where the processor multiplies it faster, and
    what it came to is in the report."""
    propagation: Literal["shared", "reference", "per-bits", "exact"] = "shared"
    """Which activations a layer is looked at with: those of the unquantized model; of one quantized variant, for
    all; of one variant of each width; or each variant's own, which costs two forward passes more for each variant."""
    reference: str | None = None
    """The variant of `propagation: reference`; it need not be one of those that are made. 4-bit GPTQ if not given."""

    keep: bool = False
    """Keep what the pass finds, so that variants asked for later need no pass of their own: for each layer a few
    matrices as wide as its inputs, for 7 B parameters 13 GB, for 70 B 172 GB. Only with `propagation: shared`."""

    def parts(self, own: str | None = None) -> tuple[CalibrationSource, ...]:
        """Return all sources.

        Args:
            own: Mixture that the model was last tuned on.
        """
        given = [CalibrationSource(mixture=self.mixture)] if self.mixture is not None else []
        given += [CalibrationSource(path=self.text)] if self.text is not None else []
        given += self.sources
        if given:
            return tuple(given)
        mine = [CalibrationSource(mixture=own)] if own is not None else []
        return (*mine, CalibrationSource.model_validate({"source": "wikitext-2-raw-v1"}))

    def decides(self, own: str | None = None) -> dict[str, object]:
        """Return what decides the statistics, files left out: their contents decide, not where they lie.

        Args:
            own: As of `parts`.
        """
        parts = [part.model_dump(mode="json", exclude={"path"}) for part in self.parts(own)]
        how = {"compute": self.arithmetic, "propagation": self.propagation, "reference": self.reference}
        return {"sequence": self.sequence, "tokens": self.tokens, "sources": parts, **how}

    @property
    def arithmetic(self) -> Literal["float32", "bfloat16"]:
        """Return the dtype that `compute` comes to on this machine's processor."""
        if self.compute == "auto":
            return "bfloat16" if multiplies_bfloat16() else "float32"
        return self.compute

    @model_validator(mode="after")
    def _some_and_different(self) -> Calibration:
        if self.tokens < self.sequence:
            raise ValueError(f"{self.tokens} tokens are less than one sequence of {self.sequence}")
        named = [(part.name, part.part) for part in self.parts()]
        twice = [f"{name} ({part})" for name, part in named if named.count((name, part)) > 1]
        if twice:
            raise ValueError(f"two sources are called `{twice[0]}`; give each its own `source`")
        if self.reference is not None:
            if self.propagation != "reference":
                raise ValueError("`reference` needs `propagation: reference`")
            _known(self.reference)
        if self.keep and self.propagation != "shared":
            raise ValueError("`keep` needs `propagation: shared`: other statistics are those of one set of variants")
        return self


class QuantizeConfig(Strict):
    """Variants of one model, all from one look at the calibration text."""

    variants: tuple[str, ...] = Field(default_factory=variants.default_set, min_length=1)
    """Names such as `gptq-4bit-128g-actorder_True`: method, bits, group size (-1: whole row), order of activation.
    Without it the default set: the published table, and beside each that vLLM refuses one that it takes; of these, what
    does not divide the model's layers is left out."""
    calibration: Calibration = Calibration()
    """The text to look at."""
    imatrix: Path | None = None
    """File of llama.cpp's importances (either form) that GGUF variants heed instead of the calibration text."""
    damp: float = Field(default=0.01, gt=0, lt=1)
    """Added to the diagonal of the second moments, as a fraction of its mean; raised, and reported, if too little."""
    sensitivity: int = Field(default=4096, ge=0)
    """Calibration tokens on which it is measured how the loss feels the outputs of each layer, so that in GPTQ the
    errors of outputs answer to one another; takes a second walk through the model, and back, with that many tokens.
    0 is plain GPTQ."""
    refine: int | None = Field(default=None, ge=0)
    """Sweeps in which GPTQ's codes and scales are fitted to each other once more, each of which costs about as much as
    GPTQ itself. They take each output for itself, so only with `sensitivity: 0`; then 2 at 3 bits by default."""
    sym: bool = True
    """Zero in the middle of every grid. Asymmetric grids are a little better and are read by fewer programs."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Dtype of what is not quantized: embeddings, norms, head."""
    measure: Measure | None = Measure()
    """Texts on which every variant is measured beside the original; `null` measures nothing, and nothing is held
    back."""
    max_kl: float = Field(default=MAX_KL, gt=0)
    """Largest KL(original ‖ variant) on any of these texts, in nats per token, with which a variant is published."""
    publish_anyway: tuple[str, ...] = ()
    """Variants that are published whatever was measured; the card says so."""

    @model_validator(mode="after")
    def _outputs_coupled_or_not(self) -> QuantizeConfig:
        if self.refine and self.sensitivity:
            raise ValueError("`refine` takes each output for itself; set `sensitivity: 0` for it")
        return self

    @field_validator("variants")
    @classmethod
    def _known_and_different(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            _known(name)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"`{repeated[0]}` is listed twice")
        return names

    @model_validator(mode="after")
    def _exceptions_are_variants(self) -> QuantizeConfig:
        for name in self.publish_anyway:
            if name not in self.variants:
                raise ValueError(f"`publish_anyway`: no variant `{name}`; {did_you_mean(name, self.variants)}")
        return self

    def parsed(self) -> tuple[variants.Variant, ...]:
        """Return the variants."""
        return tuple(variants.parse(name, sym=self.sym) for name in self.variants)
