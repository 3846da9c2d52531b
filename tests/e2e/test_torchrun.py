"""The same recipe on one process and, by torchrun, on two."""

import json
import os
import subprocess
import sys

import pytest

RECIPE = """\
name: small
base:
  shape: {hidden: 16, layers: 2, heads: 2, mlp: 32, context: 64, tied: false}
  vocabulary: {size: 300, mixture: world}
template: plain
data:
  mixtures:
    world: {sources: [{toy_world: documents, count: 200, val_split: 0.1}]}
train:
  - {name: lm, objective: lm, mixture: world, sequence: 64, batch: 8, steps: 4, lr: 1.0e-3}
  - {name: more, objective: lm, mixture: world, sequence: 64, batch: 8, steps: 3, lr: 1.0e-3}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def llamero(recipe, out, *options, processes=1):
    return command("run", str(recipe), "--out", str(out), *options, processes=processes)


def command(*arguments, processes=1):
    start = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--standalone",
        "-m",
        "llamero.cli",
    ]
    whole = [sys.executable, *(start if processes > 1 else ["-m", "llamero.cli"]), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=240)


def lines(out, stage):
    (found,) = out.glob(f"train-{stage}-*/metrics.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["shard", "tensor", "pipeline"])
def test_a_recipe_on_two_processes_is_the_one_on_one(recipe, tmp_path, axis):
    alone = llamero(recipe, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    options = ["--set", "parallel.gpus=2", "--set", f"parallel.{axis}=2"]
    both = llamero(recipe, tmp_path / "two", *options, processes=2)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("What was done") == 1
    for stage in ("lm", "more"):
        for one, two in zip(lines(tmp_path / "one", stage), lines(tmp_path / "two", stage), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["tokens"] == one["tokens"]
    names = [sorted(path.name for path in (tmp_path / run).glob("*-*")) for run in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_processes_quantize_to_the_bytes_of_one(recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog beside it. " * 60)
    other = tmp_path / "other.txt"
    other.write_text("a bird sang in the tree behind the house while it rained. " * 40)
    recipe.write_text(RECIPE.replace("hidden: 16", "hidden: 32"))
    assert llamero(recipe, tmp_path / "model").returncode == 0
    (base,) = (tmp_path / "model").glob("train-more-*")
    recipe.write_text(f"""\
name: small
base: {base}
template: plain
quantize:
  variants: [gptq-4bit-32g-actorder_True, awq-4bit-32g, rtn-8bit-32g, gguf-Q8_0]
  calibration: {{text: {text}, sequence: 64, tokens: 512}}
  measure: {{texts: {{other: {other}}}, tokens: 256}}
""")
    made = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        said = llamero(recipe, out, "--set", f"parallel.gpus={processes}", processes=processes)
        assert said.returncode == 0, said.stderr
        paths = [path for path in sorted(out.glob("*-*/*")) if path.is_file() and path.name != "seconds.json"]
        made.append({str(path.relative_to(out)): path.read_bytes() for path in paths})
    assert sum(name.startswith("measure-") for name in made[0]) > 5
    assert made[0] == made[1]
    how = ["--text", str(text), "--sequence", "64", "--tokens", "512", "--variant", "gptq-4bit-32g-actorder_True"]
    how += ["--variant", "gguf-Q8_0", "--measure-text", str(other)]
    said = [command("quantize", str(base), str(tmp_path / f"o{n}"), *how, processes=n) for n in (1, 2)]
    assert [each.returncode for each in said] == [0, 0], said[1].stderr
    assert said[1].stdout.count("written to") == 1
    assert "shared by 2 processes" in said[1].stdout
    made = [{p.relative_to(o): p.read_bytes() for p in o.glob("*/*")} for o in (tmp_path / "o1", tmp_path / "o2")]
    assert made[0] == made[1]
    again = command("quantize", str(base), str(tmp_path / "o2"), *how, processes=2)
    assert again.returncode != 0
    assert "is there already" in again.stderr


@pytest.mark.slow
def test_several_devices_without_torchrun_are_refused_with_the_line_to_use(recipe, tmp_path):
    said = llamero(recipe, tmp_path / "run", "--set", "parallel.gpus=2")
    assert said.returncode == 2
    assert "torchrun --standalone --nproc-per-node 2 -m llamero.cli run" in said.stderr
