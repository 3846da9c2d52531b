"""A recipe is checked whole before anything runs, and every error points at its line."""

from pathlib import Path

import pytest

from llamero.core.errors import LlameroError
from llamero.recipe.load import load

RECIPES = Path(__file__).parents[3] / "recipes"

SMALL = """\
name: small
base:
  shape: {hidden: 16, layers: 1, heads: 2, mlp: 32, context: 64}
  vocabulary: {size: 300, mixture: world}
template: plain
data:
  mixtures:
    world:
      sources:
        - {toy_world: documents, count: 10}
train:
  - name: lm
    objective: lm
    mixture: world
    sequence: 32
    steps: 2
evaluate:
  - {tasks: toy_world}
"""


@pytest.fixture
def write(tmp_path):
    def written(old="", new=""):
        path = tmp_path / "recipe.yaml"
        assert old in SMALL
        path.write_text(SMALL.replace(old, new) if old else SMALL)
        return path

    return written


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path):
    assert load(path).name == path.stem


WRONG = [
    ("sequence: 32", "sequense: 32", 15, "train.0.sequense: unknown key (got 32)", "did you mean `sequence`?"),
    ("hidden: 16", "hiden: 16", 3, "base.shape.hiden: unknown key (got 16); 1 more", "did you mean `hidden`?"),
    ("steps: 2", "steps: two", 16, "train.0.steps: input should be a valid integer", None),
    ("mixture: world\n    seq", "mixture: wrld\n    seq", 14, "there is no mixture `wrld`", "did you mean `world`?"),
    ("tasks: toy_world", "tasks: toy_wrld", 18, "unknown 'tasks' `toy_wrld`", "did you mean `toy_world`?"),
    ("{tasks: toy_world}", "{tasks: toy_world, models: [lmm]}", 18, "there is no model `lmm`", "did you mean `lm`?"),
    ("toy_world: documents", "toy_world: poems", 10, "sources.0.toy_world: input should be 'documents'", None),
    ("count: 10", "count: 0", 10, "greater than 0 (got 0)", None),
    ("steps: 2", "steps: 2\n    epochs: 1", 12, "give `steps` or `epochs`", None),
    ("  - name: lm\n", "  - name: base\n", 12, "the name `base` is taken", "give each stage its own name"),
    ("name: small\n", "", 1, "name: field required", "add `name`"),
    ("steps: 2", "steps: 2\n    lr: 0", 17, "train.0.lr: input should be greater than 0 (got 0)", None),
    ("steps: 2", "steps: 2\n    warmup: 3", 12, "`warmup: 3` is longer than the stage, which has 2 steps", None),
    ("steps: 2", "steps: 2\n    export_best: true", 12, "`export_best` needs `eval_every`", None),
    ("steps: 2", "steps: 2\n    steps: 3", 17, "key `steps` stands here twice", None),
    ("evaluate:", "evaluate: [", 18, "not valid YAML", None),
    ("seq", "when: !now 3\n    seq", 15, "not valid YAML: could not determine a constructor", None),
    (
        "data:",
        "data:\n  extra_tokens: [<a>,\n    <b>, <a>]",
        8,
        "the token '<a>' stands here twice",
        "name it once: its place gives its id",
    ),
    ("data:", "data:\n  extra_tokens: ['<a>', ' ']", 7, "' ' is no token", "give it a spelling"),
]


@pytest.mark.parametrize(("old", "new", "line", "problem", "fix"), WRONG, ids=[case[1].strip() for case in WRONG])
def test_a_mistake_is_named_with_line_key_value_and_way_out(write, old, new, line, problem, fix):
    path = write(old, new)
    with pytest.raises(LlameroError) as caught:
        load(path)
    assert problem in caught.value.problem
    assert caught.value.where == f"{path}:{line}"
    if fix:
        assert caught.value.fix == fix


def test_numbers_with_an_exponent_are_numbers(write):
    assert load(write("steps: 2", "steps: 2\n    lr: 1e-4")).train[0].lr == 1e-4


def test_an_override_reaches_a_list_item_by_name_or_number(write):
    assert load(write(), ["train.lm.lr=1e-3"]).train[0].lr == 1e-3
    assert load(write(), ["train.0.steps=7"]).train[0].steps == 7
    assert load(write(), ["seed=9", "parallel.micro_batch=4"]).parallel.micro_batch == 4


@pytest.mark.parametrize(
    ("override", "problem", "fix"),
    [
        ("train.lmm.lr=1", "no item `lmm`", "did you mean `lm`?"),
        ("seed", "is not key=value", "write for example --set train.sft.lr=1e-5"),
        ("name.x.y=1", "there is nothing", None),
    ],
)
def test_a_wrong_override_is_refused(write, override, problem, fix):
    with pytest.raises(LlameroError, match=problem) as caught:
        load(write(), [override])
    assert caught.value.fix == fix


def test_a_missing_recipe_says_so(tmp_path):
    with pytest.raises(LlameroError, match="no such recipe"):
        load(tmp_path / "none.yaml")


def test_a_stage_can_only_start_from_an_earlier_one(write):
    with pytest.raises(LlameroError, match="no earlier stage `later`"):
        load(write("steps: 2", "steps: 2\n    init_from: later"))


KEEP = "steps: 2\n  - {name: more, mixture: world, steps: 2,\n     optimizer: keep}"
LEFT = "steps: 2\n    export_optimizer: true\n"


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        ("steps: 2\n    optimizer: keep", "starts from the base, which has no moments"),
        (KEEP, "stage `lm`, which this one starts from, leaves none of its moments"),
        (KEEP.replace("steps: 2\n", LEFT + "    adapter: {lora: 4}\n", 1), "of new factors of an adapter"),
        (KEEP.replace("steps: 2\n", LEFT, 1).replace("keep", "keep, adapter: {lora: 4}"), "of new factors"),
    ],
)
def test_moments_that_nobody_leaves_are_not_kept(write, new, problem):
    path = write("steps: 2", new)
    with pytest.raises(LlameroError, match=problem) as caught:
        load(path)
    number = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "optimizer: keep" in text)
    assert caught.value.where == f"{path}:{number}"


def test_moments_of_the_stage_it_starts_from_are_kept(write):
    last = "\n  - {name: last, mixture: world, steps: 2, init_from: lm, optimizer: keep}"
    path = write("steps: 2", KEEP.replace("steps: 2\n", LEFT, 1) + last)
    assert [stage.optimizer for stage in load(path).train] == ["fresh", "keep", "keep"]


def test_every_field_of_every_config_is_documented():
    from llamero.recipe.load import models_within
    from llamero.recipe.schema import Recipe

    undocumented = [
        f"{model.__name__}.{name}"
        for model in models_within(Recipe)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert undocumented == []
