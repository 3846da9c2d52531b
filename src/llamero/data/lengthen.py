"""Long documents made of shorter ones, and long chats made of dialogues.

Documents: Fu et al. 2024, "Data engineering for scaling language models to 128K context" (arXiv:2402.10171): long ones
are taken more often than short ones, and every domain keeps its share of the tokens.
Chats: Liu et al. 2024, "World model on million-length video and language with blockwise ringattention"
(arXiv:2402.08268): dialogues one after the other, with questions about earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamero.corpus.samples import Chat
from llamero.data import draw
from llamero.data.config import LengthenConfig
from llamero.text.messages import Message

# -- which documents

TINY = 10
"""A domain with fewer tokens than so many target lengths decides nothing."""
FEW = 0.1
"""Share of the tokens below which the report warns that little is kept."""


@dataclass(frozen=True)
class Domain:
    """What became of a domain."""

    documents: int
    kept_documents: int
    tokens: int
    kept_tokens: int
    share: float
    """Of all tokens."""
    kept_share: float
    """Of all tokens that were kept."""


@dataclass(frozen=True)
class Choice:
    """Which documents are kept, and what that means for the domains."""

    kept: NDArray[np.bool_]
    domains: dict[int, Domain]
    scarcest: int | None
    """Domain that decided how much of the others is kept; None where there is no token."""
    tiny: list[int]
    """Domains that were too small to decide."""

    @property
    def share(self) -> float:
        """Return the share of all tokens that is kept."""
        tokens = sum(domain.tokens for domain in self.domains.values())
        return sum(domain.kept_tokens for domain in self.domains.values()) / max(1, tokens)

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the report; `names` are those of the domains, by number."""
        scarcest = None if self.scarcest is None else names[self.scarcest]
        few = scarcest is not None and self.share < FEW
        return {
            "scarcest": scarcest,
            "kept_share": self.share,
            "warning": f"only {self.share:.1%} of the tokens are kept, because of domain `{scarcest}`" if few else "",
            "tiny": [names[number] for number in self.tiny],
            "domains": {names[number]: asdict(domain) for number, domain in self.domains.items()},
        }


def choose(
    tokens: NDArray[np.int64],
    domains: NDArray[np.integer[Any]],
    config: LengthenConfig,
    *,
    keys: NDArray[np.uint64],
) -> Choice:
    """Return which documents are kept: more of the long ones, no domain beyond its share.

    Drawn are all documents from `long_from` on, and of the shorter ones by chance the `short_share`; where that leaves
    a domain without a token, one document more. The domain of which that leaves least decides which share of every
    domain is kept. Each takes its drawn documents, the long ones first, and passes over what would take it further
    from its share: so a long document is never left to chance, but its domain may have no room for it.

    A domain of fewer than `TINY` times `length` tokens decides nothing, unless all are so small; of its documents,
    drawn or not, those are taken that bring it nearer to its share.

    Args:
        tokens: Of each document, estimated or counted.
        domains: Number of each document's domain.
        config: From where on a document is long, and how many of the others are kept.
        keys: An evenly spread number of each document: the chance. Lower ones are kept first.
    """
    long = tokens >= config.long_from
    drawn = long | draw.below(keys, config.short_share)
    order = np.lexsort((keys, ~long, ~drawn, domains))  # by domain; of each the drawn ones first, of them the long ones
    numbers, starts = np.unique(domains[order], return_index=True)
    members = dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=False))  # no document: one empty part
    whole = {number: int(tokens[those].sum()) for number, those in members.items()}
    tiny = [number for number in members if 0 < whole[number] < TINY * config.length]
    if len(tiny) == sum(map(bool, whole.values())):
        tiny = []
    small = set(tiny)
    left = {
        number: those if number in small else those[: _drawn(those, tokens, drawn)]
        for number, those in members.items()
        if whole[number]
    }
    parts = {number: tokens[those].sum() / whole[number] for number, those in left.items() if number not in small}
    scarcest = min(parts, key=lambda number: parts[number], default=None)
    kept = np.zeros(tokens.size, dtype=np.bool_)
    for number, those in left.items():
        assert scarcest is not None  # a domain has a token
        kept[_cut_back(those, tokens, parts[scarcest] * whole[number])] = True
    return Choice(kept, _report(tokens, members, kept), scarcest, tiny)


def _drawn(members: NDArray[np.int64], tokens: NDArray[np.int64], drawn: NDArray[np.bool_]) -> int:
    """Return how many of a domain's documents are drawn: as many as chance says, but so many that one has a token."""
    return max(int(np.count_nonzero(drawn[members])), int(np.argmax(tokens[members] > 0)) + 1)


def _cut_back(members: NDArray[np.int64], tokens: NDArray[np.int64], budget: float) -> list[int]:
    """Return the documents that, taken one by one, bring a domain nearer to its budget of tokens."""
    taken: list[int] = []
    for document, size in zip(members.tolist(), tokens[members].tolist(), strict=True):
        if size <= 2 * budget:
            taken.append(document)
            budget -= size
    return taken


def _report(
    tokens: NDArray[np.int64], members: dict[int, NDArray[np.int64]], kept: NDArray[np.bool_]
) -> dict[int, Domain]:
    total, total_kept = int(tokens.sum()), int(tokens[kept].sum())
    found: dict[int, Domain] = {}
    for number, documents in members.items():
        those = documents[kept[documents]]
        before, after = int(tokens[documents].sum()), int(tokens[those].sum())
        shares = before / max(1, total), after / max(1, total_kept)
        found[number] = Domain(documents.size, those.size, before, after, *shares)
    return found


# -- documents of one length


class Span(NamedTuple):
    """A stretch of a long document or chat, and where it is from."""

    start: int
    """First token (of a chat: message)."""
    stop: int
    """End, exclusive."""
    label: Any
    """Names the original document."""
    offset: int
    """First token (message) within the original document."""


class Piece(NamedTuple):
    """A document made of stretches of others."""

    ids: NDArray[np.integer[Any]]
    roles: NDArray[np.integer[Any]]
    spans: list[Span]


class Joiner:
    """Joins documents in the order in which they come, and cuts what they make into pieces of one length.

    Args:
        length: Tokens of a piece.
        waiting: What an earlier joiner was left with, to go on from.
    """

    def __init__(self, length: int, waiting: Piece | None = None) -> None:
        self._length = length
        self._parts: list[Piece] = [waiting] if waiting is not None and waiting.ids.size else []
        self._size = 0 if waiting is None else waiting.ids.size

    def add(self, ids: NDArray[np.integer[Any]], roles: NDArray[np.integer[Any]], label: Any) -> list[Piece]:
        """Append a document and return the pieces that it makes full; what is left of it begins the next piece."""
        if ids.size != roles.size:
            raise ValueError(f"{ids.size} tokens, {roles.size} roles")
        full: list[Piece] = []
        start = 0
        while start < ids.size:
            stop = min(ids.size, start + self._length - self._size)
            span = Span(self._size, self._size + stop - start, label, start)
            self._parts.append(Piece(ids[start:stop], roles[start:stop], [span]))
            self._size += stop - start
            start = stop
            if self._size == self._length:
                full.append(self.waiting)
                self._parts, self._size = [], 0
        return full

    @property
    def waiting(self) -> Piece:
        """Return what does not fill a piece yet."""
        if not self._parts:
            return Piece(np.zeros(0, np.int64), np.zeros(0, np.int64), [])
        ids, roles, spans = zip(*self._parts, strict=True)
        return Piece(np.concatenate(ids), np.concatenate(roles), [span for part in spans for span in part])

    def finish(self) -> int:
        """Return how many tokens fill no piece, and forget them."""
        left = self._size
        self._parts, self._size = [], 0
        return left


# -- chats


@dataclass
class ChatCounts:
    """What became of dialogues."""

    dialogues: int = 0
    """Those that are part of a long chat."""
    without_answer: int = 0
    """Those that are not, because nobody answers in them."""
    unanswered: int = 0
    """Dialogues that lost a last question that has no answer."""
    chats: int = 0
    """Long chats."""
    overlong: int = 0
    """Those of one dialogue that is longer than was asked for."""
    recalls: int = 0
    """Questions about earlier dialogues."""
    recalls_missed: int = 0
    """Those that were due, but nothing could be asked that has one answer and fits."""
    systems_dropped: int = 0
    """System messages left out, because other dialogues of the chat have another or none."""

    def to_json(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self)


def long_chats(
    chats: Iterable[tuple[Any, Chat]], *, characters: int, recall_every: int, seed: int, counts: ChatCounts
) -> Iterator[tuple[Chat, list[Span]]]:
    """Yield chats that dialogues make one after the other, with questions about earlier ones in between.

    Answers to these are given word for word as they stand earlier in the chat. They belong to no span, for a span is
    what is from one dialogue. The last chat may be short.

    Args:
        chats: Dialogues, with what names each in the spans.
        characters: Of a long chat, at most; a dialogue that is longer by itself is a chat alone.
        recall_every: Dialogues between two questions about earlier ones.
        seed: Decides what is asked.
        counts: Grows by what became of the dialogues.
    """
    chat = _LongChat()
    for label, dialogue in chats:
        offset = int(dialogue.messages[0].role == "system") if dialogue.messages else 0
        answered = _answered(dialogue.messages[offset:])
        counts.unanswered += 0 < len(answered) < len(dialogue.messages) - offset
        counts.without_answer += not answered
        if not answered:
            continue
        if chat.spans and chat.size + _characters(answered) > characters:
            yield chat.finish(counts)
            chat = _LongChat()
        chat.add(answered, dialogue, Span(0, len(answered), label, offset))
        counts.overlong += chat.size > characters
        if len(chat.spans) % recall_every == 0:
            chance = draw.keys(seed, "long chats", "recall", np.asarray([counts.chats]), len(chat.spans))
            asked = chat.recall(int(chance[0]), characters - chat.size)
            counts.recalls += asked
            counts.recalls_missed += not asked
    if chat.spans:
        yield chat.finish(counts)


def _answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return messages up to the last answer."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    return messages


def _characters(messages: Iterable[Message]) -> int:
    return sum(len(message.text) for message in messages)


class Asked(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    recalls: bool = False
    """It is about another one."""


class _LongChat:
    """A chat that grows."""

    def __init__(self) -> None:
        self.size = 0
        """Characters."""
        self.spans: list[Span] = []
        self._messages: list[Message] = []
        self._systems: list[Message | None] = []
        self._languages: set[str] = set()
        self._rounds: list[Asked] = []
        self._earlier = 0  # rounds before the last dialogue

    def add(self, messages: Sequence[Message], dialogue: Chat, span: Span) -> None:
        """Append messages of a dialogue; its system message waits until it is known whether all share it."""
        start = len(self._messages)
        system = dialogue.messages[0] if span.offset else None
        self.spans.append(span._replace(start=start, stop=start + span.stop))
        self._messages += messages
        self._systems.append(system)
        self._languages.add(dialogue.language)
        self._earlier = len(self._rounds)
        for before, after in pairwise(messages):
            if (before.role, after.role) == ("user", "assistant"):
                self._rounds.append(Asked(before.text, after.text))
        self.size += _characters(messages) + (0 if system is None or start else len(system.text))

    def recall(self, chance: int, room: int) -> bool:
        """Ask about an earlier dialogue; return False if there is nothing to ask in so many characters."""
        earlier = self._rounds[: self._earlier] or self._rounds  # after the first dialogue there is only that one
        askable = [number for number, asked in enumerate(earlier) if not asked.recalls]
        for step in range(min(len(askable), _TRIES)):
            for turn in range(len(RECALLS)):
                ask = RECALLS[((chance >> 32) + turn) % len(RECALLS)]
                found = ask(self._rounds, askable[(chance + step) % len(askable)])
                if found and found.answer.strip() and len(found.question) + len(found.answer) <= room:
                    self._messages += [Message("user", found.question), Message("assistant", found.answer)]
                    self._rounds.append(found)
                    self.size += len(found.question) + len(found.answer)
                    return True
        return False

    def finish(self, counts: ChatCounts) -> tuple[Chat, list[Span]]:
        counts.chats += 1
        counts.dialogues += len(self.spans)
        language = self._languages.pop() if len(self._languages) == 1 else ""
        system = self._systems[0]
        if system is None or any(other != system for other in self._systems):
            counts.systems_dropped += sum(other is not None for other in self._systems)
            return Chat(tuple(self._messages), language), self.spans
        spans = [span._replace(start=span.start + 1, stop=span.stop + 1) for span in self.spans]
        spans[0] = spans[0]._replace(start=0, offset=0)
        return Chat((system, *self._messages), language), spans


# -- questions about earlier rounds, each with its one true answer; None if there is none


def _what_did_you_answer(rounds: Sequence[Asked], number: int) -> Asked | None:
    quote = _quote(rounds[number].question, [other.question for other in rounds])
    return _recall(quote, "Earlier I asked you: {} What did you answer?", rounds[number].answer)


def _what_had_i_asked(rounds: Sequence[Asked], number: int) -> Asked | None:
    quote = _quote(rounds[number].answer, [other.answer for other in rounds])
    return _recall(quote, "What had I asked when you said this? {}", rounds[number].question)


def _what_came_before(rounds: Sequence[Asked], number: int) -> Asked | None:
    if number == 0 or rounds[number - 1].recalls:
        return None
    quote = _quote(rounds[number].question, [other.question for other in rounds])
    return _recall(quote, "Which question did I ask just before this one? {}", rounds[number - 1].question)


def _what_was_first(rounds: Sequence[Asked], number: int) -> Asked | None:
    """Ask by the longest word of a question that no question before it had."""
    before = " ".join(earlier.question for earlier in rounds[:number]).casefold()
    words = re.findall(r"[^\W\d_]{5,}", rounds[number].question)
    new = max((word for word in words if word.casefold() not in before), key=len, default=None)
    quote = new and f"“{new}”"
    return _recall(quote, "What was the first question in which I mentioned {}?", rounds[number].question)


RECALLS: tuple[Callable[[Sequence[Asked], int], Asked | None], ...] = (
    _what_did_you_answer,
    _what_had_i_asked,
    _what_came_before,
    _what_was_first,
)
"""Every way to ask about an earlier round; chance says which is tried first."""

_TRIES = 16
"""Rounds that are tried before a question is given up."""
_QUOTED = 200
"""Characters that are quoted at most."""


def _quote(text: str, others: Sequence[str]) -> str | None:
    """Return the beginning of a text in quotes, None if it is empty or another one begins like this."""
    begin = text if len(text) <= _QUOTED else text[:_QUOTED].rpartition(" ")[0] or text[:_QUOTED]
    if not begin.strip() or sum(other.startswith(begin) for other in others) > 1:
        return None
    return f"“{begin}”" if begin == text else f"“{begin} …”"


def _recall(quote: str | None, question: str, answer: str) -> Asked | None:
    return None if quote is None else Asked(question.format(quote), answer, recalls=True)
