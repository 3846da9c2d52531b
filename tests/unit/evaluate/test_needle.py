"""Needles lie where they should, and an answer is right only if each of its tokens is the likeliest."""

import json
import os
from pathlib import Path

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.evaluate import needle
from llamero.evaluate.config import NeedleTask, named
from llamero.evaluate.needle import Cell, cells, judge, periods, place
from llamero.evaluate.run import run
from llamero.infer.engine import OwnEngine
from llamero.infer.generate import Completion
from llamero.infer.score import Scored
from llamero.model.load import load_model
from llamero.text.tokenizer import load_tokenizer

DATA = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"


@pytest.fixture(scope="module")
def directory():
    path = DATA / "weights" / "ref-7m-hf"
    if not path.is_dir():
        pytest.skip(f"no model at {path} (set LLAMERO_SHARED)")
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture
def task(tmp_path):
    (tmp_path / "hay").mkdir()
    for name, text in (("b.txt", "The dog ran. "), ("a.txt", "A cat sat on the mat. It slept. ")):
        (tmp_path / "hay" / name).write_text(text)
    keys = {"haystack": str(tmp_path / "hay"), "to": 60, "shortest": 20, "interval": 20, "steps": 2, "num_samples": 3}
    return NeedleTask.model_validate({"tasks": "needle", **keys})


def test_a_needle_goes_to_the_end_of_a_sentence():
    ends = frozenset([9])
    assert place([1, 2, 9, 4, 5, 9, 7], 0.0, ends) == 0
    assert place([1, 2, 9, 4, 5, 9, 7], 0.2, ends) == 3
    assert place([1, 2, 9, 4, 5, 9, 7], 0.5, ends) == 6
    assert place([1, 2, 9, 4, 5, 9, 7], 0.9, ends) == 6  # no sentence ends after it
    assert place([1, 2, 9, 4, 5, 9, 7], 1.0, ends) == 7


def test_the_grid_is_told_and_asked(task, tokenizer):
    text = needle.read_haystack(Path(task.haystack), tokenizer, None)
    whole = tokenizer.decode(text)
    assert whole == "A cat sat on the mat. It slept. The dog ran. "  # files by name
    found = list(cells(task, tokenizer, text))
    assert [(each.length, each.depth) for each in found[::3]] == [(n, d) for n in (20, 40, 60) for d in (0, 0.5, 1)]
    assert len({each.number for each in found}) == 3
    for each in found:
        said = tokenizer.decode(each.prompt)
        assert said.startswith("This is a very long story book: <book>")
        assert said.count(f"\nThe special magic Singapore number is: {each.number}.\n") == 1
        assert said.endswith("The special magic Singapore number is:")
        assert tokenizer.decode(each.answer) == str(each.number)
        told = needle.NEEDLE.format(number=each.number)
        around = len(tokenizer.encode(needle.BEFORE + told + needle.QUESTION))
        assert abs(len(each.prompt) - around - each.length) <= 3
        before, after = said.split(told)
        if 0 < each.depth < 1:
            assert before.rstrip().endswith(".")
        assert after.endswith(needle.QUESTION)
    spaced = next(cells(task.model_copy(update={"space": True}), tokenizer, text))
    assert tokenizer.decode(spaced.prompt).endswith("number is: ")


def test_a_period_is_one_with_or_without_a_space(tokenizer):
    assert {tokenizer.decode([id]).strip() for id in periods(tokenizer)} == {"."}


@torch.inference_mode()
def test_right_is_the_likeliest_token_at_every_place(directory, tokenizer):
    """Against whole forward passes: of the model's own favourites and of answers with one other token."""
    model = load_model(directory, dtype=torch.float32)
    prompt = tokenizer.encode("The tower is one of the most")
    own: list[int] = []
    for _ in range(4):
        own.append(int(model(torch.tensor([[*prompt, *own]]))[0, -1].argmax()))
    answers = [own, [*own[:3], (own[3] + 1) % 4096], [(own[0] + 1) % 4096, *own[1:]]]
    found = judge(OwnEngine(model, tokenizer), [Cell(0, 0, 0, prompt, answer) for answer in answers], freely=False)
    for answer, each in zip(answers, found, strict=True):
        logits = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
        at = [len(prompt) - 1 + i for i in range(4)]
        assert each.forced == (logits[at].argmax(-1).tolist() == answer)
        assert abs(each.log_likelihood - float(logits[at, answer].sum())) < 1e-3
        assert each.said is None
    assert [each.forced for each in found] == [True, False, False]


class Sees:
    """An engine that finds needles in the first half of a haystack."""

    context = 1000

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, 0

    def score(self, requests, *, max_length=None, softmax="float32"):
        self.asked += len(requests)
        return [Scored(-1.0, self._early(prompt), len(answer)) for prompt, answer in requests]

    def generate(self, prompts, sampling):
        (prompt,) = prompts
        said = self.tokenizer.decode(prompt)
        number = said.split("number is: ")[1].split(".")[0]
        return [Completion((), f" It is {number}, of course" if self._early(prompt) else " 12", "length")]

    def _early(self, prompt):
        said = self.tokenizer.decode(prompt)
        return said.index("The special") < len(said) / 2.5

    def describe(self):
        return {"engine": "sees", "dtype": "float32"}


def measured(monkeypatch, directory, engine, task, work):
    monkeypatch.setattr("llamero.evaluate.run.OwnEngine", lambda model, tokenizer, **_: engine)
    (result,) = run(task, model=directory, name="m", template="auto", root=Path("/"), work=work)
    return result


def test_a_grid_is_measured_by_length_and_depth(directory, tokenizer, task, tmp_path, monkeypatch):
    engine = Sees(tokenizer)
    task = task.model_copy(update={"freely": True})
    result = measured(monkeypatch, directory, engine, task, tmp_path)
    assert result.inputs["grid"]["60"][0] == 1
    assert result.inputs["grid"]["60"][2] == 0
    cells_of = [value for row in result.inputs["grid"].values() for value in row]
    assert result.metrics["accuracy"] == result.metrics["contained"] == sum(cells_of) / len(cells_of)
    assert set(result.metrics) == {"accuracy", "contained", "accuracy/20", "accuracy/40", "accuracy/60"}
    assert "times in the longest" in result.protocol
    assert engine.asked == 27
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 28
    again = measured(monkeypatch, directory, engine, task, tmp_path)
    assert (again.metrics, engine.asked) == (result.metrics, 27)
    assert json.loads(json.dumps(result.inputs))["depths"] == [0, 0.5, 1]


def test_a_real_model_can_be_asked(directory, task):
    (result,) = run(
        task.model_copy(update={"num_samples": 1}), model=directory, name="m", template="auto", root=Path("/")
    )
    assert result.metrics["accuracy"] == 0  # 7 million parameters


def test_what_cannot_be_asked_is_refused(directory, tokenizer, task, tmp_path):
    long = task.model_copy(update={"to": 1020, "interval": 500})
    with pytest.raises(LlameroError, match="the model's context is 1024"):
        run(long, model=directory, name="m", template="auto", root=Path("/"))
    with pytest.raises(LlameroError, match="is missing"):
        needle.read_haystack(tmp_path / "absent", tokenizer, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlameroError, match="is empty"):
        needle.read_haystack(tmp_path / "empty", tokenizer, None)
    with pytest.raises(LlameroError, match="`distinct` asks for 9999"):
        needle.read_haystack(Path(task.haystack), tokenizer, 9999)
    assert len(needle.read_haystack(Path(task.haystack), tokenizer, 5)) == 5
    with pytest.raises(LlameroError, match="--haystack FILE --to TOKENS"):
        named("needle", {})
    with pytest.raises(LlameroError, match="below `shortest`"):
        named("needle", {"haystack": "h", "to": 50})
