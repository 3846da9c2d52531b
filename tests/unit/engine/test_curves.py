import json

import numpy as np
import pytest

from llamero.core.errors import LlameroError
from llamero.engine.curves import loss_curve, smooth


def test_smoothing_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=50)
    slow = [values[i - r : i + r + 1].mean() for i in range(50) for r in [min(4, i, 49 - i)]]
    np.testing.assert_allclose(smooth(values, 4), slow, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_stages_of_any_length_have_a_picture(tmp_path, steps):
    lines = [{"step": n + 1, "loss": 5 / (n + 1), "lr": 1e-3} for n in range(steps)]
    lines[-1]["validation_loss"] = 1.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a stage")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_without_metrics_is_named(tmp_path):
    with pytest.raises(LlameroError, match="no metrics") as caught:
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a stage")
    assert caught.value.where == str(tmp_path / "metrics.jsonl")


def test_sources_and_accuracies_have_panels_of_their_own(tmp_path):
    def picture(name, **more):
        lines = [{"step": n + 1, "loss": 5 / (n + 1), "lr": 1e-3, **more} for n in range(4)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / name, "a stage")
        header = (tmp_path / name).read_bytes()[16:24]
        return int.from_bytes(header[:4]), int.from_bytes(header[4:])

    width, height = picture("plain.png")
    sources = {f"loss/{n}": 1.0 + n for n in range(11)}  # more than there are colours
    assert picture("sources.png", **sources) == (width, height + int(2.6 * 120))
    both = picture("both.png", **sources, validation_accuracy=0.5, probe_accuracy=0.25, **{"validation_loss/0": 1.1})
    assert both == (width, height + int(4.5 * 120))
    before = (tmp_path / "both.png").read_bytes()
    picture("both.png", **sources, validation_accuracy=0.5, probe_accuracy=0.25, **{"validation_loss/0": 1.1})
    assert (tmp_path / "both.png").read_bytes() == before
