"""`--scale tiny`: what changes is said, nothing is fetched, and other numbers of processes are told what to do."""

from pathlib import Path

import pytest

from llamero.cli import app, main

RECIPE = Path(__file__).parents[2] / "recipes" / "llama2-70b-oasst-sft-v10.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_check_shows_the_stages_and_what_changed(capsys, tmp_path):
    app(["check", str(RECIPE), "--scale", "tiny"], result_action="return_value")
    said = capsys.readouterr()
    for stage in ("train-stage1", "train-stage2", "release"):
        assert stage in said.out
    for change in ("parallel.gpus: 32 → 4", "train.stage1.steps: 12000 → 12", "name: llama2-70b-oasst-sft-v10 → "):
        assert change in said.err
    toys = {path.name for path in (tmp_path / "runs" / "llama2-70b-oasst-sft-v10-tiny" / "toy").iterdir()}
    assert "oasst_top1-oasst_export.jsonl" in toys


def test_what_is_set_is_the_most_there_is(capsys):
    smaller = ["--set", "train.stage1.batch_samples=3", "--set", "parallel.pipeline=1", "--set", "parallel.gpus=8"]
    app(["check", str(RECIPE), "--scale", "tiny", *smaller], result_action="return_value")
    said = capsys.readouterr().err
    assert "train.stage1.batch_samples" not in said
    assert "parallel.gpus: 8 → 2" in said


def test_a_tiny_recipe_is_launched_on_its_own_layout(capsys, tmp_path):
    app(["launch", str(RECIPE), "--scale", "tiny"], result_action="return_value")
    script = (tmp_path / "llama2-70b-oasst-sft-v10.sh").read_text()
    assert "--nproc-per-node 4" in script
    assert script.strip().endswith("--scale tiny")


def test_another_number_of_processes_is_told_what_to_start(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(RECIPE), "--scale", "tiny"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "3 processes were started, and the tiny layout takes 4, or one" in said
    assert "torchrun --standalone --nproc-per-node 4" in said


def test_another_scale_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", str(RECIPE), "--scale", "small"])
    assert "tiny" in capsys.readouterr().err
