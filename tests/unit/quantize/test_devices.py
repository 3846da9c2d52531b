"""Several processes make, byte for byte, what one makes alone."""

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
