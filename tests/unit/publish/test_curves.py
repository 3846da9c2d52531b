import json

import numpy as np
import pytest

from llamero.core.errors import LlameroError
from llamero.publish.curves import loss_curve, smooth


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
