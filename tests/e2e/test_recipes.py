"""The whole way: real runs of the command line, as a user runs it, twice."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SMALL = """\
name: small
seed: 3
template: chatml
base:
  shape: {hidden: 32, layers: 2, heads: 2, mlp: 64, context: 128}
  vocabulary: {size: 400, mixture: world}
data:
  extra_tokens: ["<|im_start|>", "<|im_end|>"]
  mixtures:
    world: {sources: [{toy_world: documents, count: 600, val_split: 0.05}]}
    questions: {sources: [{toy_world: conversations, count: 300, val_split: 0.1}]}
train:
  - {name: lm, objective: lm, mixture: world, sequence: 64, batch: 8, steps: 30, lr: 1.0e-3, save_every: 5}
  - {name: sft, mixture: questions, sequence: 96, batch: 8, steps: 20, lr: 1.0e-3, save_every: 5}
quantize:
  calibration: {mixture: questions, sequence: 64, tokens: 2048}
  variants: [gptq-4bit-32g-actorder_True, rtn-4bit-32g]
evaluate:
  - {tasks: toy_world, per_category: 8}
  - {tasks: perplexity, validation: [world], window: 64, stride: 32, models: [final, variants]}
publish: {license: apache-2.0, languages: [en]}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def start(*arguments, cwd=ROOT, **options):
    """Start llamero and return its process."""
    command = [sys.executable, "-m", "llamero.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def llamero(*arguments, cwd=ROOT, code=0):
    """Run llamero to its end and return what it printed."""
    process = start(*arguments, cwd=cwd)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="session")
def shared():
    path = Path(os.environ.get("LLAMERO_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("no folder `shared` with real files beside the repository")
    return path


def contents(run):
    """Return the digest-named artifacts of a run and the bytes of their files, logs of time left out."""
    found = {}
    for path in sorted(run.glob("*-*/**/*")):
        if path.is_file() and path.name not in ("metrics.jsonl", "seconds.json") and ".partial" not in str(path):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return an uninterrupted run of the small recipe."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "small.yaml").write_text(SMALL)
    llamero("run", directory / "small.yaml", "--out", directory / "run")
    return directory / "run"


def test_a_second_run_has_nothing_to_do(whole):
    before = contents(whole)
    said = llamero("run", whole.parent / "small.yaml", "--out", whole)
    assert "nothing to do" in said
    assert contents(whole) == before


def test_a_changed_key_redoes_exactly_what_depends_on_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    before = {path.name for path in run.glob("*-*")}
    llamero("run", whole.parent / "small.yaml", "--out", run, "--set", "train.sft.lr=5e-4")
    new = sorted(re.sub(r"-[0-9a-f]{12}$", "", path.name) for path in run.glob("*-*") if path.name not in before)
    assert new == sorted(
        [
            "train-sft",
            "gptq-4bit-32g-actorder_True",
            "rtn-4bit-32g",
            "measure-sft",
            "measure-gptq-4bit-32g-actorder_True",
            "measure-rtn-4bit-32g",
            "evaluate-toy_world-sft",
            "evaluate-toy_world-gptq-4bit-32g-actorder_True",
            "evaluate-toy_world-rtn-4bit-32g",
            "evaluate-perplexity-sft",
            "evaluate-perplexity-gptq-4bit-32g-actorder_True",
            "evaluate-perplexity-rtn-4bit-32g",
            "release",
        ]
    )


def test_what_does_not_decide_the_result_redoes_nothing(whole):
    other = ("--set", "train.sft.save_every=7", "--set", "parallel.device=cpu")
    said = llamero("run", whole.parent / "small.yaml", "--out", whole, *other)
    assert "nothing to do" in said


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_and_run_again_ends_in_the_same_bytes(whole, recipe, tmp_path, seed):
    draw, run = random.Random(seed), tmp_path / "run"
    for _ in range(3):
        process = start("run", recipe, "--out", run)
        time.sleep(draw.uniform(1.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    llamero("run", recipe, "--out", run)
    assert contents(run) == contents(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, recipe, tmp_path):
    run = tmp_path / "run"
    process = start("run", recipe, "--out", run, "--set", "train.lm.steps=4000")
    deadline = time.monotonic() + 120
    while not list(run.glob("train-lm-*.partial/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "is saved after step" in said
    assert "Run the same command again" in said
    assert list(run.glob("train-lm-*.partial/checkpoints/step-*"))


def test_two_runs_at_once_do_not_harm_each_other(whole, recipe, tmp_path):
    run = tmp_path / "run"
    first = start("run", recipe, "--out", run)
    time.sleep(0.5)
    second = start("run", recipe, "--out", run)
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    codes = sorted(process.returncode for process in (first, second))
    assert codes in ([0, 2], [0, 0])  # the slower one may find the faster one finished
    if codes == [0, 2]:
        assert any("another run is at work here" in text for text in said)
    assert contents(run) == contents(whole)


def test_the_release_has_everything(whole):
    release = whole / "release"
    card = (release / "small" / "README.md").read_text()
    for text in ("license: apache-2.0", "<|im_start|>", "gptq-4bit-32g-actorder_True", "Perplexity", "sft"):
        assert text.lower() in card.lower()
    assert (release / "small" / "model.safetensors").exists()
    assert (release / "small-GPTQ" / "gptq-4bit-32g-actorder_True" / "quantize_config.json").exists()


def test_the_release_can_be_talked_to_and_measured(whole):
    model = whole / "release" / "small"
    said = llamero("generate", model, "Hello!", "--max-new-tokens", "5", "--temperature", "0")
    assert said
    quantized = whole / "release" / "small-GPTQ" / "gptq-4bit-32g-actorder_True"
    said = llamero("evaluate", quantized, "--tasks", "toy_world")
    assert "accuracy" in said


def test_the_python_page_is_true(whole):
    page = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace("runs/quickstart/release/quickstart", str(whole / "release" / "small"))
    code += "\nassert logits.shape == (1, len(prompt.ids), len(tokenizer)), logits.shape"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_reads_the_release_and_computes_the_same(whole):
    code = """
import sys, torch, llamero
from transformers import AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
chat = [{"role": "user", "content": "Hello!"}]
ours = llamero.render(chat, "auto", llamero.load_tokenizer(path), add_generation_prompt=True).ids
theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
assert list(ours) == list(theirs), (ours, theirs)
ids = torch.tensor([ours])
with torch.no_grad():
    a, b = llamero.load_model(path)(ids), AutoModelForCausalLM.from_pretrained(path)(ids).logits
assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (a - b).abs().max()
"""
    subprocess.run([sys.executable, "-c", code, str(whole / "release" / "small")], check=True, cwd=ROOT)


def accuracies(run):
    found = {}
    for path in run.glob("evaluate-toy_world-*/results.json"):
        for result in json.loads(path.read_text())["results"]:
            found[result["model"]] = result["metrics"]
    return found


def test_the_quickstart_learns_its_world():
    """Run in the directory that `make quickstart` uses, so that what it made counts as the first of two runs."""
    recipe = Path("recipes/quickstart.yaml")
    llamero("run", recipe)
    said = llamero("run", recipe)
    assert "nothing to do" in said
    found = accuracies(ROOT / "runs" / "quickstart")
    assert found["pretrain"]["accuracy"] <= 0.40
    assert found["polish"]["accuracy"] >= 0.80
    assert found["gptq-4bit-128g-actorder_True"]["accuracy"] >= 0.70


def test_tinystories_goes_the_whole_way_on_real_files(shared, tmp_path):
    run = tmp_path / "run"
    recipe = ROOT / "recipes" / "tinystories-alpaca.yaml"
    text = recipe.read_text().replace("../../shared", str(shared))
    (tmp_path / "tinystories.yaml").write_text(text)
    llamero("run", tmp_path / "tinystories.yaml", "--out", run)
    assert "nothing to do" in llamero("run", tmp_path / "tinystories.yaml", "--out", run)
    card = (run / "release" / "tinystories-alpaca" / "README.md").read_text()
    for text in ("WikiText-2 test", "TinyStories", "ARC", "HellaSwag", "MMLU", "TruthfulQA"):
        assert text.lower() in card.lower()
