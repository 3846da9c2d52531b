"""What a recipe says of its data: sources, mixtures of them, and tokens added to the vocabulary."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from llamero.core.config import Strict
from llamero.core.errors import did_you_mean
from llamero.corpus import known, toy_world

Layout = Literal[
    "messages",
    "sharegpt",
    "sharegpt-clean",
    "alpaca",
    "alpaca-gpt4",
    "alpaca-rendered",
    "orca",
    "orca-chat",
    "dolphin",
    "dolly",
    "instruction-response",
    "pair",
    "dialogue",
    "preference",
    "oasst",
    "oasst-flat",
    "text",
]
Action = Literal["report", "drop"]


class _Source(Strict):
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the training samples to take; validation samples are not thinned."""
    size: int | None = Field(default=None, gt=0)
    """Training samples to take; all where there are fewer."""
    weight: float = Field(default=1.0, gt=0)
    """How often each sample is taken; 2.5 takes each twice, and by chance half of them a third time."""
    val_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples kept for validation."""
    max_val_set: int | None = Field(default=None, ge=0)
    """Most samples kept for validation; the rest goes back to training."""

    @property
    def files(self) -> dict[str, str]:
        """Return every path that the source reads, by its role: their contents decide, not where they lie."""
        return {}

    def decides(self) -> dict[str, object]:
        """Return what decides the samples, files left out."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _share_or_number(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError("give `fraction` or `size`, not both")
        return self


_ALIKE = ("dolphin", "alpaca-gpt4", "sharegpt-clean")
"""Layouts whose rows have the keys of another one, so that only the name of a data set tells."""


class FileSource(_Source):
    """Rows of a file, a directory of files, or a data set of the hub."""

    source: str
    """Name of the source, in reports."""
    path: str | None = None
    """JSON, JSONL, Parquet or text file (also .gz, .zst, .tar.gz), or a directory of them, relative to the recipe."""
    hub: str | None = None
    """`owner/name` of a hub data set, read through `datasets` (`pip install llamero[data]`)."""
    subset: str | None = None
    """Configuration of the hub data set, where it has several."""
    data_files: str | None = None
    """File of the hub data set to read, where it has several."""
    split: str = "train"
    """Split of the hub data set; several with commas between."""
    layout: Layout | None = None
    """Layout of the rows; recognised by their keys where it is not stated."""
    language: str = ""
    """Language of rows that name none."""
    lang: str | None = None
    """Languages to keep, with commas between (`en,de`); of a message tree the language of its root counts."""
    top_k: int | None = Field(default=None, gt=0)
    """Of ranked replies (OASST) the best so many at every turn; all where it is not stated."""
    synthetic: bool = False
    """Whether trees keep messages that a model wrote (OASST)."""
    refusals: bool | str = False
    """Leave out samples in which somebody speaks as "an AI language model" does; or a file with a phrase a line."""
    join_chars: int | None = Field(default=None, gt=0)
    """Join conversations under the same system message until they have so many characters (Dolphin's way)."""
    on_error: Literal["error", "skip"] = "error"
    """What a malformed row does: stop everything, or be counted and skipped."""
    limit: int | None = Field(default=None, gt=0)
    """Rows (message trees) to read at most."""

    @property
    def files(self) -> dict[str, str]:
        """Return the file or directory, and the file of refusal phrases if it is the user's own."""
        found = {self.source: self.path, f"{self.source} refusals": self.refusals}
        return {role: path for role, path in found.items() if isinstance(path, str)}

    def decides(self) -> dict[str, object]:
        """Return what decides the samples, files left out."""
        own_phrases = {"refusals": True} if isinstance(self.refusals, str) else {}
        return {key: value for key, value in (super().decides() | own_phrases).items() if key != "path"}

    @model_validator(mode="before")
    @classmethod
    def _published(cls, said: Any) -> Any:
        """Fill in what is known of a published data set: where it is, and what its published loader does."""
        if not isinstance(said, dict) or (said.get("hub") and said.get("path")):
            return said
        found = known.lookup(str(said.get("source", "")))
        if found is None or said.get("hub") not in (None, found.hub):
            return said
        keys = {field.name for field in fields(found)} & cls.model_fields.keys()
        if said.get("path"):
            # a file may be a copy in another form: what its rows are is looked at, unless their keys do not tell
            keys -= {"hub", "data_files", "split"} | ({"layout"} if found.layout not in _ALIKE else set())
        return {**{key: getattr(found, key) or None for key in sorted(keys) if getattr(found, key)}, **said}

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.path is not None and self.hub is not None:
            raise ValueError("give `path` or `hub`, not both")
        if self.path is None and self.hub is None:
            raise ValueError(f"where `{self.source}` lies is not known{_hint(self.source)}; give `path` or `hub`")
        return self


def _hint(name: str) -> str:
    """Return what may help whoever named a source that is not known, or that was never published."""
    found = known.lookup(name)
    if found is not None:
        return f" ({found.notes})"
    near = did_you_mean(name, known.KNOWN)
    return f" ({near})" if near.startswith("did you mean") else ""


class ToyWorldSource(_Source):
    """Text of the small invented world that the quickstart learns."""

    toy_world: Literal["documents", "conversations"]
    """Statements to learn the world from, or questions and answers about half of it."""
    count: int = Field(gt=0)
    """Samples to generate."""
    seed: int = 1
    """Which world."""

    @property
    def source(self) -> str:
        """Return the name of the source, in reports."""
        return f"toy_world {self.toy_world}"

    def decides(self) -> dict[str, object]:
        """Return what decides the samples."""
        return {**super().decides(), "version": toy_world.VERSION}


_KINDS: dict[str, type[_Source]] = {"toy_world": ToyWorldSource, "source": FileSource}
"""The key by which a source of each kind is known; the last one is what a source without any of them is taken for."""


def _kind(value: Any) -> str:
    if isinstance(value, _Source):
        return type(value).__name__
    known = [kind for key, kind in _KINDS.items() if isinstance(value, dict) and key in value]
    return (known or [FileSource])[0].__name__


SourceConfig = Annotated[
    Annotated[FileSource, Tag("FileSource")] | Annotated[ToyWorldSource, Tag("ToyWorldSource")], Discriminator(_kind)
]
"""Every kind of source there is. To add one: a class above (its `files` too, or changed files would go unnoticed), its
tag here and its key in `_KINDS`, a branch of `Reading` in data/read.py, a test."""


class LengthenConfig(Strict):
    """Long documents made of shorter ones, long chats made of dialogues."""

    length: int = Field(gt=0)
    """Tokens of a document."""
    long_from: int = Field(default=4096, gt=0)
    """Tokens from which a document counts as long: drawn always, and before shorter ones; only its domain's share can
    leave it out."""
    short_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the shorter documents that is drawn; a domain's share can leave out some of them."""
    recall_every: int = Field(default=4, gt=0)
    """Dialogues of a long chat between two questions about earlier ones."""


class DuplicatesConfig(Strict):
    """Samples that say nearly the same (MinHash), within and across sources."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word 5-grams from which two samples count as one."""
    action: Action = "drop"
    """Leave out all but the first, or only report."""


class DecontaminateConfig(Strict):
    """Samples that overlap with test questions."""

    against: dict[str, str] = Field(min_length=1)
    """Test sets by name: a folder of benchmarks (or of one, `gsm8k` …) or a file of texts, relative to the recipe."""
    ngram: Literal[8, 13] = 13
    """Words of a passage that counts as taken from a test set."""
    action: Action = "drop"
    """Leave such samples out, or only report them."""


class MixtureConfig(Strict):
    """Sources that are learned together."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Where the samples come from."""
    min_assistant_tokens: int = Field(default=0, ge=0)
    """Conversations whose assistant says less are skipped."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Samples that are longer are skipped."""
    filename_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    """Begins the names of the files: `PREFIX-train-text.bin`."""
    jsonl: bool = False
    """Also write the rendered samples as JSON lines."""
    duplicates: DuplicatesConfig | None = None
    """What happens to near-duplicates."""
    decontaminate: DecontaminateConfig | None = None
    """What happens to samples that overlap with test sets."""
    lengthen: LengthenConfig | None = None
    """Make long documents of the samples."""

    @property
    def files(self) -> dict[str, str]:
        """Return every path that the mixture reads, by its role."""
        found = {f"source {role}": path for source in self.sources for role, path in source.files.items()}
        tests = self.decontaminate.against if self.decontaminate else {}
        return found | {f"test set {name}": path for name, path in tests.items()}

    def decides(self) -> dict[str, object]:
        """Return what decides the dataset, files left out."""
        said = self.model_dump(mode="json", exclude={"sources": True, "decontaminate": {"against"}})
        return {**said, "sources": [source.decides() for source in self.sources]}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.source for source in self.sources]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are called `{min(twice)}`; give each its own name")
        return self


class DataConfig(Strict):
    """The data of a release."""

    extra_tokens: list[str] = []
    """Special tokens that get the next free ids, in this order; those that a template needs included."""
    new_rows: Literal["mean", "copy_last"] = "mean"
    """Where embedding rows of new tokens start: the `mean` of the base tokens' rows, or `copy_last`, a copy of the last
    of them (what Megatron's checkpoint tools do, and so how the published models began)."""
    mixtures: dict[str, MixtureConfig] = {}
    """Mixtures by name; training stages and calibration refer to them."""


class VocabularyConfig(Strict):
    """A tokenizer to train, for a model that starts from nothing."""

    size: int = Field(gt=258)
    """Tokens, the special ones included."""
    mixture: str
    """Mixture whose text it is trained on."""
    split_digits: bool = True
    """Whether each digit is a token of its own."""
