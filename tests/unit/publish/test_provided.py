from typing import Literal

import pytest

from llamero.publish.provided import readers
from llamero.publish.release import Variant

Actorder = Literal["none", "static", "desc"]


Layout = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]


def variant(
    bits: int = 4,
    group_size: int = 128,
    actorder: Actorder = "none",
    sym: bool = True,
    layout: Layout = "gptq",
) -> Variant:
    return Variant("v", "gptq", layout, bits, group_size, actorder, sym, 0.01, 1, 512, {}, [])


@pytest.mark.parametrize(
    ("how", "vllm", "exllama"),
    [
        ({}, True, True),
        ({"actorder": "static"}, True, True),
        ({"actorder": "desc"}, False, True),
        ({"actorder": "desc", "group_size": -1}, True, True),
        ({"bits": 8}, True, False),
        ({"bits": 3}, False, False),
        ({"bits": 2}, False, False),
        ({"sym": False}, False, True),
        ({"group_size": 16}, False, True),
        ({"layout": "gptq_v2"}, False, True),
        ({"layout": "awq", "sym": False}, True, False),
        ({"layout": "compressed-tensors", "bits": 3, "sym": False}, True, False),
        ({"layout": "compressed-tensors", "group_size": 16}, False, False),
    ],
)
def test_who_reads_a_variant(how, vllm, exllama):
    found = readers(variant(**how))
    assert found[:2] == ["llamero", "Transformers"]
    assert ("vLLM" in found, "ExLlamaV2" in found) == (vllm, exllama)
