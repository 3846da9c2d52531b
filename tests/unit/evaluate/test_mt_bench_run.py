"""MT-Bench from a small model to its scores, before a judge on this machine that behaves in every way."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chat_server import chat, serving
from llamero.core import journal
from llamero.core.errors import LlameroError
from llamero.evaluate import judge as judging
from llamero.evaluate import mt_bench_answers, mt_bench_run
from llamero.evaluate.config import named
from llamero.evaluate.run import run
from llamero.infer.backends import openai
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import save_model
from llamero.model.rope import Default
from llamero.text.tokenizer import train_bpe

CONTEXT = 256
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the cat sat", "on the mat"]},
    {"question_id": 101, "category": "reasoning", "turns": ["why", "and why not"]},
    {"question_id": 141, "category": "stem", "turns": ["what is water", "say it again"]},
]
SINGLE = {"type": "single", "output_format": "[[rating]]", "system_prompt": "Judge."}
PAIR = {"type": "pairwise", "output_format": "[[A]]", "system_prompt": "Compare."}
BOTH = "{question_1}{answer_a_1}{answer_b_1}{question_2}|{answer_a_2}|{answer_b_2}"
PROMPTS = {
    "single-v1": {**SINGLE, "prompt_template": "<1> {question}|{answer}"},
    "single-math-v1": {**SINGLE, "prompt_template": "<1> {question}|{answer}|{ref_answer_1}"},
    "single-v1-multi-turn": {**SINGLE, "prompt_template": "<2> {question_1}|{answer_1}|{question_2}|{answer_2}"},
    "single-math-v1-multi-turn": {**SINGLE, "prompt_template": "<2> {question_2}|{answer_2}|{ref_answer_2}"},
    "pair-v2": {**PAIR, "prompt_template": "<1> {question}|{answer_a}|{answer_b}"},
    "pair-math-v1": {**PAIR, "prompt_template": "<1> {question}|{answer_a}|{answer_b}|{ref_answer_1}"},
    "pair-v2-multi-turn": {**PAIR, "prompt_template": "<2> " + BOTH},
    "pair-math-v1-multi-turn": {**PAIR, "prompt_template": "<2> {ref_answer_2}" + BOTH},
}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(model, turns):
    return [
        {
            "question_id": q["question_id"],
            "answer_id": "x",
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
        }
        for q in QUESTIONS
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write(root / "judge_prompts.jsonl", [{"name": name, **prompt} for name, prompt in PROMPTS.items()])
    write(root / "mt_bench" / "question.jsonl", QUESTIONS)
    write(root / "mt_bench" / "reference_answer" / "gpt-4.jsonl", answers("gpt-4", ["because", "why"]))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models") / "small"
    root.mkdir()
    tokenizer = train_bpe(
        iter(["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3), vocab_size=290
    )
    net = Llama(LlamaConfig(290, 32, 48, 1, 2, 2, 16, Default(10000.0, 16), CONTEXT)).eval()
    initialize(net, seed=0, std=0.3)
    save_model(net, root)
    tokenizer.save(root)
    return root


@pytest.fixture
def server():
    with serving() as served:
        served.answer = lambda body: chat("fine. Rating: [[7]]")
        yield served


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai.Endpoint, "pause", lambda self, seconds: None, raising=False)


@pytest.fixture
def drawn(monkeypatch):
    """Return what would be drawn."""
    pictures = []
    monkeypatch.setattr(mt_bench_run, "radar", lambda *models, **_: pictures.append(models[0]))
    return pictures


@pytest.fixture
def measure(model, data, server, tmp_path, drawn):
    """Run the task into `tmp_path / "out"`: `measure(limit=2)`."""

    def measured(*, model=model, out=tmp_path / "out", **keys):
        how = {"judge": server.url, "judge_model": "judge", "data": str(data), "max_new_tokens": 12, **keys}
        (result,) = run(named("mt_bench", how), model=model, name="small", template="vicuna", root=tmp_path, work=out)
        return result

    return measured


def test_answers_judgments_and_scores(measure, server, tmp_path, drawn):
    ratings = {("<1>", "the cat"): 8, ("<2>", "the cat"): 4, ("<1>", "why"): 9.5, ("<2>", "and why"): 1}
    ratings |= {("<1>", "what"): 10, ("<2>", "what"): 6}

    def answer(body):
        said = body["messages"][1]["content"]
        return chat(
            next(f"so [[{score}]]" for (turn, start), score in ratings.items() if said.startswith(f"{turn} {start}"))
        )

    server.answer = answer
    result = measure()
    assert result.task == "mt_bench"
    assert result.metrics["score"] == (8 + 4 + 9.5 + 1 + 10 + 6) / 6
    assert (result.metrics["turn_1"], result.metrics["turn_2"]) == (27.5 / 3, 11 / 3)
    assert result.metrics["mean_of_turns"] == (27.5 / 3 + 11 / 3) / 2
    assert (result.metrics["score/writing"], result.metrics["score/reasoning"]) == (6, 5.25)
    assert "judge judge" in result.protocol
    assert result.inputs["judge"] == {"name": "judge", "what": f"judge at {server.url}", "versions": []}
    assert server.url not in result.protocol  # cards print it
    assert {body["temperature"] for body in server.requests} == {0}
    assert {body["max_tokens"] for body in server.requests} == {2048}
    assert {body["messages"][0]["content"] for body in server.requests} == {"Judge."}

    said = lines(tmp_path / "out" / "model_answer" / "small.jsonl")
    assert [row["question_id"] for row in said] == [81, 101, 141]
    assert set(said[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert all(len(row["choices"][0]["turns"]) == 2 for row in said)
    judged = lines(tmp_path / "out" / "model_judgment" / "judge_single.jsonl")
    assert len(judged) == 6
    keys = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert all(set(row) == keys for row in judged)
    assert {tuple(row["judge"]) for row in judged} >= {("judge", "single-v1"), ("judge", "single-math-v1-multi-turn")}
    first = said[0]["choices"][0]["turns"][0]
    assert f"<1> the cat sat|{first}" in {row["user_prompt"] for row in judged}
    assert drawn == [{"small": {"writing": 6, "reasoning": 5.25, "stem": 8}}]


def test_fastchats_own_reading_of_the_file_gives_the_same_scores(measure, server, tmp_path):
    pandas = pytest.importorskip("pandas")
    count = iter(range(100))
    lock = threading.Lock()

    def answer(body):
        with lock:
            number = next(count)
        return chat("nothing to say" if number == 3 else f"[[{number + 1}]]")

    server.answer = answer
    result = measure()
    frame = pandas.read_json(tmp_path / "out" / "model_judgment" / "judge_single.jsonl", lines=True)
    frame = frame[["model", "score", "turn"]]
    frame = frame[frame["score"] != -1]
    assert frame[["model", "score"]].groupby(["model"]).mean()["score"]["small"] == pytest.approx(
        result.metrics["score"]
    )
    by_turn = frame.groupby(["model", "turn"]).mean()["score"]
    assert by_turn["small", 1] == pytest.approx(result.metrics["turn_1"])
    assert by_turn["small", 2] == pytest.approx(result.metrics["turn_2"])
    assert result.notes[-1] == "MT-Bench: 1 of 6 judgments held no rating (-1) and are left out of the means"


def test_which_model_the_judge_was_is_kept(measure, server, tmp_path):
    def answer(body):
        _, headers, said = chat("[[5]]")
        return 200, headers, json.dumps({**json.loads(said), "model": "judge-0613"}).encode()

    server.answer = answer
    result = measure()
    assert result.protocol.endswith("; judge judge (judge-0613)")
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    assert {row["judge_version"] for row in lines(path)} == {"judge-0613"}
    assert measure() == result
    assert len(server.requests) == 6


def test_a_second_run_asks_nothing(measure, server, monkeypatch):
    first = measure()
    asked = len(server.requests)
    monkeypatch.setattr(mt_bench_answers, "replies", lambda *_, **__: pytest.fail("asked again") if _[2] else iter(()))
    assert measure() == first
    assert len(server.requests) == asked == 6


class Killed(BaseException):
    """A kill -9, as far as files can tell."""


@pytest.mark.parametrize("after", [0, 3, 7, 9])
def test_a_run_that_is_killed_goes_on_where_it_was(measure, server, tmp_path, monkeypatch, after):
    whole = measure(out=tmp_path / "whole", judge_threads=1)
    server.requests.clear()
    write, written = journal.Journal.append, []

    def append(self, record):
        if len(written) == after:  # half a line, and the end
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode()[:-9])
            raise Killed
        write(self, record)
        written.append(record)

    monkeypatch.setattr(journal.Journal, "append", append)
    with pytest.raises(Killed):
        measure(judge_threads=1)
    monkeypatch.setattr(journal.Journal, "append", write)
    assert measure(judge_threads=1) == whole
    paths = [Path("model_answer", "small.jsonl"), Path("model_judgment", "judge_single.jsonl")]
    for path in paths:
        strip = lambda row: {key: value for key, value in row.items() if key != "tstamp"}  # noqa: E731
        assert [strip(row) for row in lines(tmp_path / "out" / path)] == [
            strip(row) for row in lines(tmp_path / "whole" / path)
        ]
    lost = 1 if after >= 7 else 0  # the settings and six answers are written before the first judgment, which was lost
    assert len(server.requests) == 6 + lost


def test_answers_do_not_depend_on_what_else_is_asked(measure, tmp_path):
    measure()
    measure(limit=1, out=tmp_path / "one")
    everything = lines(tmp_path / "out" / "model_answer" / "small.jsonl")
    assert lines(tmp_path / "one" / "model_answer" / "small.jsonl")[0]["choices"] == everything[0]["choices"]


def test_more_questions_are_added_to_fewer(measure, server):
    measure(limit=1)
    measure()
    assert len(server.requests) == 6


def test_questions_are_drawn_with_their_own_seeds(measure, tmp_path):
    for seed in (0, 1):
        measure(seed=seed, out=tmp_path / str(seed))
    said = [lines(tmp_path / name / "model_answer" / "small.jsonl") for name in "01"]
    assert said[0][0]["choices"] != said[1][0]["choices"]  # writing is drawn
    assert said[0][1]["choices"] == said[1][1]["choices"]  # reasoning is greedy


def test_answers_made_otherwise_are_not_mixed(measure, tmp_path):
    measure()
    with pytest.raises(LlameroError, match=r"made otherwise \(seed\)"):
        measure(seed=3)
    (tmp_path / "out" / "model_answer" / "small.turns").unlink()
    with pytest.raises(LlameroError, match="not how they were made"):
        measure()


def test_judgments_of_other_answers_are_replaced_and_other_models_stay(measure, server, tmp_path):
    measure(limit=1)
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    old = [{**row, "user_prompt": "of another answer", "score": 1} for row in lines(path)]
    other = [{**row, "model": "other"} for row in lines(path)]
    write(path, [*old, *other])
    assert measure(limit=1).metrics["score"] == 7
    assert sorted((row["model"], row["turn"], row["score"]) for row in lines(path)) == [
        ("other", 1, 7), ("other", 2, 7), ("small", 1, 7), ("small", 2, 7)
    ]  # fmt: skip
    assert len(server.requests) == 4


def test_a_judge_that_is_busy_now_and_then_is_no_trouble(measure, server):
    seen = set()

    def answer(body):
        text = body["messages"][1]["content"]
        if text in seen:
            return chat("[[5]]")
        seen.add(text)
        return 429, {"Retry-After": "0"}, b"slow down"

    server.answer = answer
    result = measure()
    assert result.metrics["score"] == 5
    assert not any("judgments" in note for note in result.notes)


def refuse_why(body):
    if "why" in body["messages"][1]["content"]:
        return 400, {}, b"not this one"
    return chat("[[5]]")


def test_what_the_judge_does_not_answer_is_counted_and_asked_again(measure, server, tmp_path):
    server.answer = refuse_why
    with pytest.raises(LlameroError, match="did not answer 2 of 6 questions"):
        measure()
    result = measure(unanswered="count")
    assert result.metrics["score"] == 5
    assert "MT-Bench: 2 of 6 judgments got no answer ($ERROR$); the next run asks again" in result.notes
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    assert sorted(row["score"] for row in lines(path)) == [-1, -1, 5, 5, 5, 5]
    server.answer = lambda body: chat("[[8]]")
    assert measure().metrics["score"] == 6
    assert sorted(row["score"] for row in lines(path)) == [5, 5, 5, 5, 8, 8]


def test_a_judge_that_is_gone_ends_the_run(measure, server, monkeypatch):
    monkeypatch.setattr(judging, "PATIENCE", 3)
    server.answer = lambda body: (400, {}, b"out of order")
    with pytest.raises(LlameroError, match="left 3 questions in a row unanswered; HTTP 400: out of order"):
        measure(judge_threads=1)


def test_a_judge_that_refuses_everybody_ends_the_run_at_once(measure, server):
    server.answer = lambda body: (401, {}, b"who are you?")
    with pytest.raises(LlameroError, match="HTTP 401: who are you"):
        measure(judge_threads=1)
    assert len(server.requests) == 1


def test_several_votes_have_a_spread(measure, server, tmp_path):
    count = iter(range(1000))
    server.answer = lambda body: chat(f"[[{[6, 7, 8][next(count) // 6]}]]")
    result = measure(votes=3, judge_temperature=0.5, judge_threads=1)
    assert (result.metrics["score"], result.metrics["spread"]) == (7, 1)
    assert "mean of 3 votes at temperature 0.5" in result.protocol
    assert len(lines(tmp_path / "out" / "model_judgment" / "judge_single.jsonl")) == len(server.requests) == 18
    measure(votes=3, judge_temperature=0.5)
    assert len(server.requests) == 18


def test_a_local_model_judges_too(measure, model, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "JUDGE_TOKENS", 8)
    with pytest.raises(LlameroError, match="none of 3 judgments of turn 1 holds a rating"):
        measure(judge=str(model), judge_model=None, judge_template="vicuna")  # it babbles
    assert len(lines(tmp_path / "out" / "model_judgment" / "small_single.jsonl")) == 6


def test_a_local_judge_without_a_template_is_said_before_anything_is_asked(measure, model, tmp_path):
    with pytest.raises(LlameroError, match=r"judge .*small: `auto` is the model's own.*\n.*judge_template"):
        measure(judge=str(model), judge_model=None)
    assert not (tmp_path / "out").exists()


def test_a_question_without_room_for_an_answer_is_counted(measure, model, data, tmp_path):
    long = tmp_path / "long"
    write(long / "judge_prompts.jsonl", lines(data / "judge_prompts.jsonl"))
    question = {"question_id": 81, "category": "writing", "turns": ["the cat", "sat " * CONTEXT]}
    write(long / "mt_bench" / "question.jsonl", [question])
    write(long / "mt_bench" / "reference_answer" / "gpt-4.jsonl", answers("gpt-4", ["a", "b"]))
    result = measure(data=str(long))
    assert any("1 of 2 questions left no room" in note for note in result.notes)
    assert lines(tmp_path / "out" / "model_answer" / "small.jsonl")[0]["choices"][0]["turns"][1] == "ERROR"


def test_an_empty_first_answer_is_counted(measure, monkeypatch):
    monkeypatch.setattr(
        mt_bench_answers,
        "replies",
        lambda model, tokenizer, asked, template: (
            (number, mt_bench_answers.Reply("", 0, "stop")) for number in range(len(asked))
        ),
    )
    assert any("3 of 6 second questions were not asked" in note for note in measure().notes)


# -- pairs


@pytest.fixture
def others(tmp_path):
    for name in ("gpt-3.5-turbo", "third"):
        write(tmp_path / "others" / f"{name}.jsonl", answers(name, [f"{name} one", f"{name} two"]))
    return str(tmp_path / "others")


def prefer(*order):
    """Answer as a judge who likes the answers of `order`, the first one best; small's hold none of these names."""

    def answer(body):
        _, a, b = re.split(r"\|", body["messages"][1]["content"])[:3]
        rank = lambda text: next((n for n, name in enumerate(order) if name in text), len(order))  # noqa: E731
        return chat("[[A]]" if rank(a) < rank(b) else "[[B]]")

    return answer


def test_a_win_must_hold_in_both_orders(measure, server, others, tmp_path):
    server.answer = prefer("gpt-3.5-turbo")
    result = measure(judge_mode="pairwise-baseline", answers=others)
    assert result.task == "mt_bench_pairs"
    assert (result.metrics["win_rate"], result.metrics["loss_rate"], result.metrics["matches"]) == (0, 1, 6)
    assert len(server.requests) == 12
    rows = lines(tmp_path / "out" / "model_judgment" / "judge_pair.jsonl")
    assert {(r["model_1"], r["model_2"], r["g1_winner"], r["g2_winner"]) for r in rows} == {
        ("small", "gpt-3.5-turbo", "model_2", "model_2")
    }
    keys = {"g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment", "question_id", "turn", "judge", "tstamp"}
    assert set(rows[0]) == keys | {"model_1", "model_2", "g1_winner", "g2_winner"}
    assert measure(judge_mode="pairwise-baseline", answers=others).metrics == result.metrics
    assert len(server.requests) == 12


def test_fastchats_own_reading_of_pairs_gives_the_same_rates(measure, server, others, tmp_path):
    pandas = pytest.importorskip("pandas")
    verdicts = {
        "sat": ["[[A]]", "[[B]]"],
        "why": ["[[C]]", "[[A]]"],
        "water": ["[[B]]", "[[B]]"],
        "again": ["[[B]]", "?"],
    }

    def answer(body):
        said = body["messages"][1]["content"]
        theme = next((theme for theme in ("again", *verdicts) if theme in said), "sat")
        return chat(verdicts[theme][said.index("|gpt-3.5") == said.index("|")])

    server.answer = answer
    result = measure(judge_mode="pairwise-baseline", answers=others)
    frame = pandas.read_json(tmp_path / "out" / "model_judgment" / "judge_pair.jsonl", lines=True)
    frame = frame[(frame["g1_winner"] != "error") & (frame["g2_winner"] != "error")]
    tie = (frame["g1_winner"] == "tie") | (frame["g1_winner"] != frame["g2_winner"])
    win, loss = ~tie & (frame["g1_winner"] == "model_1"), ~tie & (frame["g1_winner"] == "model_2")
    assert result.metrics["matches"] == len(frame) < 6
    assert result.metrics["win_rate"] == pytest.approx(win.mean())
    assert result.metrics["loss_rate"] == pytest.approx(loss.mean())
    assert result.metrics["win_rate_adjusted"] == pytest.approx((win + 0.5 * tie).mean())
    assert win.any()


def test_a_judge_that_likes_the_first_answer_sees_ties(measure, server, others):
    server.answer = lambda body: chat("[[A]]")
    result = measure(judge_mode="pairwise-baseline", answers=others)
    assert (result.metrics["win_rate"], result.metrics["win_rate_adjusted"]) == (0, 0.5)


def test_all_pairs(measure, server, others):
    server.answer = prefer("third", "gpt-3.5-turbo")
    result = measure(judge_mode="pairwise-all", answers=others)
    assert len(server.requests) == 3 * 3 * 2 * 2
    assert result.inputs["records"] == {
        "small": {"wins": 0, "losses": 12, "ties": 0},
        "gpt-3.5-turbo": {"wins": 6, "losses": 6, "ties": 0},
        "third": {"wins": 12, "losses": 0, "ties": 0},
    }


def test_a_verdict_that_cannot_be_read_is_counted(measure, server, others):
    good = prefer("gpt-3.5-turbo")
    server.answer = lambda body: chat("hm") if "water" in body["messages"][1]["content"] else good(body)
    result = measure(judge_mode="pairwise-baseline", answers=others)
    assert result.metrics["matches"] == 4
    assert "MT-Bench: 2 of 6 matches hold a verdict that cannot be read and are left out" in result.notes


def test_a_baseline_without_answers_is_an_error(measure, others):
    with pytest.raises(LlameroError, match="no answers of the baseline `gpt-3`"):
        measure(judge_mode="pairwise-baseline", answers=others, baseline="gpt-3")


# -- a real kill

WORKER = """
import sys
from llamero.cli import app

app(sys.argv[1:], result_action="return_value")
"""


@pytest.mark.slow
def test_a_killed_process_asks_again_only_what_was_under_way(model, data, server, tmp_path):
    enough = threading.Event()

    def answer(body):
        if len(server.requests) >= 4:
            enough.set()
        return chat("[[7]]")

    server.answer = answer
    options = ["evaluate", model, "--tasks", "mt_bench", "--judge", server.url, "--judge-model", "judge"]
    options += ["--data", data, "--template", "vicuna", "--max-new-tokens", 12, "--out", tmp_path / "out"]
    command = [sys.executable, "-c", WORKER, *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        assert enough.wait(300)
        process.kill()
    kept = lines_that_are_whole(tmp_path / "out" / "model_judgment" / "judge_single.jsonl")
    before = len(server.requests)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "7.00000" in done.stdout
    assert len(server.requests) - before == 6 - kept
    rows = lines(tmp_path / "out" / "model_judgment" / "judge_single.jsonl")
    assert len({(row["question_id"], row["turn"]) for row in rows}) == len(rows) == 6


def lines_that_are_whole(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- what a task may say


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"judge": "http://localhost/v1"}, "give `judge_model`"),
        ({"answers": "x"}, "set `judge_mode`"),
        ({"judge_mode": "pairwise-all"}, "needs `answers`"),
        ({"judge_key_variable": "sk-abc def"}, "judge_key_variable"),
        ({"judge_mode": "pairwise-all", "answers": "x", "votes": 2}, "several `votes`"),
    ],
)
def test_what_does_not_fit_together_is_refused(keys, problem):
    with pytest.raises(LlameroError, match=problem):
        named("mt_bench", keys)


def test_a_missing_key_is_said_before_the_model_is_loaded(tmp_path):
    with pytest.raises(LlameroError, match="OPENAI_API_KEY is empty"):
        run(named("mt_bench", {}), model=tmp_path / "none", name="x", template="auto", root=tmp_path)


def test_only_the_first_process_asks(monkeypatch, measure):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LlameroError, match="runs in one process"):
        measure()


def test_files_that_are_missing_are_said_before_the_model_is_loaded(tmp_path):
    task = named("mt_bench", {"judge": "http://localhost:1/v1", "judge_model": "x", "data": "nowhere"})
    with pytest.raises(LlameroError, match="no such file of MT-Bench"):
        run(task, model=tmp_path / "none", name="x", template="auto", root=tmp_path)


def test_how_the_judge_is_reached_does_not_decide_the_result():
    one = named("mt_bench", {"judge_threads": 3, "data": "a", "judge": "./judge"})
    two = named("mt_bench", {"judge_key_variable": "KEY", "data": "b", "judge": "/else/where/judge"})
    assert one.decides() == two.decides()
    assert one.files == {"data": "a", "judge": "./judge"}
    assert named("mt_bench", {"judge": "gpt-4o"}).decides() != named("mt_bench", {}).decides()


def test_models_are_named_as_files_can_be(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    found = [judging.file_name(str(each)) for each in ("owner/name", "gpt-4", tmp_path / "model.gguf", "a:b c")]
    assert found == ["owner--name", "gpt-4", "model.gguf", "a--b--c"]
