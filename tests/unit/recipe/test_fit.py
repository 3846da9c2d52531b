"""What cannot work with the base is refused before the first step."""

import json

import pytest

from llamero.core.errors import LlameroError
from llamero.recipe.fit import refuse_what_does_not_fit, without_misfits
from llamero.recipe.load import load
from llamero.text.tokenizer import train_bpe

SCRATCH = """\
name: small
base:
  shape: {hidden: 32, layers: 1, heads: 2, mlp: 96, context: 64}
  vocabulary: {size: 300, mixture: world}
template: chatml
data:
  extra_tokens: ["<|im_start|>", "<|im_end|>"]
  mixtures:
    world: {sources: [{toy_world: documents, count: 10}]}
train: [{name: lm, objective: lm, mixture: world, sequence: 32, steps: 2}]
quantize: {calibration: {mixture: world, sequence: 16, tokens: 64}, variants: [rtn-4bit-16g]}
evaluate: [{tasks: perplexity, texts: {page: page.txt}, window: 32, stride: 16}]
"""


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "recipe.yaml").write_text(SCRATCH)
    return lambda *overrides: load(tmp_path / "recipe.yaml", overrides)


def test_what_fits_passes(scratch):
    refuse_what_does_not_fit(scratch(), None)


@pytest.mark.parametrize(
    ("override", "where", "problem", "fix"),
    [
        ("train.lm.sequence=65", "train.lm.sequence", "65 tokens are more than the model's context of 64", "lower it"),
        ("quantize.calibration.sequence=64", None, "", ""),
        ("evaluate.0.window=128", "evaluate.0.window", "128 tokens are more", "lower it"),
        (
            "quantize.variants=[rtn-4bit-64g]",
            "quantize.variants",
            "variant `rtn-4bit-64g`: groups of 64 do not divide 32 input channels",
            "group sizes that divide every layer: 16, 32, -1",
        ),
        ("parallel={gpus: 3, tensor: 3}", "parallel", "`tensor: 3` does not divide the 2 attention heads", "1, 2"),
        ("parallel={gpus: 2, pipeline: 2}", "parallel", "makes 2 pieces of 1 layers", "`pipeline:` one of 1"),
        (
            "base.shape.mlp=48",
            "quantize.variants",
            "variant `rtn-4bit-16g`: 48 channels; its readers need a multiple of 32",
            "",
        ),
        ("base.shape.kv_heads=1", "quantize.variants", "16 channels; its readers", ""),
        ("base.shape.heads=3", "base.shape", "hidden 32 with 3 heads and 3 key/value heads", "twice the heads"),
        ("data.extra_tokens=[]", "template", "needs the tokens <|im_start|>, <|im_end|>", "add them"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(scratch, override, where, problem, fix):
    if where is None:
        refuse_what_does_not_fit(scratch(override), None)
        return
    with pytest.raises(LlameroError, match=problem) as caught:
        refuse_what_does_not_fit(scratch(override), None)
    assert caught.value.where == where
    assert fix in str(caught.value.fix)


def test_default_variants_that_the_base_cannot_become_are_left_out(scratch):
    recipe = scratch("quantize={calibration: {mixture: world, sequence: 16, tokens: 64}}")
    fewer, left = without_misfits(recipe, None)
    assert fewer.quantize is not None
    assert fewer.quantize.variants == (
        "gptq-4bit--1g-actorder_True",
        "gptq-4bit-32g-actorder_True",
        "gptq-4bit-32g-actorder_static",
        "gptq-3bit--1g-actorder_True",
        "gptq-3bit--1g-actorder_static-ct",
        "awq-4bit-32g",
        *(f"gguf-{mix}" for mix in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")),
    )
    assert left["gptq-4bit-64g-actorder_True"] == "groups of 64 do not divide 32 input channels"
    refuse_what_does_not_fit(fewer, None)
    named = scratch()
    assert without_misfits(named, None) == (named, {})
    measured = (
        "evaluate=[{tasks: perplexity, texts: {page: page.txt}, window: 32, stride: 16, models: [awq-4bit-128g]}]"
    )
    with pytest.raises(LlameroError, match="`awq-4bit-128g` cannot be made"):
        without_misfits(scratch("quantize={calibration: {mixture: world, sequence: 16, tokens: 64}}", measured), None)


def test_a_tokenizer_that_gguf_files_cannot_hold_leaves_them_out(scratch, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "hidden_size": 32}
    config |= {"intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = scratch("base=here", "quantize={calibration: {mixture: world, sequence: 16, tokens: 64}}")
    fewer, left = without_misfits(recipe, tmp_path)
    assert fewer.quantize is not None
    assert not any(name.startswith("gguf") for name in fewer.quantize.variants)
    assert left["gguf-Q4_K_M"].startswith("its tokenizer: ")


def test_a_base_on_disk_is_asked_for_its_context(scratch, tmp_path):
    config = {"max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 1, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlameroError, match="context of 16"):
        refuse_what_does_not_fit(scratch("base=here"), tmp_path)


def test_a_base_in_gguf_is_refused_before_anything_is_made(scratch, tmp_path):
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(LlameroError, match=r"the base is a model in GGUF \(base\.gguf\)") as caught:
        refuse_what_does_not_fit(scratch("base=base.gguf"), tmp_path / "base.gguf")
    assert "llamero convert" in str(caught.value.fix)


def test_a_token_that_is_ordinary_text_of_the_base_is_refused(scratch, tmp_path):
    train_bpe(iter(["the cat " * 9]), vocab_size=262).save(tmp_path)
    tokens = 'data.extra_tokens=["<|im_start|>", "<|im_end|>", "{}"]'
    refuse_what_does_not_fit(scratch("base=here", tokens.format("<cat>")), tmp_path)
    with pytest.raises(LlameroError, match="'cat' is ordinary text"):
        refuse_what_does_not_fit(scratch("base=here", tokens.format("cat")), tmp_path)


RULES = [
    ("evaluate=[{tasks: perplexity, validation: [world]}]", "mixture `world` keeps no validation samples"),
    ("train.lm.eval_every=5", "mixture `world` keeps no validation samples"),
    ("template=chatmll", "there is no template `chatmll`"),
    ("evaluate.0.models=[variants]", None),
]


@pytest.mark.parametrize(("override", "problem"), RULES)
def test_rules_between_parts_of_a_recipe(scratch, override, problem):
    if problem is None:
        scratch(override)
        return
    with pytest.raises(LlameroError, match=problem):
        scratch(override)
