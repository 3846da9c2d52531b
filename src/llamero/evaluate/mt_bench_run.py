"""MT-Bench from a model to its scores: answers, judgments, means, and a picture of the categories."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llamero.core import files, world
from llamero.core.artifact import alone_in
from llamero.core.errors import LlameroError, did_you_mean
from llamero.core.journal import Journal
from llamero.corpus import mt_bench as corpus
from llamero.engine.radar import radar
from llamero.evaluate.config import HUB, MtBenchTask
from llamero.evaluate.judge import Court, Judge, LocalJudge, Question, ServedJudge, file_name
from llamero.evaluate.mt_bench import (
    HIGHEST,
    LOWEST,
    NOTHING,
    TURNS,
    UNANSWERED,
    Match,
    Rated,
    Scores,
    pair,
    rating,
    records,
    scores,
    single,
    verdict,
)
from llamero.evaluate.mt_bench_answers import Speaker, answer
from llamero.infer.chat import sampling_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llamero.corpus.benchmarks import MtBenchRow
    from llamero.corpus.mt_bench import Answers
    from llamero.infer.sampler import Sampling

TOP_K = 50
"""Of transformers' `generate`, where a model does not say otherwise."""


class Measured(NamedTuple):
    """What MT-Bench says of a model, and how that was found."""

    metrics: dict[str, float]
    protocol: str
    notes: list[str]
    inputs: dict[str, Any]


def judge_of(task: MtBenchTask, root: Path) -> Judge:
    """Return the judge that a task names; nothing is asked of it yet.

    Args:
        task: Names it.
        root: Directory that paths start from.

    Raises:
        LlameroError: Its key or its name is missing, or there is no such model.
    """
    endpoint = task.endpoint()
    if endpoint is not None:
        return ServedJudge(endpoint, temperature=task.judge_temperature, threads=task.judge_threads)
    there = root / Path(task.judge).expanduser()
    name = str(there) if there.exists() else task.judge
    return LocalJudge(name, temperature=task.judge_temperature, template=task.judge_template)


class Bench:
    """MT-Bench of one model.

    Args:
        task: What to measure and how.
        root: Directory that the task's paths start from.
        out: Directory of what is written: FastChat's `model_answer/` and `model_judgment/`; by default `mt_bench`.

    Raises:
        LlameroError: Files, the key or the judge are missing, or several processes would ask the same.
    """

    def __init__(self, task: MtBenchTask, root: Path, out: Path | None) -> None:
        if world.rank():
            raise LlameroError("`mt_bench` runs in one process", fix="start it without torchrun")
        self._task, self._out = task, out or Path("mt_bench")
        self._judge = judge_of(task, root)
        self._versions: list[str] = []
        self._files = corpus.load(corpus.fetch() if task.data == HUB else root / task.data)
        self._questions = self._files.questions[: task.limit]
        _refuse_other_turns(self._questions)
        self._others = {} if task.answers is None else _others(root / task.answers, self._questions)
        if task.judge_mode == "pairwise-baseline" and task.baseline not in self._others:
            raise LlameroError(
                f"no answers of the baseline `{task.baseline}`",
                where=task.answers,
                fix=did_you_mean(task.baseline, self._others) if self._others else "give `answers`",
            )
        self._reference_of, self._reference = self._files.reference(self._judge.name)

    def measure(self, speaker: Speaker, *, directory: Path) -> Measured:
        """Return what the judge thinks of a model.

        Args:
            speaker: The model.
            directory: Where it was read from: says which other way of choosing tokens it wants.

        Raises:
            LlameroError: The judge refuses, says nothing that can be read, or answers of another run are in the way.
        """
        task = self._task
        sampling = _sampling(directory, task)
        settings = {
            "model": _fingerprint(directory),
            "tokenizer": speaker.tokenizer.digest,
            "template": speaker.template,
            "questions": files.digest([[q.id, q.category, *q.turns] for q in self._files.questions]),
            "max_new_tokens": sampling.max_new_tokens,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "dtype": task.dtype,
        }
        find = self._single if task.judge_mode == "single" else self._pairwise
        with alone_in(self._out):
            said = answer(speaker, self._questions, self._out, sampling=sampling, settings=settings)
            found = find(speaker.name, said.answers)
        made = {key: value for key, value in settings.items() if key not in ("model", "tokenizer", "dtype")}
        inputs = {"judge": {"name": self._judge.name, "what": self._judge.describe(), "versions": self._versions}}
        inputs |= {"answers": made, "reference": self._reference_of, "limit": task.limit}
        versions = f" ({', '.join(self._versions)})" if self._versions else ""
        protocol = f"{found.protocol}; judge {self._judge.name}{versions}"
        return Measured(found.metrics, protocol, [*said.notes, *found.notes], {**inputs, **found.inputs})

    # -- ratings

    def _single(self, model: str, answers: Answers) -> Measured:
        rows = self._judged("single", list(self._ratings(model, answers)))
        rated = [Rated(row["question_id"], row["turn"], row["score"], row.get("vote", 1)) for row in rows]
        categories = {q.id: q.category for q in self._questions}
        try:
            found = scores(rated, categories)
        except LlameroError as error:
            raise LlameroError(error.problem, where=self._place("single"), fix=error.fix) from error
        self._picture(model, found)
        task = self._task
        how = f"{len(self._questions)} questions, {TURNS} turns, one rating of {LOWEST} to {HIGHEST} each"
        votes = f", mean of {task.votes} votes at temperature {task.judge_temperature:g}" if task.votes > 1 else ""
        protocol = f"MT-Bench (FastChat), {how}{votes}"
        inputs = {"votes": task.votes, "judge_temperature": task.judge_temperature}
        return Measured(_metrics(found), protocol, self._rating_notes(rows, found), inputs)

    def _ratings(self, model: str, answers: Answers) -> Iterator[Question]:
        """Yield the questions to the judge: turn 1 of all, then turn 2."""
        for vote in range(1, self._task.votes + 1):
            for turn in range(1, TURNS + 1):
                for q in self._questions:
                    asked = single(self._files, q, turn, answers[q.id], self._reference)
                    row = {"question_id": q.id, "model": model, "judge": [self._judge.name, asked.prompt.name]}
                    row |= {"user_prompt": asked.text, "turn": turn, **self._other_way(vote)}
                    yield Question(asked.prompt.system, row, lambda said: {"score": rating(said)}, vote)

    def _other_way(self, vote: int) -> dict[str, Any]:
        """Return what of a line is not FastChat's: which vote, how warm."""
        task = self._task
        more = {"vote": vote} if vote > 1 else {}
        return more if task.judge_temperature == 0 else {**more, "temperature": task.judge_temperature}

    def _place(self, kind: str) -> Path:
        """Return the file of this judge's judgments."""
        return self._out / "model_judgment" / f"{file_name(self._judge.name)}_{kind}.jsonl"

    def _judged(self, kind: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Return the lines of all judgments; one without an answer ends the run, unless they are counted."""
        place = self._place(kind)
        rows = Court(self._judge, Journal(place)).judge_all(questions)
        self._versions = sorted({row["judge_version"] for row in rows if "judge_version" in row})
        missing = sum(row["judgment"] == UNANSWERED for row in rows)
        if missing and self._task.unanswered == "refuse":
            raise LlameroError(
                f"the judge did not answer {missing} of {len(rows)} questions; the others are kept",
                where=place,
                fix="run this again to ask them, or set `unanswered: count`",
            )
        return rows

    def _rating_notes(self, rows: Sequence[Mapping[str, Any]], found: Scores) -> list[str]:
        missing = sum(row["judgment"] == UNANSWERED for row in rows)
        counts = {
            f"got no answer ({UNANSWERED}); the next run asks again": missing,
            f"held no rating ({NOTHING}) and are left out of the means": found.nothing - missing,
            f"rated outside {LOWEST} to {HIGHEST} and count as they are": found.beyond,
        }
        return [f"MT-Bench: {count} of {len(rows)} judgments {text}" for text, count in counts.items() if count]

    def _picture(self, model: str, found: Scores) -> None:
        """Draw the categories of this model, and of the others that this judge has judged here."""
        name, place = file_name(self._judge.name), self._place("single")
        categories = {q.id: q.category for q in self._questions}
        rated: dict[str, list[Rated]] = {}
        for row in Journal(place).records:
            if row["question_id"] in categories and row["score"] != NOTHING and row["model"] != model:
                rated.setdefault(row["model"], []).append(Rated(row["question_id"], row["turn"], row["score"]))
        drawn = {
            model: found.categories,
            **{other: scores(each, categories).categories for other, each in rated.items()},
        }
        order = [c for c in corpus.CATEGORIES if c in found.categories]
        order += [c for c in found.categories if c not in corpus.CATEGORIES]
        title = f"MT-Bench by category, judged by {self._judge.name}"
        radar(drawn, self._out / f"{name}_radar.png", title, categories=order, highest=HIGHEST)

    # -- pairs

    def _pairwise(self, model: str, answers: Answers) -> Measured:
        task = self._task
        everybody = {model: answers, **{name: said for name, said in self._others.items() if name != model}}
        pairs = list(combinations(everybody, 2))
        if task.judge_mode == "pairwise-baseline":
            pairs = [(model, task.baseline)]
        games = [
            game
            for turn in range(1, TURNS + 1)
            for first, second in pairs
            for q in self._questions
            for game in self._games(q, turn, (first, everybody[first]), (second, everybody[second]))
        ]
        rows = self._judged("games", games)
        matches = [_match(rows[index], rows[index + 1]) for index in range(0, len(rows), 2)]
        self._write_pairs(matches)
        found = records(Match(m["model_1"], m["model_2"], (m["g1_winner"], m["g2_winner"])) for m in matches)
        if model not in found:
            raise LlameroError(
                "no judgment of this model's answers holds a verdict",
                where=self._place("pair"),
                fix="read what the judge says: it must end with [[A]]",
            )
        against = task.baseline if task.judge_mode == "pairwise-baseline" else f"{len(everybody) - 1} models"
        mine = found[model]
        metrics = {
            "win_rate_adjusted": mine.adjusted,
            "win_rate": mine.wins / mine.matches,
            "loss_rate": mine.losses / mine.matches,
            "matches": mine.matches,
        }
        bad = Counter("$" if UNANSWERED in (m["g1_judgment"], m["g2_judgment"]) else "?"
                      for m in matches if "error" in (m["g1_winner"], m["g2_winner"]))  # fmt: skip
        notes = [
            f"MT-Bench: {bad[kind]} of {len(matches)} matches {text}"
            for kind, text in (("$", f"lack an answer ({UNANSWERED}); the next run asks again"),
                               ("?", "hold a verdict that cannot be read and are left out"))
            if bad[kind]
        ]  # fmt: skip
        protocol = (
            f"MT-Bench pairs (FastChat) against {against}, {len(self._questions)} questions, {TURNS} turns, "
            "both orders must agree"
        )
        everyone = {name: {"wins": r.wins, "losses": r.losses, "ties": r.ties} for name, r in found.items()}
        return Measured(metrics, protocol, notes, {"records": everyone})

    def _games(
        self, q: MtBenchRow, turn: int, one: tuple[str, Answers], two: tuple[str, Answers]
    ) -> Iterator[Question]:
        """Yield a match's two games, the second with the answers in the other order."""
        for number, (a, b) in enumerate(((one, two), (two, one)), 1):
            asked = pair(self._files, q, turn, a[1][q.id], b[1][q.id], self._reference)
            row = {"question_id": q.id, "model_1": one[0], "model_2": two[0], "game": number}
            row |= {"judge": [self._judge.name, asked.prompt.name], "user_prompt": asked.text, "turn": turn}
            yield Question(asked.prompt.system, row | self._other_way(1), lambda said: {"winner": verdict(said)})

    def _write_pairs(self, matches: Sequence[dict[str, Any]]) -> None:
        """Write FastChat's file; matches of other models that it holds stay."""
        journal = Journal(self._place("pair"))
        mine = {_slot_of(match) for match in matches}
        others = [record for record in journal.records if _slot_of(record) not in mine]
        journal.rewrite([*others, *matches])


def _slot_of(match: Mapping[str, Any]) -> tuple[Any, ...]:
    return match["question_id"], match["turn"], match["model_1"], match["model_2"]


def _match(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a match in FastChat's form from its two games."""
    names = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
    row: dict[str, Any] = {key: first[key] for key in ("question_id", "model_1", "model_2")}
    for number, (game, who) in enumerate(zip((first, second), names, strict=True), 1):
        row[f"g{number}_winner"] = who.get(game["winner"], game["winner"])
    row["judge"] = first["judge"]
    for number, game in enumerate((first, second), 1):
        row |= {f"g{number}_user_prompt": game["user_prompt"], f"g{number}_judgment": game["judgment"]}
    return {**row, "turn": first["turn"], "tstamp": max(first["tstamp"], second["tstamp"])}


def _metrics(found: Scores) -> dict[str, float]:
    metrics = {"score": found.overall, **{f"turn_{turn}": mean for turn, mean in found.turns.items()}}
    metrics["mean_of_turns"] = found.mean_of_turns
    if found.spread is not None:
        metrics["spread"] = found.spread
    return metrics | {f"score/{category}": mean for category, mean in found.categories.items()}


def _sampling(directory: Path, task: MtBenchTask) -> Sampling:
    """Return how tokens are chosen, temperatures apart: as transformers' `generate` does for FastChat.

    What a model's generation_config.json says holds there, and where that names no `top_k`, its default does.
    """
    found = sampling_of(directory, {"temperature": 0.0}, max_new_tokens=task.max_new_tokens, seed=task.seed)
    return replace(found, top_k=found.top_k or TOP_K)


def _fingerprint(directory: Path) -> str:
    """Return what tells models apart without reading their weights: names, sizes and times of their files."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    kinds = {".safetensors", ".gguf", ".json", ".bin", ".pth"}
    stats = [(path.name, path.stat()) for path in paths if path.suffix in kinds and path.is_file()]
    return files.digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def _refuse_other_turns(questions: Sequence[MtBenchRow]) -> None:
    for question in questions:
        if len(question.turns) != TURNS:
            raise LlameroError(
                f"question {question.id} has {len(question.turns)} turns, MT-Bench's have {TURNS}",
                where=corpus.QUESTIONS,
                fix="give MT-Bench's questions",
            )


def _others(directory: Path, questions: Sequence[MtBenchRow]) -> dict[str, Answers]:
    """Return the answers of other models, by name."""
    paths = [directory] if directory.is_file() else sorted(directory.glob("*.jsonl"))
    found = {path.stem: corpus.answers(path) for path in paths}
    if not found:
        raise LlameroError(
            "no answers in it", where=directory, fix="give a file of FastChat's model_answer/, or that directory"
        )
    for name, said in found.items():
        missing = [q.id for q in questions if len(said.get(q.id, ())) < TURNS]
        if missing:
            raise LlameroError(
                f"{name} did not answer question {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                where=directory,
                fix="give answers to every question, two turns each",
            )
    return found
