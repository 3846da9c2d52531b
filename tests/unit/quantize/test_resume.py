"""Kill a run at any moment: the same command ends in the same bytes."""

import shutil

import pytest


@pytest.fixture(scope="module")
def whole(victims, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    said = victims.run(root)
    assert said["state"] == "made"
    assert not [path for path in (root / "progress").iterdir() if path.name.startswith(("activ", "sens"))]
    return victims.content(root), said


def test_every_layout_is_made(victims, whole):
    files, said = whole
    assert {name.split("/")[0] for name in files} == {*victims.variants}
    assert sum(name.endswith(".safetensors") for name in files) > 15
    assert said["events"] > 200


def mostly_slow(*values, quick):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("share", mostly_slow(*range(12), quick=(4, 9)))
def test_killed_at_any_moment_the_next_run_ends_in_the_same_bytes(victims, whole, tmp_path, share):
    expected, told = whole
    at = 1 + share * (told["events"] - 1) // 11  # the first event, the last, and those between
    assert victims.run(tmp_path, at=at) == {"state": "killed"}
    said = victims.run(tmp_path)
    assert said["state"] == "made"
    assert victims.content(tmp_path) == expected
    assert said["reports"] == told["reports"]


@pytest.mark.slow
def test_killed_again_and_again_little_is_done_twice(victims, whole, tmp_path):
    expected, told = whole
    said = {"state": "killed"}
    while said["state"] == "killed":
        said = victims.run(tmp_path, at=told["events"] // 3)
    assert said["state"] == "made"
    assert victims.content(tmp_path) == expected
    assert said["modules"] < told["modules"]
    again = victims.run(tmp_path)
    assert again["modules"] == 0
    assert victims.content(tmp_path) == expected
    assert again["reports"] == told["reports"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("how", [{"keep": True}, {"propagation": "exact"}], ids=["keep", "exact"])
def test_kept_statistics_and_own_activations_are_gone_on_with(victims, tmp_path, how, at):
    config = {"variants": victims.variants[:3], "sensitivity": 64}
    told = victims.run(tmp_path / "whole", config=config, calibration=how)
    assert victims.run(tmp_path / "cut", config=config, at=int(at * told["events"]), calibration=how) == {
        "state": "killed"
    }
    said = victims.run(tmp_path / "cut", config=config, calibration=how)
    assert said["reports"] == told["reports"]
    assert victims.content(tmp_path / "cut") == victims.content(tmp_path / "whole")


@pytest.mark.parametrize("largest", mostly_slow(100, 5000, 30_000, quick=(5000,)))
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(victims, whole, tmp_path, largest):
    said = victims.run(tmp_path, largest_file=largest)
    assert said["state"] == "error"
    assert "no room to write" in said["says"]
    assert "run the same command again" in said["says"]
    assert victims.run(tmp_path)["state"] == "made"
    assert victims.content(tmp_path) == whole[0]


@pytest.mark.slow
def test_another_text_is_begun_anew(victims, whole, tmp_path):
    assert victims.run(tmp_path, seed=3, at=whole[1]["events"] // 2) == {"state": "killed"}
    assert victims.run(tmp_path)["state"] == "made"
    assert victims.content(tmp_path) == whole[0]


def test_a_journal_that_was_cut_off_in_a_line_is_gone_on_with(victims, whole, tmp_path):
    assert victims.run(tmp_path, at=whole[1]["events"] // 2) == {"state": "killed"}
    journal = tmp_path / "progress" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    said = victims.run(tmp_path)
    assert said["state"] == "made"
    assert victims.content(tmp_path) == whole[0]


@pytest.mark.slow
def test_files_that_are_gone_are_made_anew(victims, whole, tmp_path):
    assert victims.run(tmp_path, at=whole[1]["events"] // 2) == {"state": "killed"}
    shutil.rmtree(tmp_path / victims.variants[0])
    assert victims.run(tmp_path)["state"] == "made"
    assert victims.content(tmp_path) == whole[0]
