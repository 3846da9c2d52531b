"""Progress of long loops: a plain iterator until somebody who may print installs a bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


class Bar(Protocol):
    """What a progress display must offer; `llamero.cli` has the one that people see."""

    def start(self, name: str, *, total: int | None, unit: str, done: int) -> int:
        """Open a line and return its number."""
        ...

    def advance(self, line: int, amount: int, note: str) -> None:
        """Move a line on by `amount` units and show `note` beside it."""
        ...

    def stop(self, line: int) -> None:
        """Close a line."""
        ...


class _Silent:
    def start(self, name: str, *, total: int | None, unit: str, done: int) -> int:
        return 0

    def advance(self, line: int, amount: int, note: str) -> None:
        pass

    def stop(self, line: int) -> None:
        pass


_bar: Bar = _Silent()


def install(bar: Bar | None) -> None:
    """Show progress through `bar` from now on; `None` silences it again."""
    global _bar
    _bar = bar or _Silent()


class Line:
    """One line of progress, advanced by hand: `with progress.Line("train", total=800, unit="steps") as line`."""

    def __init__(self, name: str, *, total: int | None = None, unit: str = "it", done: int = 0) -> None:
        self._bar = _bar
        self._line = self._bar.start(name, total=total, unit=unit, done=done)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units done."""
        self._bar.advance(self._line, amount, note)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop(self._line)


def track(items: Iterable[T], name: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, showing how many of them are done."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Line(name, total=total, unit=unit) as line:
        for item in items:
            yield item
            line.advance()
