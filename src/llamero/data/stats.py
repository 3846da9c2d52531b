"""What became of every sample of a mixture, as text in the published layout and as JSON."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SourceStats:
    """Counts of one source in one split."""

    name: str
    layout: str = ""
    accepted: int = 0
    """Samples taken, each counted once."""
    repeated: int = 0
    """Further copies of them, where a source's weight takes samples more than once."""
    tokens: int = 0
    supervised_tokens: int = 0
    unknown_tokens: int = 0
    """Tokens that stand for text which the vocabulary cannot spell."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples left out, by reason."""
    shortest: int = 0
    longest: int = 0

    @property
    def processed(self) -> int:
        """Return samples read."""
        return self.accepted + self.skipped.total()

    @property
    def documents(self) -> int:
        """Return documents written: samples and their copies."""
        return self.accepted + self.repeated

    def add(self, tokens: int, supervised: int, *, copies: int = 1, unknown: int = 0) -> None:
        """Count an accepted sample that is written `copies` times."""
        self.shortest = tokens if self.accepted == 0 else min(self.shortest, tokens)
        self.longest = max(self.longest, tokens)
        self.accepted += 1
        self.repeated += copies - 1
        self.tokens += copies * tokens
        self.supervised_tokens += copies * supervised
        self.unknown_tokens += copies * unknown

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "name": self.name,
            "layout": self.layout,
            "processed": self.processed,
            "accepted": self.accepted,
            "repeated": self.repeated,
            "skipped": dict(self.skipped),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "unknown_tokens": self.unknown_tokens,
            "min_tokens": self.shortest,
            "max_tokens": self.longest,
            "avg_tokens": self.tokens / self.documents if self.documents else None,
        }


def total(parts: list[SourceStats]) -> SourceStats:
    """Return the sum of several sources."""
    whole = SourceStats("total")
    filled = [part for part in parts if part.accepted]
    whole.accepted = sum(part.accepted for part in parts)
    whole.repeated = sum(part.repeated for part in parts)
    whole.tokens = sum(part.tokens for part in parts)
    whole.supervised_tokens = sum(part.supervised_tokens for part in parts)
    whole.unknown_tokens = sum(part.unknown_tokens for part in parts)
    whole.skipped = sum((part.skipped for part in parts), Counter())
    whole.shortest = min((part.shortest for part in filled), default=0)
    whole.longest = max((part.longest for part in filled), default=0)
    return whole


def text(name: str, parts: list[SourceStats]) -> str:
    """Return the statistics as the Open-Assistant pretokenizer prints them, with what it leaves out added.

    Args:
        name: Of the mixture and split.
        parts: One per source; the total is made here.
    """
    blocks = [_block(part) for part in [*parts, total(parts)]]
    return f"\n# Stats for {name}*\n\n" + "\n".join(blocks)


def _block(part: SourceStats) -> str:
    processed = max(1, part.processed)
    skipped = part.skipped.total()
    average = part.tokens / part.documents if part.documents else 0.0
    lines = [
        f"## Stats for '{part.name}' ({part.processed} samples)",
        "-----------------",
        f"  Accepted: {part.accepted}/{part.processed} ({part.accepted / processed:.1%})",
        *([f"  Repeated: {part.repeated}"] if part.repeated else []),
        f"  Accepted tokens: {part.tokens}",
        f"  Supervised tokens: {part.supervised_tokens}",
        *([f"  Unknown tokens: {part.unknown_tokens}"] if part.unknown_tokens else []),
        f"  Skipped: {skipped} ({skipped / processed:.1%})",
        *(f"    {reason}: {count}" for reason, count in sorted(part.skipped.items())),
        f"  Min tokens per sample: {part.shortest}",
        f"  Max tokens per sample: {part.longest}",
        f"  Avg tokens per sample: {average}",
        "-----------------",
    ]
    return "\n".join(lines) + "\n"
