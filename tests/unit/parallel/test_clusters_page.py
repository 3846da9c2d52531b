"""docs/clusters.md names keys that exist, and what the files of other trainers say."""

import re
from pathlib import Path

import pytest
import yaml

from llamero.engine.stage import StageConfig
from llamero.parallel.config import ParallelConfig

PAGE = (Path(__file__).parents[3] / "docs" / "clusters.md").read_text()
TABLES = PAGE.partition("## Coming from")[2]
ROWS = [line.strip("| ").split("|") for line in TABLES.splitlines() if line.startswith("| ") and "`" in line]


def test_every_key_that_it_names_is_one():
    named = [key for _, here, *_ in ROWS for key in re.findall(r"`([a-z_.]+)", here)]
    values = {"linear", "cosine"}  # of `schedule`
    known = {*ParallelConfig.model_fields, *StageConfig.model_fields, *values}
    assert len(named) > 20
    assert [key for key in named if key.removeprefix("train.").removeprefix("parallel.") not in known] == []


@pytest.mark.parametrize("here", [cell for _, here, *_ in ROWS for cell in re.findall(r"`(\w+: [^`]+)`", here)])
def test_every_value_that_it_names_is_one(here):
    said = yaml.safe_load("{" + here.replace(": N", ": 4").replace(": M", ": 2") + "}")
    keys = {"gpus": 8 if "shard: M" in here else 4, "shard": 4} | said
    if "replicate" in said:
        keys["shard"] = said.get("shard", 1)
    ParallelConfig.model_validate(keys)


def test_the_example_is_a_layout():
    (example,) = re.findall(r"```yaml\n(parallel:.*?)```", TABLES, re.S)
    found = ParallelConfig.model_validate(yaml.safe_load(example)["parallel"])
    assert (found.sharded, found.zero_stage, found.offload) == (32, 3, True)


def test_the_stages_of_zero_are_there():
    there = " ".join(row[0] for row in ROWS)
    stages = [f"ZeRO stage {number}" for number in range(4)]
    fsdp = ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]
    keys = ["offload_optimizer", "offload_param", "gradient_accumulation_steps", "bf16", "gradient_clipping"]
    assert [name for name in (*stages, *fsdp, *keys) if name not in there] == []
    assert "zero3_offload.json" in TABLES
