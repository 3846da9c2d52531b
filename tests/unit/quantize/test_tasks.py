from types import SimpleNamespace
from typing import Any

import pytest

from llamero.quantize.statistics import INPUTS
from llamero.quantize.tasks import COARSE, FINE, WHOLE, tasks
from llamero.quantize.variants import parse

NAMES = (
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-128g-actorder_False",
    "gptq-3bit-128g-actorder_True",
    "gptq-2bit-128g-actorder_static",
    "gguf-Q4_K_M",
    "gguf-Q6_K",
    "awq-4bit-128g",
    "awq-4bit-32g",
    "nf4",
)
SHAPES = {
    "self_attn.q_proj": (1024, (1024, 256, 256)),
    "self_attn.o_proj": (1024, (1024,)),
    "mlp.gate_proj": (1024, (3072, 3072)),
    "mlp.down_proj": (3072, (1024,)),
}


@pytest.fixture
def problems() -> Any:
    shapes = {name: SimpleNamespace(inputs=inputs, outputs=outputs) for name, (inputs, outputs) in SHAPES.items()}
    return SimpleNamespace(inputs=shapes)


def wanted(*, without=""):
    variants = [parse(name, sym=True) for name in NAMES]
    return {part: [each for each in variants if each.name != without] for part in (*INPUTS, WHOLE)}


def pairs(found):
    return sorted((task.part, variant.name) for task in found for variant in task.variants)


@pytest.mark.parametrize("processes", [1, 2, 4, 64])
def test_every_variant_has_every_part_once(problems, processes):
    found = tasks(problems, wanted(), processes=processes)
    parts = [(part, name) for name in NAMES for part in ([WHOLE] if name.startswith("awq") else INPUTS)]
    assert pairs(found) == sorted(parts)


def test_one_process_solves_all_that_shares_a_factor_together(problems):
    found = tasks(problems, wanted())
    assert len({(task.part, task.method) for task in found}) == len(found)


def test_several_begin_with_the_largest_and_none_is_much_larger_than_their_share(problems):
    found = tasks(problems, wanted(), processes=2)
    costs = [task.cost for task in found]
    assert costs == sorted(costs, reverse=True)
    most = sum(task.cost for task in tasks(problems, wanted())) / (2 * FINE)
    assert all(task.cost <= most or len(task.variants) == 1 for task in found if task.method not in COARSE)
    assert all(task.cost <= FINE * most or len(task.variants) == 1 for task in found)


def test_variants_of_an_order_stay_together_so_that_few_factors_are_computed_twice(problems):
    found = [task for task in tasks(problems, wanted(), processes=2) if task.method == "gptq" and task.cost > 0]
    mixed = [task for task in found if len({variant.actorder != "none" for variant in task.variants}) > 1]
    assert len(mixed) <= len(SHAPES)


def test_what_is_there_already_is_no_task(problems):
    there = "gguf-Q6_K"
    assert all(name != there for _, name in pairs(tasks(problems, wanted(without=there), processes=2)))
