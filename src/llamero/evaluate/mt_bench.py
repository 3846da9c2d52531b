"""MT-Bench's rules: how warm each category is answered, what a judge is asked, and how its words become a score.

Zheng et al. 2023, arXiv:2306.05685, as FastChat's `llm_judge` does it; FastEval's mean is that of the two turns' means.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llamero.corpus.benchmarks import MtBenchRow
    from llamero.corpus.mt_bench import Answers, MtBench, Prompt

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
"""Of categories that are not MT-Bench's own."""
NEED_REFERENCE = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
"""Categories whose judge is shown a reference answer."""
MAX_NEW_TOKENS = 1024
JUDGE_TOKENS = 2048
TURNS = 2

NOTHING = -1
"""The rating of a judgment that holds none; such are dropped from every mean."""
UNANSWERED = "$ERROR$"
"""The judgment of a judge that gave no answer."""
FAILED = "ERROR"
"""The answer of a model that could not answer."""

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_FALLBACK = re.compile(r"\[(\d+\.?\d*)\]")
LOWEST, HIGHEST = 1, 10

Winner = Literal["A", "B", "tie", "error"]
_VERDICTS: dict[str, Winner] = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
Game = Literal["model_1", "model_2", "tie", "error"]


def temperature(category: str) -> float:
    """Return how warm a category's questions are answered; 0 is greedy."""
    return TEMPERATURES.get(category, OTHER_TEMPERATURE)


def rating(judgment: str) -> int | float:
    """Return the first `[[number]]` of a judgment, else the first `[number]`, else `NOTHING`."""
    found = _RATING.search(judgment) or _RATING_FALLBACK.search(judgment)
    if found is None:
        return NOTHING
    try:
        return ast.literal_eval(found[1])
    except SyntaxError:  # 08, or digits of another script
        return float(found[1])


def verdict(judgment: str) -> Winner:
    """Return which of two answers a judge prefers."""
    for mark, winner in _VERDICTS.items():
        if mark in judgment:
            return winner
    return "error"


# -- what a judge is asked


class Asked(NamedTuple):
    """One question to the judge."""

    prompt: Prompt
    text: str


def single(bench: MtBench, question: MtBenchRow, turn: int, answer: Sequence[str], reference: Answers) -> Asked:
    """Return how a judge is asked for a rating of an answer.

    Args:
        bench: The benchmark.
        question: What the model was asked.
        turn: 1, or 2 for the second turn in sight of the first.
        answer: What it said, turn by turn.
        reference: Reference answers.
    """
    prompt, shown = _shown(bench, "single-v1", "single-math-v1", question, turn, reference, "[[rating]]")
    if turn == 1:
        return Asked(prompt, prompt.fill(**shown, question=question.turns[0], answer=answer[0]))
    both = {"question_1": question.turns[0], "question_2": question.turns[1]}
    return Asked(prompt, prompt.fill(**shown, **both, answer_1=answer[0], answer_2=answer[1]))


def pair(
    bench: MtBench, question: MtBenchRow, turn: int, a: Sequence[str], b: Sequence[str], reference: Answers
) -> Asked:
    """Return how a judge is asked which of two answers is better.

    Args:
        bench: The benchmark.
        question: What the models were asked.
        turn: 1, or 2 for the second turn in sight of the first.
        a: What the first one said, turn by turn.
        b: What the second one said.
        reference: Reference answers.
    """
    prompt, shown = _shown(bench, "pair-v2", "pair-math-v1", question, turn, reference, "[[A]]")
    if turn == 1:
        return Asked(prompt, prompt.fill(**shown, question=question.turns[0], answer_a=a[0], answer_b=b[0]))
    shown |= {"question_1": question.turns[0], "question_2": question.turns[1]}
    shown |= {"answer_a_1": a[0], "answer_b_1": b[0], "answer_a_2": a[1], "answer_b_2": b[1]}
    return Asked(prompt, prompt.fill(**shown))


def _shown(
    bench: MtBench, plain: str, referring: str, question: MtBenchRow, turn: int, reference: Answers, form: str
) -> tuple[Prompt, dict[str, str]]:
    """Return the prompt for a question and the reference answers that it shows."""
    refers = question.category in NEED_REFERENCE
    prompt = bench.prompt((referring if refers else plain) + ("" if turn == 1 else "-multi-turn"))
    if prompt.form != form:
        raise LlameroError(
            f"judge prompt `{prompt.name}` asks for {prompt.form}, not {form}", fix="take FastChat's own"
        )
    if not refers:
        return prompt, {}
    if len(reference.get(question.id, ())) < len(question.turns):
        raise LlameroError(
            f"no reference answer to question {question.id} ({question.category})", fix="take FastChat's own files"
        )
    return prompt, {f"ref_answer_{number}": text for number, text in enumerate(reference[question.id], 1)}


# -- scores


class Rated(NamedTuple):
    """A rating of one turn of one answer."""

    question: int
    turn: int
    score: int | float
    vote: int = 1


@dataclass(frozen=True)
class Scores:
    """What the ratings of a model come to."""

    overall: float
    """Mean of all ratings, as FastChat's."""
    turns: Mapping[int, float]
    mean_of_turns: float
    """Mean of the turns' means, as FastEval's; another number where a rating is missing."""
    categories: Mapping[str, float]
    spread: float | None
    """Standard deviation of the overall score from vote to vote."""
    nothing: int
    """Judgments without a rating."""
    beyond: int
    """Ratings outside 1 to 10, which count all the same."""


def scores(rated: Iterable[Rated], categories: Mapping[int, str]) -> Scores:
    """Return the scores of a model.

    Args:
        rated: Its ratings, of all votes.
        categories: Category of each question.

    Raises:
        LlameroError: There is no rating of one of the turns.
    """
    every = list(rated)
    given = [each for each in every if each.score != NOTHING]
    turns = {turn: [each.score for each in given if each.turn == turn] for turn in sorted({e.turn for e in every})}
    empty = [turn for turn, found in turns.items() if not found]
    if empty or not turns:
        turn = empty[0] if empty else 1
        raise LlameroError(
            f"none of {sum(each.turn == turn for each in every)} judgments of turn {turn} holds a rating",
            fix="read what the judge says: it must end with [[rating]]",
        )
    means = {turn: statistics.fmean(found) for turn, found in turns.items()}
    names = list(dict.fromkeys(categories[each.question] for each in given))
    votes = [[e.score for e in given if e.vote == vote] for vote in sorted({e.vote for e in given})]
    return Scores(
        overall=statistics.fmean(each.score for each in given),
        turns=means,
        mean_of_turns=statistics.fmean(means.values()),
        categories={n: statistics.fmean(e.score for e in given if categories[e.question] == n) for n in names},
        spread=statistics.stdev(map(statistics.fmean, votes)) if len(votes) > 1 else None,
        nothing=len(every) - len(given),
        beyond=sum(not LOWEST <= each.score <= HIGHEST for each in given),
    )


class Match(NamedTuple):
    """Two answers, judged in both orders."""

    model_1: str
    model_2: str
    games: tuple[Game, Game]

    @property
    def winner(self) -> Game:
        """Return who won: only who won in both orders did."""
        if "error" in self.games:
            return "error"
        return self.games[0] if self.games[0] == self.games[1] else "tie"


class Record(NamedTuple):
    """What a model did in its matches."""

    wins: int
    losses: int
    ties: int

    @property
    def matches(self) -> int:
        """Return how many there were."""
        return self.wins + self.losses + self.ties

    @property
    def adjusted(self) -> float:
        """Return the share of wins where a tie is half of one."""
        return (self.wins + 0.5 * self.ties) / self.matches


def records(matches: Iterable[Match]) -> dict[str, Record]:
    """Return the record of each model; matches with a verdict that cannot be read are left out."""
    found: dict[str, Counter[str]] = {}
    for match in matches:
        if match.winner == "error":
            continue
        for me, name in (("model_1", match.model_1), ("model_2", match.model_2)):
            kind = "ties" if match.winner == "tie" else "wins" if match.winner == me else "losses"
            found.setdefault(name, Counter())[kind] += 1
    return {name: Record(each["wins"], each["losses"], each["ties"]) for name, each in found.items()}


# -- FastEval's reports


def fasteval_scores(replies: Sequence[Mapping[str, Any]], categories: Mapping[str, str]) -> dict[str, Any]:
    """Return what FastEval writes to `scores.json`, to the last digit.

    Args:
        replies: Content of its `judge-replies.json`.
        categories: Category of each question, by its number in text form.

    Raises:
        LlameroError: A reply is of an unknown question, or no reply to a turn holds a rating.
    """
    turns: dict[int, list[int | float]] = {0: [], 1: []}
    by_category: dict[str, list[int | float]] = {}
    for index, reply in enumerate(replies):
        question, turn, said = _reply(reply, categories, f"reply {index}")
        score = rating(said)
        if score != NOTHING:
            turns[turn].append(score)
            by_category.setdefault(categories[question], []).append(score)
    for turn, found in turns.items():
        if not found:
            raise LlameroError(f"no reply to turn {turn + 1} holds a rating", where="judge-replies.json")
    first, second = (statistics.mean(turns[turn]) for turn in (0, 1))
    return {
        "first_turn": first,
        "second_turn": second,
        "categories": {name: statistics.mean(found) for name, found in by_category.items()},
        "average": (first + second) / 2,
    }


def _reply(reply: Mapping[str, Any], categories: Mapping[str, str], where: str) -> tuple[str, int, str]:
    try:
        question, turn, said = str(reply["question_id"]), reply["turn_number"], reply["judge_reply"]
    except (KeyError, TypeError) as error:
        raise LlameroError(
            "a reply needs question_id, turn_number and judge_reply", where=where, fix="give FastEval's file"
        ) from error
    if question not in categories:
        raise LlameroError(f"question {question} is unknown", where=where, fix="give the questions with --data")
    if turn not in (0, 1) or not isinstance(said, str):
        raise LlameroError(f"turn_number {turn!r} or its judge_reply make no sense", where=where)
    return question, turn, said
