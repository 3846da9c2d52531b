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
    tokens: int = 0
    supervised_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples left out, by reason."""
    shortest: int = 0
    longest: int = 0

    @property
    def processed(self) -> int:
        """Return samples read."""
        return self.accepted + self.skipped.total()

    def add(self, tokens: int, supervised: int) -> None:
        """Count an accepted sample."""
        self.shortest = tokens if self.accepted == 0 else min(self.shortest, tokens)
        self.longest = max(self.longest, tokens)
        self.accepted += 1
        self.tokens += tokens
        self.supervised_tokens += supervised

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "name": self.name,
            "layout": self.layout,
            "processed": self.processed,
            "accepted": self.accepted,
            "skipped": dict(self.skipped),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "min_tokens": self.shortest,
            "max_tokens": self.longest,
            "avg_tokens": self.tokens / self.accepted if self.accepted else None,
        }


def total(parts: list[SourceStats]) -> SourceStats:
    """Return the sum of several sources."""
    whole = SourceStats("total")
    filled = [part for part in parts if part.accepted]
    whole.accepted = sum(part.accepted for part in parts)
    whole.tokens = sum(part.tokens for part in parts)
    whole.supervised_tokens = sum(part.supervised_tokens for part in parts)
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
    average = part.tokens / part.accepted if part.accepted else 0.0
    lines = [
        f"## Stats for '{part.name}' ({part.processed} samples)",
        "-----------------",
        f"  Accepted: {part.accepted}/{part.processed} ({part.accepted / processed:.1%})",
        f"  Accepted tokens: {part.tokens}",
        f"  Supervised tokens: {part.supervised_tokens}",
        f"  Skipped: {skipped} ({skipped / processed:.1%})",
        *(f"    {reason}: {count}" for reason, count in sorted(part.skipped.items())),
        f"  Min tokens per sample: {part.shortest}",
        f"  Max tokens per sample: {part.longest}",
        f"  Avg tokens per sample: {average}",
        "-----------------",
    ]
    return "\n".join(lines) + "\n"
