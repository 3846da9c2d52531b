"""Several processes make, byte for byte, what one makes alone."""

import shutil

import pytest

SMALL = {"group_tokens": 32}
"""Three groups of text: of four processes one has none."""


@pytest.fixture(scope="module")
def alone(victims, tmp_path_factory):
    """What one process makes, of each way of propagating activations."""
    made = {}

    def make(how):
        if how not in made:
            root = tmp_path_factory.mktemp(how)
            told = victims.run(root, calibration={"propagation": how}, **SMALL)
            assert told["state"] == "made"
            made[how] = victims.content(root), told
        return made[how]

    return make


WAYS = [(2, "shared")] + [
    pytest.param(number, how, marks=pytest.mark.slow)
    for number, how in [(4, "shared"), (2, "reference"), (3, "per-bits"), (2, "exact"), (4, "exact")]
]


@pytest.mark.parametrize(("number", "propagation"), WAYS)
def test_several_processes_make_the_same_bytes(victims, alone, tmp_path, number, propagation):
    expected, told = alone(propagation)
    said = victims.run(tmp_path, processes=number, calibration={"propagation": propagation}, **SMALL)
    assert [each["state"] for each in said] == ["made"] * number, said
    assert victims.content(tmp_path) == expected
    assert all(each["reports"] == told["reports"] for each in said)
    assert all(each["modules"] < told["modules"] for each in said)


def gone(said, victim):
    """What the processes beside the victim say, when each of them has ended by itself."""
    others = [each for rank, each in enumerate(said) if rank != victim]
    assert all(each["state"] == "error" or each == {"state": "crashed", "code": 70} for each in others), said
    return [each["says"] for each in others if each["state"] == "error"]


MOMENTS = [(1, 15)] + [
    pytest.param(victim, at, marks=pytest.mark.slow)
    for victim, at in [(0, 5), (0, 25), (0, 50), (1, 5), (1, 25), (1, 33)]
]
"""Who is killed at which event. Who solves what is not decided beforehand, but each has some more than these."""


@pytest.mark.parametrize(("victim", "at"), MOMENTS)
def test_one_that_is_killed_is_named_and_the_same_command_ends_in_the_same_bytes(victims, alone, tmp_path, victim, at):
    expected, told = alone("shared")
    said = victims.run(tmp_path, processes=2, victim=victim, at=at, timeout=20, **SMALL)
    assert said[victim] == {"state": "killed"}
    assert all(f"rank {victim}" in each and "is gone" in each for each in gone(said, victim))
    again = victims.run(tmp_path, processes=2, **SMALL)
    assert [each["state"] for each in again] == ["made"] * 2
    assert victims.content(tmp_path) == expected
    assert again[0]["reports"] == told["reports"]


@pytest.mark.slow
def test_in_bfloat16_too(victims, tmp_path):
    ways = {"calibration": {"compute": "bfloat16"}, **SMALL}
    told = victims.run(tmp_path / "one", **ways)
    said = victims.run(tmp_path / "three", processes=3, **ways)
    assert [each["state"] for each in said] == ["made"] * 3
    assert victims.content(tmp_path / "three") == victims.content(tmp_path / "one")
    assert said[2]["reports"] == told["reports"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 4)])
def test_others_go_on_with_what_some_have_left(victims, alone, tmp_path, first, then):
    expected, told = alone("exact")
    ways = {"calibration": {"propagation": "exact"}, **SMALL}
    said = victims.run(tmp_path, processes=first, at=told["events"] // 2 if first == 1 else 30, timeout=20, **ways)
    assert {"state": "killed"} in (said if first > 1 else [said])
    said = victims.run(tmp_path, processes=then, **ways)
    assert all(each["state"] == "made" for each in (said if then > 1 else [said]))
    assert victims.content(tmp_path) == expected


@pytest.mark.slow
def test_an_error_on_one_ends_all_with_its_message(victims, tmp_path):
    said = victims.run(tmp_path, processes=2, victim=1, at=20, how="raise", **SMALL)
    assert [each["state"] for each in said] == ["error", "error"]
    assert all("broken on purpose" in each["says"] for each in said)


@pytest.mark.slow
def test_one_that_stands_still_is_named(victims, tmp_path):
    said = victims.run(tmp_path, processes=2, victim=1, at=20, how="stop", timeout=15, **SMALL)
    assert said[1] == {"state": "killed"}
    assert said[0] == {"state": "crashed", "code": 70}


def test_text_that_breaks_the_model_is_named_by_all(victims, tmp_path):
    said = victims.run(tmp_path, processes=2, broken=1, **SMALL)
    assert [each["state"] for each in said] == ["error", "error"]
    assert said[0]["says"] == said[1]["says"]
    assert "not all finite" in said[0]["says"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 25, 40])
def test_statistics_are_kept_by_several_and_used_by_others(victims, tmp_path, at):
    ways = {"calibration": {"keep": True}, **SMALL}
    told = victims.run(tmp_path / "one", **ways)
    if at:
        assert victims.run(tmp_path / "two", processes=2, at=at, timeout=20, **ways)[0] == {"state": "killed"}
    said = victims.run(tmp_path / "two", processes=2, **ways)
    assert [each["state"] for each in said] == ["made"] * 2
    assert said[0]["reports"] == told["reports"]
    expected = victims.content(tmp_path / "one")
    assert victims.content(tmp_path / "two") == expected
    assert sum(name.startswith("kept/calibration-") for name in expected) > 2
    (tmp_path / "three").mkdir()
    shutil.move(tmp_path / "two/kept", tmp_path / "three/kept")
    said = victims.run(tmp_path / "three", processes=3, **ways)
    assert [each["state"] for each in said] == ["made"] * 3
    assert said[1]["reports"] == told["reports"]
    assert victims.content(tmp_path / "three") == expected
