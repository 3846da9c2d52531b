"""What the README and the docs say is true: recipes load, commands parse, the reference is up to date."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from llamero.cli import app
from llamero.recipe.load import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands():
    """Return every llamero command in the pages, line by line."""
    for page in PAGES:
        for block in blocks(page, "(?:shell)?"):
            for line in block.splitlines():
                found = re.match(r"(?:\.venv/bin/)?llamero (.*)", line)
                if found:
                    yield pytest.param(found[1], id=f"{page.name}: {found[1][:40]}")


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_in_the_docs_is_one(command):
    app.parse_args(shlex.split(command, comments=True), exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    "block",
    [b for page in PAGES for b in blocks(page, "yaml") if b.startswith("name:")],
    ids=lambda b: b.split("\n")[0],
)
def test_every_whole_recipe_in_the_docs_is_valid(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block)
    assert load(tmp_path / "recipe.yaml").name


KEYS = {"data": "docs/data.md", "train": "docs/train.md", "publish": "docs/publish.md"}


@pytest.mark.parametrize(("key", "page"), list(KEYS.items()))
def test_every_part_of_a_recipe_in_the_docs_is_valid(key, page, tmp_path):
    part = next(block for block in blocks(ROOT / page, "yaml") if block.startswith(f"{key}:"))
    mixtures = "data: {mixtures: {chat: {sources: [{source: a, path: a}]}, top: {sources: [{source: b, path: b}]}}}\n"
    (tmp_path / "recipe.yaml").write_text("name: x\nbase: owner/name\n" + (mixtures if key == "train" else "") + part)
    assert load(tmp_path / "recipe.yaml").name == "x"


def test_the_reference_of_the_recipe_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "build.py"))
    assert (ROOT / "docs" / "recipe.md").read_text() == made["reference"](), "run `make docs`"


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_contributing_names_exists():
    for name in re.findall(r"`([\w/]+/[\w/.]*)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "src" / "llamero" / name).exists(), name


def test_what_two_tables_name_is_the_same():
    """Names that a config offers and the table that acts on them, where they stand in two rooms."""
    from typing import get_args

    from llamero.corpus.layouts import LAYOUTS
    from llamero.data.config import Layout
    from llamero.engine.schedule import SHAPES
    from llamero.engine.stage import StageConfig
    from llamero.evaluate import config
    from llamero.evaluate.run import TASKS
    from llamero.publish.measurements import PRINTED
    from llamero.quantize.methods import METHODS
    from llamero.quantize.variants import Method

    assert set(get_args(Layout)) == set(LAYOUTS)
    assert set(get_args(StageConfig.model_fields["schedule"].annotation)) == set(SHAPES)
    assert set(get_args(Method)) == set(METHODS)
    kinds = get_args(get_args(config.EvaluateConfig)[0])
    assert set(kinds) == set(TASKS)
    names = {name for kind in kinds for name in get_args(kind.model_fields["tasks"].annotation)}
    assert names - {"samples", "sampling", "openllm"} <= set(PRINTED)  # shown, shown, and the results of its parts
