"""The picture of scores by category."""

import pytest
from matplotlib.figure import Figure

from llamero.core.errors import LlameroError
from llamero.engine.curves import SOURCES
from llamero.engine.radar import radar

CATEGORIES = ["writing", "math", "coding"]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw models and return the axes and the bytes: `drawn({"a": {"math": 3}})`."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))

    def draw(models, categories=CATEGORIES):
        radar(models, tmp_path / "new" / "r.png", "Scores", categories=categories, highest=10)
        return figures[-1], (tmp_path / "new" / "r.png").read_bytes()

    return draw


def test_every_model_is_an_outline_that_closes(drawn):
    figure, picture = drawn(
        {"a": {"writing": 8, "math": 3.5, "coding": 4}, "b": {"writing": 1, "math": 2, "coding": 3}}
    )
    assert picture.startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b"]
    assert list(axes.get_lines()[0].get_ydata()) == [8, 3.5, 4, 8]
    assert [label.get_text() for label in axes.get_xticklabels()] == CATEGORIES
    assert axes.get_ylim() == (0, 10)


def test_the_same_scores_give_the_same_bytes(drawn):
    scores = {"a": {"writing": 8, "math": 3.5, "coding": 4}}
    assert drawn(scores)[1] == drawn(scores)[1]


def test_what_was_not_measured_is_a_gap_and_who_is_not_drawn_is_counted(drawn):
    figure, _ = drawn({str(n): {"writing": 8, "math": 3} for n in range(len(SOURCES) + 2)})
    assert figure.axes[0].get_lines()[0].get_ydata()[2] != 4
    assert len(figure.axes[0].get_lines()) == len(SOURCES)
    assert figure.axes[0].get_title() == "Scores (2 more models not drawn)"


def test_one_category_is_drawn_too(drawn):
    assert drawn({"a": {"math": 3}}, ["math"])[1]


def test_nothing_to_draw_is_an_error(drawn):
    with pytest.raises(LlameroError, match="no scores by category"):
        drawn({"a": {}}, [])
