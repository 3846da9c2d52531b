"""A tokenized dataset: a directory with a Megatron pair of tokens, and mostly one of roles, for each split.

Files are called `[PREFIX-]train-text.bin/.idx` and `[PREFIX-]train-role.bin/.idx`, those of `val` alike.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from llamero.core.errors import LlameroError
from llamero.corpus.megatron import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SPLITS = ("train", "val")
Kind = Literal["text", "role"]

_NAME = re.compile(rf"(?:(?P<prefix>.+)-)?(?P<split>{'|'.join(SPLITS)})-text")


class Sources(NamedTuple):
    """Where the documents of a split come from: they stand one source after the other."""

    names: tuple[str, ...]
    ends: tuple[int, ...]
    """Number of the document after the last of each."""

    def of(self, documents: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the number of each document's source."""
        return np.searchsorted(np.asarray(self.ends), documents, side="right")


class Dataset:
    """A tokenized dataset, opened for reading.

    Somebody else's directory with a single pair under any other name opens as well: it is the split `train`.

    Args:
        directory: Artifact of a mixture, or any directory with Megatron pairs.

    Raises:
        LlameroError: There is no pair in it, or pairs of several datasets.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise LlameroError("no such directory", where=directory, fix="give the directory of a tokenized dataset")
        names = sorted(path.name.removesuffix(".idx") for path in directory.glob("*.idx"))
        texts = [name for name in names if not name.endswith("-role")]
        named = [found for found in map(_NAME.fullmatch, texts) if found]
        if not texts:
            raise LlameroError("no tokenized dataset: there is no .idx file of tokens in it", where=directory)
        if len({found["prefix"] for found in named}) > 1 or (not named and len(texts) > 1):
            raise LlameroError(
                f"several datasets in one directory: {', '.join(found[0] for found in named) or ', '.join(texts)}",
                where=directory,
                fix="give each a directory of its own",
            )
        self._text = {found["split"]: found[0] for found in named} or {"train": texts[0]}

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits that are there."""
        return tuple(split for split in SPLITS if split in self._text)

    def stem(self, split: str, kind: Kind) -> Path:
        """Return the path of a pair without its suffix.

        Raises:
            LlameroError: There is no such split.
        """
        if split not in self._text:
            raise LlameroError(
                f"no split `{split}`", where=self.directory, fix=f"this dataset has: {', '.join(self.splits)}"
            )
        text = self._text[split]
        return self.directory / (text if kind == "text" else f"{text.removesuffix('-text')}-role")

    def tokens(self, split: str) -> Reader:
        """Return the token ids of every document."""
        return Reader(self.stem(split, "text"))

    def roles(self, split: str) -> Reader | None:
        """Return the role of every token, None where the dataset has no roles.

        Raises:
            LlameroError: They do not belong to the tokens.
        """
        stem = self.stem(split, "role")
        if not stem.with_name(f"{stem.name}.idx").exists():
            return None
        tokens, roles = self.tokens(split), Reader(stem)
        if len(tokens) != len(roles) or (tokens.lengths != roles.lengths).any():
            raise LlameroError("roles and tokens are not of one dataset: their lengths differ", where=stem)
        return roles

    def sources(self, split: str) -> Sources | None:
        """Return where the documents come from, as the statistics beside them say; None where nobody wrote any.

        Sources of one name are told apart by a number. Long documents that were made of several count as one source.

        Raises:
            LlameroError: The statistics are of another dataset.
        """
        path = self.directory / "stats.json"
        parts = json.loads(path.read_text(encoding="utf-8")).get(split, {}).get("sources") if path.exists() else None
        if not parts:
            return None
        ends = tuple(accumulate(part["accepted"] + part["repeated"] for part in parts))
        documents = len(self.tokens(split))
        if ends[-1] != documents:
            problem = f"split `{split}` has {documents} documents, stats.json counts {ends[-1]}"
            raise LlameroError(problem, where=self.directory, fix="remove stats.json, or make the dataset again")
        return Sources(_told_apart([part["name"] for part in parts]), ends)


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    seen = Counter[str]()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return tuple(apart)
