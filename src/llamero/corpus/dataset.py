"""A tokenized dataset: a directory with a Megatron pair of tokens, and mostly one of roles, for each split.

Files are called `[PREFIX-]train-text.bin/.idx` and `[PREFIX-]train-role.bin/.idx`, those of `val` alike.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from llamero.core.errors import LlameroError
from llamero.corpus.megatron import Reader

if TYPE_CHECKING:
    from pathlib import Path

SPLITS = ("train", "val")
Kind = Literal["text", "role"]

_NAME = re.compile(rf"(?:(?P<prefix>.+)-)?(?P<split>{'|'.join(SPLITS)})-text")


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
