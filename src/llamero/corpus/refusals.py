"""Samples in which somebody speaks as a refusing assistant, known by phrases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamero.core.errors import LlameroError
from llamero.corpus.samples import Chat, Sample

SHIPPED = Path(__file__).with_name("refusals.txt")


@dataclass(frozen=True)
class Refusals:
    """Phrases, in lower case."""

    phrases: tuple[str, ...]

    @classmethod
    def load(cls, path: Path | None = None) -> Refusals:
        """Return the phrases of a file, one a line; the shipped ones where none is given.

        Lines that begin with `#` and blank lines say nothing; quotes around a phrase keep the spaces within.

        Raises:
            LlameroError: There is no such file, it is no text, or holds no phrase.
        """
        path = path or SHIPPED
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LlameroError(f"the refusal phrases cannot be read: {error}", where=path) from error
        said = (line.strip() for line in lines)
        phrases = tuple(_unquoted(line).lower() for line in said if line and not line.startswith("#"))
        if not all(phrases) or not phrases:
            raise LlameroError("no refusal phrase, or an empty one", where=path, fix="write one phrase a line")
        return cls(phrases)

    def found(self, sample: Sample) -> str | None:
        """Return the first phrase in a question or an answer, or in a document; None if there is none."""
        if isinstance(sample, Chat):
            texts = [message.text for message in sample.messages if message.role in ("user", "assistant")]
        else:
            texts = [sample.text]
        lowered = [text.lower() for text in texts]
        return next((phrase for phrase in self.phrases for text in lowered if phrase in text), None)


def _unquoted(line: str) -> str:
    return line[1:-1] if len(line) > 1 and line[0] == line[-1] == '"' else line
