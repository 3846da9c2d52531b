from dataclasses import dataclass
from itertools import product

import pytest

from llamero.checkpoint.loaders import LOADERS, accepting, looked_at, remarks, verdicts


@dataclass(frozen=True)
class File:
    """A quantized file."""

    name = "file"
    bits: int = 4
    group_size: int = 128
    actorder: str = "none"
    sym: bool = True
    layout: str = "gptq"


@pytest.mark.parametrize(
    ("how", "vllm", "exllama", "tgi"),
    [
        ({}, True, True, True),
        ({"actorder": "static"}, True, True, True),
        ({"actorder": "desc"}, False, True, True),
        ({"actorder": "desc", "group_size": -1}, True, True, True),
        ({"bits": 8}, True, False, True),
        ({"bits": 3}, False, False, False),
        ({"bits": 2}, False, False, True),
        ({"sym": False}, False, True, True),
        ({"group_size": 16}, False, True, True),
        ({"layout": "gptq_v2"}, True, True, False),
        ({"layout": "awq", "sym": False}, True, False, True),
        ({"layout": "awq", "sym": False, "group_size": 16}, False, False, True),
        ({"layout": "compressed-tensors"}, True, False, True),
        ({"layout": "compressed-tensors", "sym": False}, True, False, False),
        ({"layout": "compressed-tensors", "bits": 3}, True, False, False),
        ({"layout": "compressed-tensors", "bits": 3, "sym": False}, False, False, False),
        ({"layout": "compressed-tensors", "group_size": 16}, False, False, False),
    ],
)
def test_who_loads_a_file(how, vllm, exllama, tgi):
    found = accepting(File(**how))
    assert {"llamero", "Transformers"} <= set(found)
    assert ("vLLM" in found, "ExLlamaV2" in found, "TGI" in found) == (vllm, exllama, tgi)
    assert "llama.cpp" not in found


def test_only_gguf_goes_to_llama_cpp():
    assert accepting(File(layout="gguf")) == ["llamero", "vLLM", "Transformers", "llama.cpp"]


def test_whoever_refuses_says_what():
    layouts = ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf", "exl2")
    for bits, group, order, sym, layout in product((2, 4), (-1, 16), ("none", "desc"), (True, False), layouts):
        for verdict in verdicts(File(bits, group, order, sym, layout)).values():
            assert verdict.loads or verdict.why
    assert accepting(File(layout="exl2")) == []


def test_remarks_group_files_and_pass_over_what_is_not_read_at_all():
    files = [File(actorder="desc"), File(bits=3), File(layout="gguf")]
    found = dict(remarks(files))
    assert found["vLLM refuses desc_act with groups"] == ["file"]
    assert found["Transformers with gptqmodel and optimum"] == ["file", "file"]
    assert not any(said.startswith(("llama.cpp", "ExLlamaV2 refuses gguf")) for said in found)
    assert "vLLM 0.32" in looked_at()
    assert "llamero" not in looked_at()


def test_a_verdict_names_what_else_is_needed():
    assert verdicts(File())["Transformers"].why == "with gptqmodel and optimum"
    assert verdicts(File(group_size=-1))["Transformers"].why == "with gptqmodel and optimum, on a GPU"
    assert verdicts(File(layout="awq"))["Transformers"].why == "with gptqmodel"
    assert verdicts(File(layout="gguf"))["vLLM"].why == "with vllm-gguf-plugin"
    assert len({loader.name for loader in LOADERS}) == len(LOADERS)
