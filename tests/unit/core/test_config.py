import pytest
from pydantic import Field

from llamero.core.config import Strict, parse
from llamero.core.errors import LlameroError


class Shape(Strict):
    """A shape."""

    width: int = Field(gt=0)
    """How wide."""


def test_the_docstring_under_a_field_is_its_description():
    assert Shape.model_fields["width"].description == "How wide."


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"width": 0}, r"^width: input should be greater than 0 \(got 0\)"),
        ({"width": "x"}, "^width: .*got 'x'"),
        ({"width": 1, "height": 2}, "`height` is not an option"),
        ({}, "^width: field required"),
    ],
)
def test_the_first_key_that_does_not_fit_is_named(keys, says):
    with pytest.raises(LlameroError, match=says):
        parse(Shape, keys)
