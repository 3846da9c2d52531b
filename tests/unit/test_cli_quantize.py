"""llamero quantize: what it says before and after the work."""

import json

import pytest

from llamero.cli import main

LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_007,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
RECIPE = """
name: tiny
base:
  shape: {hidden: 32, layers: 1, heads: 1, mlp: 96, context: 64}
  vocabulary: {size: 300, mixture: world}
data: {mixtures: {world: {sources: [{toy_world: documents, count: 10}]}}}
train: [{name: lm, objective: lm, mixture: world, sequence: 32, steps: 2}]
quantize:
  calibration: {mixture: world, sequence: 16, tokens: 64}
  variants: [rtn-4bit-16g, gptq-3bit--1g-actorder_True]
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_70B))
    return str(tmp_path / "config.json")


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", *arguments])
    return stopped.value.code


def test_a_config_is_enough_to_say_sizes_and_loaders(config, capsys):
    assert call(config, "--plan") == 0
    said = capsys.readouterr().out
    rows = {line.split()[1]: line.split() for line in said.splitlines() if line.startswith("│ gptq")}
    assert rows["gptq-4bit--1g-actorder_True"][3:7] == ["35.33", "GB", "│", "35.32"]
    assert rows["gptq-3bit--1g-actorder_True"][3:] == ["26.78", "GB", "│", "26.76", "GB", "│", "Transformers", "│"]
    assert "vLLM refuses desc_act with groups: gptq-4bit-32g-actorder_True, gptq-4bit-64g" in said
    assert "Transformers with gptqmodel: awq-4bit-128g, awq-4bit-32g" in said


def test_a_plan_is_there_as_json(config, capsys):
    assert (
        call(config, "--plan", "--json", "--variant", "gptq-3bit--1g-actorder_True", "--variant", "awq-4bit-128g") == 0
    )
    said = json.loads(capsys.readouterr().out)
    gptq, awq = said["variants"]
    assert gptq["name"] == "gptq-3bit--1g-actorder_True"
    assert gptq["as_published"] == 26_775_210_816
    assert gptq["loaders"]["vLLM"] == {"loads": False, "why": "3 bits (of GPTQ files it takes 4 and 8)"}
    assert awq["loaders"]["llama.cpp"] == {"loads": False, "why": "awq files"}
    assert said["left_out"] == {}


def test_a_recipe_is_planned_with_its_own_variants(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert call(str(tmp_path / "recipe.yaml"), "--plan", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in said["variants"]] == ["rtn-4bit-16g", "gptq-3bit--1g-actorder_True"]
    assert call(str(tmp_path / "recipe.yaml"), "--plan", "--json", "--variant", "awq-4bit-32g") == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["variants"]] == ["awq-4bit-32g"]


def test_what_does_not_divide_is_left_out_of_the_default_set_and_said(tmp_path, capsys):
    small = LLAMA_2_70B | {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert call(str(tmp_path / "config.json"), "--plan") == 0
    said = capsys.readouterr().out
    assert "5 of the default variants cannot be made of this model:" in said
    assert "  gptq-3bit-128g-actorder_True: groups of 128 do not divide 64 input channels" in said
    assert call(str(tmp_path / "config.json"), "--plan", "--variant", "awq-4bit-128g") == 2
    assert "groups of 128 do not divide" in capsys.readouterr().err


@pytest.mark.parametrize(("bfloat16", "disk"), [(True, "8.59 GB"), (False, "17.18 GB")])
def test_what_waits_on_disk_is_told_in_the_arithmetic_of_this_machine(config, capsys, monkeypatch, bfloat16, disk):
    monkeypatch.setattr("llamero.quantize.config.multiplies_bfloat16", lambda: bfloat16)
    assert call(config, "--plan", "--tokens", "262144", "--variant", "awq-4bit-128g") == 0
    assert f"{disk} of disk while it lasts" in " ".join(capsys.readouterr().out.split())
