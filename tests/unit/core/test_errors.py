import pytest

from llamero.core.errors import LlameroError, did_you_mean


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LlameroError("bad"), "bad"),
        (LlameroError("bad", where="a.yaml:3"), "a.yaml:3: bad"),
        (LlameroError("bad", fix="mend it"), "bad\n  fix: mend it"),
        (LlameroError("bad", where="a.yaml:3", fix="mend it"), "a.yaml:3: bad\n  fix: mend it"),
    ],
)
def test_an_error_says_where_what_and_the_way_out(error, text):
    assert str(error) == text


def test_the_nearest_name_is_offered_or_all():
    assert did_you_mean("alpacca", ["alpaca", "orca"]) == "did you mean `alpaca`?"
    assert did_you_mean("zzz", ["orca", "alpaca"]) == "one of: alpaca, orca"
