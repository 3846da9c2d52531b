"""The recipes of published models."""

from pathlib import Path

import pytest

from llamero.recipe.load import load

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    assert load(path).name == path.stem


def test_solar_fills_64_devices_and_its_steps_go_into_whole_micro_batches():
    parallel = load(RECIPES / "solar-0-70b.yaml").parallel
    assert parallel.tensor * parallel.pipeline * parallel.sharded == parallel.gpus == 64
    assert parallel.share(64) == (16, 1)
