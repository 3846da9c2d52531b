"""Every sample is written down: a run that was cut off goes on, and two runs are compared sample by sample."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from llamero.cli import app, main
from llamero.core.errors import LlameroError
from llamero.evaluate import ask, diff, tokens
from llamero.evaluate.config import H4Task, named
from llamero.evaluate.per_sample import FILE, Key, SampleFile
from llamero.evaluate.subject import Subject
from llamero.infer.engine import OwnEngine
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default
from llamero.text.tokenizer import train_bpe

WORDS = "Question: Q0? Answer: he is x yy The following are multiple choice questions yes no A B C D L: A."


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([WORDS] * 3), vocab_size=290)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=Default(10000.0, 8),
        max_position_embeddings=256,
    )
    model = Llama(config).eval()
    initialize(model, seed=0, std=0.3)
    return model


class Counting(OwnEngine):
    """Counts what it is asked, and stops in the middle if told."""

    asked = 0
    patience = 10**9

    def score(self, requests, **options):
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        self.asked += len(requests)
        return super().score(requests, **options)


@pytest.fixture
def subject(model, tokenizer, small, tmp_path):
    engine = Counting(model, tokenizer)
    return Subject("tiny", engine, tokenizer, "auto", small, None, {}, tmp_path, tmp_path / "out")


def measured(subject, **keys):
    task = named("h4", {"data": ".", **keys})
    assert isinstance(task, H4Task)
    with torch.inference_mode():
        return ask.run(task, subject)


def rows(subject):
    return [json.loads(line) for line in (subject.work / FILE).read_text().splitlines()]


def test_every_request_has_its_line_and_results_say_what_moves_scores(subject):
    found = {result.task: result for result in measured(subject)}
    about, *samples = rows(subject)
    assert len(samples) == subject.engine.asked == 2 * (2 + 4 + 4 + 4 + 4)
    keys = "task doc choice prompt context_tokens tokens log_likelihood greedy truncated scores"
    assert list(samples[0]) == keys.split()
    assert about["compat"] == "leaderboard-2023"
    assert about["bos"] is False
    arc = found["arc_challenge"]
    inside = [row for row in samples if row["task"] == "arc_challenge"]
    cut = [row["truncated"] for row in inside if row["truncated"]]
    assert len(cut) == 4  # 25 examples do not fit into 256 tokens
    assert arc.inputs["measured"]["truncated"] == {"requests": 4, "tokens": sum(cut)}
    assert all(row["context_tokens"] + len(row["tokens"]) - 1 == 256 for row in inside)
    assert "arc_challenge: 4 requests were longer than the context and lost their beginning" in arc.notes
    assert arc.inputs["how"]["mmlu"] == "plain mean over subjects"
    assert set(found) == {"arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc", "h4"}


def test_bos_and_averaging_are_those_of_the_protocol(subject):
    assert subject.tokenizer.add_bos
    found = measured(subject, compat="lm-eval")
    assert found[0].inputs["how"]["bos"] is True
    assert found[0].inputs["how"]["mmlu"] == "mean over questions"
    assert "h4: lm-eval itself gives no mean of the four" in found[-1].notes


def test_a_run_that_was_cut_off_goes_on_and_ends_in_the_same_bytes(subject, monkeypatch):
    monkeypatch.setattr(ask, "CHUNK_TOKENS", 1)  # a question at a time
    whole = measured(subject)
    straight, asked = (subject.work / FILE).read_bytes(), subject.engine.asked
    (subject.work / FILE).unlink()
    subject.engine.asked, subject.engine.patience = 0, 4
    with pytest.raises(KeyboardInterrupt):
        measured(subject)
    written = (subject.work / FILE).read_bytes()
    (subject.work / FILE).write_bytes(written[:-10])  # in the middle of a line
    subject.engine.patience = 10**9
    assert measured(subject) == whole
    assert (subject.work / FILE).read_bytes() == straight
    assert asked < subject.engine.asked <= asked + 4  # the last question again, nothing else
    subject.engine.asked = 0
    assert measured(subject) == whole
    assert subject.engine.asked == 0


def test_who_does_not_write_reads_what_who_writes_reads(subject):
    measured(subject, limit=1)
    file = subject.work / FILE
    whole = file.read_bytes()
    for cut, known in ((0, True), (1, True), (5, False)):  # whole, without the end of its line, half a line
        file.write_bytes(whole[: len(whole) - cut])
        last = [Key("truthfulqa_mc", 0, 3)]
        reader = SampleFile(file, writes=False)
        assert file.read_bytes() == whole[: len(whole) - cut]
        writer = SampleFile(file)
        assert (reader.known(last) is not None) is (writer.known(last) is not None) is known


def test_samples_of_something_else_are_not_gone_on_with(subject):
    measured(subject, limit=1)
    with pytest.raises(LlameroError, match="another `requests`"):
        measured(subject, limit=2)


def test_samples_of_other_weights_are_not_taken_for_those_of_the_model(subject):
    """A model that was trained on in its place must be asked again, not given its old scores."""
    measured(subject, limit=1)
    trained_on = copy.deepcopy(subject.model)
    with torch.no_grad():
        trained_on.model.norm.weight.mul_(1.01)
    again = replace(subject, engine=Counting(trained_on, subject.tokenizer))
    with pytest.raises(LlameroError, match="another `engine`") as refused:
        measured(again, limit=1)
    assert "--out" in str(refused.value.fix)


def test_an_error_names_the_sample(subject, monkeypatch):
    def broken(self, requests, **_):
        raise LlameroError("NaN among the logits", where="request 3")

    monkeypatch.setattr(Counting, "score", broken)
    with pytest.raises(LlameroError, match="arc_challenge, document 1, choice 1: NaN among the logits"):
        measured(subject)


# -- the difference of two runs


@pytest.fixture
def two(subject, tmp_path):
    measured(subject)
    other = tmp_path / "other"
    other.mkdir()
    (other / FILE).write_text((subject.work / FILE).read_text())
    return subject.work, other


def changed(folder, number, **keys):
    lines = (folder / FILE).read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **keys})
    (folder / FILE).write_text("".join(line + "\n" for line in lines))


def test_equal_runs_are_the_same(two, capsys):
    app(["evaluate", "--diff", *map(str, two)], result_action="return_value")
    assert "the same, sample by sample" in capsys.readouterr().out
    assert not diff.compare(*two).differs


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"prompt": "0"}, "prompt"),
        ({"tokens": [1]}, "tokens"),
        ({"truncated": 7777}, "truncated"),
        ({"log_likelihood": -1.0}, "log-likelihood"),
        ({"log_likelihood": float("nan")}, "log-likelihood"),
        ({"greedy": "?"}, "greedy"),
    ],
)
def test_what_differs_is_named(two, keys, what, capsys):
    changed(two[1], 1, **keys)
    task = diff.compare(*two).tasks[0]
    assert [(sample.key, sample.what) for sample in task.first] == [(("arc_challenge", 0, 0), what)]
    assert (task.prompts + task.values, task.differs) == (1, True)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--diff", *map(str, two)])
    assert stopped.value.code == 1
    assert f"arc_challenge, document 0, choice 0: {what}" in capsys.readouterr().out


def test_sums_in_another_order_are_no_difference(two):
    row = rows_of(two[1])[1]
    changed(two[1], 1, log_likelihood=row["log_likelihood"] + 5e-4)
    found = diff.compare(*two)
    assert not found.differs
    assert found.tasks[0].largest == pytest.approx(5e-4)
    assert diff.compare(*two, tolerance=1e-4).differs


def rows_of(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_what_is_infinitely_unlikely_in_both_is_no_difference(two):
    for folder in two:
        changed(folder, 1, log_likelihood=float("-inf"))
    assert not diff.compare(*two).differs
    changed(two[1], 1, log_likelihood=-3.0)
    assert diff.compare(*two).tasks[0].largest == float("inf")


def test_the_effect_on_scores_is_over_what_both_have(two):
    right = {"acc": 1.0, "acc_norm": 1.0}
    wrong = {"acc": 0.0, "acc_norm": 1.0}
    for folder, scores in zip(two, (right, wrong), strict=True):
        for number in (1, 2):
            changed(folder, number, scores=scores)
        for number in (3, 4):
            changed(folder, number, scores=right)
    lines = (two[1] / FILE).read_text().splitlines()
    (two[1] / FILE).write_text("".join(line + "\n" for line in lines[:-1]))  # and one sample less
    found = {task.task: task for task in diff.compare(*two).tasks}
    effects = {effect.metric: effect for effect in found["arc_challenge"].effects}
    assert (effects["acc"].a, effects["acc"].b, effects["acc"].documents, effects["acc"].changed) == (1.0, 0.5, 2, 1)
    assert effects["acc_norm"].changed == 0
    assert [(task.only_a, task.only_b) for task in found.values()][-1] == (1, 0)


def test_settings_that_differ_are_named(subject, tmp_path):
    measured(subject)
    other = replace(subject, work=tmp_path / "b")
    measured(other, softmax_dtype="model")
    found = diff.compare(subject.work, other.work)
    assert found.settings == (("softmax_dtype", "float32", "model"),)
    assert not found.differs


def test_what_is_no_file_of_samples_is_refused(tmp_path):
    with pytest.raises(LlameroError, match="no file of samples"):
        diff.compare(tmp_path, tmp_path)
    (tmp_path / FILE).write_text("")
    with pytest.raises(LlameroError, match="no samples in it"):
        diff.compare(tmp_path, tmp_path)
    (tmp_path / FILE).write_text('{"a": 1}\n')
    with pytest.raises(LlameroError, match="a line is no sample: it has a"):
        diff.compare(tmp_path, tmp_path)
    (tmp_path / FILE).write_text("x\n")
    with pytest.raises(LlameroError, match="not JSON"):
        diff.compare(tmp_path, tmp_path)


# -- ids


def test_spaces_at_the_border_go_to_the_continuation(tokenizer):
    context, continuation = tokens.pair(tokenizer, "Question: ", " yes")
    assert context == tokenizer.encode("Question:")
    assert context + continuation == tokenizer.encode("Question:  yes")


def test_bos_is_put_once(tokenizer):
    assert tokens.text(tokenizer, "yes", bos=True) == [tokenizer.bos_id, *tokenizer.encode("yes")]
    assert tokens.text(tokenizer, "<s>yes", bos=True) == [tokenizer.bos_id, *tokenizer.encode("yes")]
    assert tokens.text(tokenizer, "yes", bos=False) == tokenizer.encode("yes")


def test_an_empty_context_is_a_token(tokenizer):
    assert tokens.pair(tokenizer, "", "yes")[0] == [tokenizer.eos_id]
    assert tokens.pair(tokenizer, "", "yes", bos=True)[0] == [tokenizer.bos_id]
