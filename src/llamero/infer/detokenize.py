"""Text that grows token by token: characters come whole, and stop strings never come at all."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not a whole character (yet)."""


@runtime_checkable  # so that tests can check types
class Decodes(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of some ids."""
        ...


class Text:
    """The text of an answer; its parts joined are what the decoder adds to the prompt's text.

    A decoder that drops the space before its first word must see what stands before the answer: the prompt
    at first, the tokens of the last part later.

    Args:
        tokenizer: Decodes.
        prompt: Ids that the answer follows.
        stops: Texts at which it ends.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt)
        self._shown = len(prompt)
        self._before = tokenizer.decode(self._window)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """Take a token and return the text that is now certain, often none."""
        self._window.append(id)
        now = self._tokenizer.decode(self._window)
        if len(now) <= len(self._before) or now.endswith(UNFINISHED):
            return ""
        return self._emit(self._advance(now))

    def end(self) -> str:
        """Return what was held back: the answer ends here."""
        if self.stopped:
            return ""
        now = self._tokenizer.decode(self._window)
        certain = self._emit(now[len(self._before) :])
        rest, self._held = self._held, ""
        return certain + rest

    def _advance(self, now: str) -> str:
        """Move the window on to the tokens of this part."""
        part = now[len(self._before) :]
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._before = self._tokenizer.decode(self._window)
        return part

    def _emit(self, part: str) -> str:
        text = self._held + part
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _beginning(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
