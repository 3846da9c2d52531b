"""What a mistyped recipe is answered with, and how several processes say it."""

import json

import pytest

import llamero.cli as cli
from llamero.cli import main
from llamero.core.errors import LlameroError
from llamero.recipe.load import load

RECIPE = """
name: a
base: owner/name
data: {mixtures: {chat: {sources: [{source: a, path: a.json}]}}}
train: [{name: sft, mixture: chat, sequence: 64, batch: 1, steps: 1, lr: 1.0e-4}]
parallel: {gpus: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("said", "problem", "fix"),
    [
        ("train.sft.learning_rate=1", "unknown key", "it is called `lr` here"),
        ("train.sft.per-device-train-batch-size=1", "unknown key", "it is called `parallel.micro_batch` here"),
        ("parallel.tp=2", "unknown key", "it is called `tensor` here"),
        ("parallel.bf16=true", "unknown key", "one of: compile"),
        ("parallel.schedule=1f1", "input should be 'gpipe'", "did you mean `1f1b`?"),
        (
            "train.sft.dropout=0.25",
            "expected keys and their values: attention, embedding, hidden, lima",
            "`dropout`: What is dropped",
        ),
        ("parallel=8", "expected keys and their values: compile", "`parallel`: Devices"),
        ("parallel.device=gpu", "should match pattern", "`device`: `auto` takes CUDA where there is one"),
        ("train.sft.betas=0.9", "valid tuple", "`betas`: AdamW's decay"),
        ("train.sft.betas=[0.9, 1.9]", "less than 1", None),
        ("train.sft.warmup=9", "`warmup: 9` is longer than the stage, which has 1 steps", None),
    ],
)
def test_a_mistake_in_a_key_is_answered_with_the_way_out(recipe, said, problem, fix):
    with pytest.raises(LlameroError) as refused:
        load(recipe, [said])
    assert problem in refused.value.problem
    assert (refused.value.fix or "").startswith(fix or "")
    assert (refused.value.fix is None) == (fix is None)


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Return what makes this process one of two, and a list of the pauses it makes."""
    pauses = []
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def become(rank):
        monkeypatch.setenv("RANK", str(rank))
        return pauses

    return become


@pytest.mark.parametrize(("rank", "begins"), [(0, "error recipe.yaml"), (1, "error rank 1 at recipe.yaml")])
def test_the_first_process_says_what_is_wrong_and_torchrun_is_told(
    processes, rank, begins, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pauses = processes(rank)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "recipe.yaml"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(begins)
    assert pauses == [cli.FIRST_SPEAKS] * rank
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "recipe.yaml" in told["message"]
    assert told["extraInfo"]["py_callstack"] == told["message"]
    assert int(told["extraInfo"]["timestamp"]) > 0


def test_without_torchrun_no_file_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["run", "recipe.yaml"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "said"), [(0, "stopped. Finished stages are kept"), (1, "")])
def test_only_the_first_process_says_that_it_stopped(processes, rank, said, capsys, recipe, monkeypatch):
    processes(rank)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamero.recipe.load.load", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith(said)
