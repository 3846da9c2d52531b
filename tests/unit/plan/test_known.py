import pytest

from llamero.core.errors import LlameroError
from llamero.plan.base import parameters
from llamero.plan.known import SHAPES, config_of, find

NUMBERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}
"""Parameters as the hub counts them."""


@pytest.mark.parametrize("name", list(SHAPES))
def test_known_shapes_have_as_many_parameters_as_published(name):
    assert parameters(config_of(name)) == (NUMBERS[name], NUMBERS[name])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("meta-llama/Llama-2-7b-chat-hf:main", "llama-2-7b"),
        ("huggyllama/llama-65b", "llama-65b"),
        ("upstage/llama-30b-instruct-2048", "llama-30b"),
        ("upstage/Llama-2-70b-instruct-v2", "llama-2-70b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama-3-70b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("codellama/CodeLlama-34b-Python-hf", "codellama-34b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tinyllama-1.1b"),
        ("gradientai/Llama-3-70B-Instruct-Gradient-1048k", None),  # another context: another model
        ("mistralai/Mistral-7B-v0.1", None),
        ("llama-3-8b", "llama-3-8b"),
    ],
)
def test_models_are_known_by_their_names(model, name):
    assert find(model) == name


def test_an_unknown_shape_is_refused_with_the_nearest():
    with pytest.raises(LlameroError) as error:
        config_of("llama-2-71b")
    assert "llama-2-7" in str(error.value.fix)
