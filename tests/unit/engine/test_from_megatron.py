"""docs/from-megatron.md has every training argument of the published card, with its values and keys that exist."""

import os
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from llamero.recipe.load import load
from llamero.recipe.schema import Recipe

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("LLAMERO_SHARED", ROOT.parent / "shared"))
CARD = SHARED / "cards" / "llama2-70b-oasst-sft-v10-gptq.md"


@pytest.fixture(scope="module")
def published():
    """Arguments of each of the two stages."""
    if not CARD.exists():
        pytest.skip(f"the published card is not at {CARD}")
    return [
        arguments(block) for block in re.findall(r"### Megatron Fine-Tuning.*?```\n(.*?)```", CARD.read_text(), re.S)
    ]


def arguments(block):
    pairs = [re.fullmatch(r"(--\w+)(?:[ =](.*))?", line) for line in block.splitlines()]
    assert all(pairs)
    return {pair[1]: f"`{pair[2]}`" if pair[2] else "set" for pair in pairs if pair}


def rows():
    """Return (argument, published, here, notes) of every row of the page."""
    lines = (ROOT / "docs" / "from-megatron.md").read_text().splitlines()
    table = [line.strip("| ").replace("\\|", "\0").split("|") for line in lines if line.startswith("| `--")]
    return [[cell.strip().replace("\0", "|") for cell in (*row, "")[:4]] for row in table]


def test_every_argument_of_the_card_has_a_row_with_what_it_was_set_to(published):
    first, second = published
    expected = {}
    for argument in first | second:
        values = [stage.get(argument) for stage in published]
        if values[0] == values[1]:
            expected[argument] = values[0]
        elif values[0] is None:
            expected[argument] = f"stage 2: {values[1]}"
        else:
            expected[argument] = f"{values[0]}, then {values[1]}"
    assert {argument.strip("`"): values for argument, values, _, _ in rows()} == expected
    assert len(rows()) == len(expected)


def fields(model, path):
    """Return whether a dotted path of keys leads somewhere."""
    if not path:
        return True
    if path[0] not in model.model_fields:
        return False
    within = [kind for kind in kinds(model.model_fields[path[0]].annotation) if issubclass(kind, BaseModel)]
    return len(path) == 1 or any(fields(kind, path[1:]) for kind in within)


def kinds(annotation):
    return [annotation] if isinstance(annotation, type) else [k for part in get_args(annotation) for k in kinds(part)]


def test_every_key_that_it_names_is_one():
    text = (ROOT / "docs" / "from-megatron.md").read_text()
    named = [key for _, _, here, _ in rows() for key in re.findall(r"`([\w.]+)`", here)]
    named += re.findall(r"`((?:train|data|parallel|base)\.[\w.]+)", text.replace("`train.x`", ""))
    assert len(named) > 40
    assert [key for key in named if not fields(Recipe, key.split("."))] == []


def test_where_there_is_no_key_the_notes_say_why():
    assert [argument for argument, _, here, notes in rows() if here.startswith("none") and not notes] == []
    assert {here for _, _, here, _ in rows() if "`" not in here} <= {"none", "none yet"}


def test_the_recipe_says_what_the_card_says(published):
    recipe = load(ROOT / "recipes" / "llama2-70b-oasst-sft-v10.yaml")
    for stage, said in zip(recipe.train, published, strict=True):
        number = {key: float(value.strip("`")) for key, value in said.items() if re.fullmatch(r"`[\d.e-]+`", value)}
        assert stage.betas == (number["--adam_beta1"], number["--adam_beta2"])
        assert (stage.lr, stage.min_lr, stage.warmup) == (
            number["--lr"],
            number["--min_lr"],
            number["--lr_warmup_iters"],
        )
        assert (stage.eps, stage.weight_decay) == (number["--adam_eps"], number["--weight_decay"])
        assert (stage.steps, stage.sequence) == (number["--train_iters"], number["--seq_length"])
        assert (stage.save_every, stage.eval_every) == (number["--save_interval"], number["--eval_interval"])
        assert stage.dropout.hidden == number["--hidden_dropout"]
        assert stage.dropout.attention == number["--attention_dropout"]
        assert stage.dropout.lima == ("--lima_dropout" in said)
        assert f"`{stage.schedule}`" == said["--lr_decay_style"]
