import json

import pytest
import torch

from llamero.checkpoint import hf, peft
from llamero.core.errors import LlameroError

SAID = peft.Adapter(base="owner/base", rank=2, alpha=3.0, targets=("q_proj", "v_proj"))


def config(directory, **keys):
    """An adapter_config.json as PEFT writes it, with some keys changed."""
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    empty = {"use_dora": False, "rank_pattern": {}, "loftq_config": {}, "lora_bias": False, "layer_replication": None}
    written = {**known, **empty, **keys}
    (directory / "adapter_config.json").write_text(json.dumps({k: v for k, v in written.items() if v != "left out"}))
    return directory


@pytest.mark.parametrize(
    "said",
    [
        SAID,
        peft.Adapter("", 1, 0.5, r".*q_proj", True, 0.1, ("embed_tokens", "lm_head"), gaussian=True, tied=True),
    ],
)
def test_what_is_written_is_read(tmp_path, said):
    tensors = {"model.layers.0.q_proj.lora_A.weight": torch.randn(2, 3), "lm_head.weight": torch.randn(4, 3).bfloat16()}
    peft.write(tmp_path / "new", said, tensors)
    assert peft.is_adapter(tmp_path / "new")
    assert not peft.is_adapter(tmp_path)
    assert peft.read(tmp_path / "new") == said
    stored = peft.open_tensors(tmp_path / "new")
    assert {name.removeprefix("base_model.model.") for name in stored} == set(tensors)
    assert all(torch.equal(stored[f"base_model.model.{name}"], value) for name, value in tensors.items())
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_older_files_are_read(tmp_path):
    torch.save({"base_model.model.x": torch.ones(2)}, tmp_path / "adapter_model.bin")
    (tmp_path / "optimizer.bin").write_bytes(b"no concern of ours")
    assert torch.equal(peft.open_tensors(tmp_path)["base_model.model.x"], torch.ones(2))


def test_an_adapter_without_weights_says_what_is_missing(tmp_path):
    hf.write_tensors(tmp_path, {"x": hf.Spec((1,), torch.float32)}, [("x", torch.ones(1))], stem="model")
    with pytest.raises(LlameroError, match=r"no adapter_model.safetensors and no adapter_model.bin"):
        peft.open_tensors(tmp_path)


def test_the_scale_follows_the_rank_or_its_root():
    assert SAID.scale == 1.5
    assert peft.Adapter("", 4, 3, (), rslora=True).scale == 1.5


@pytest.mark.parametrize(
    ("keys", "covered"),
    [
        ({}, "0.q 0.v 1.q 1.v"),
        ({"target_modules": r".*\.1\.self_attn\..*"}, "1.q 1.k 1.v"),
        ({"exclude_modules": ["1.self_attn.q_proj"]}, "0.q 0.v 1.v"),
        ({"exclude_modules": r".*v_proj"}, "0.q 1.q"),
        ({"layers_to_transform": 1}, "1.q 1.v"),
        ({"layers_to_transform": [0]}, "0.q 0.v"),
        ({"target_modules": ["layers.0.self_attn.k_proj"]}, "0.k"),
        ({"target_modules": ["proj"]}, ""),
    ],
)
def test_layers_are_chosen_as_peft_does(tmp_path, keys, covered):
    said = peft.read(config(tmp_path, **keys))
    names = {f"{n}.{which}": f"model.layers.{n}.self_attn.{which}_proj" for n in "01" for which in "qkv"}
    assert " ".join(short for short, name in names.items() if said.covers(name)) == covered


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type: IA3"),
        ({"use_dora": True}, "`use_dora: True` is not understood"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"bias": "all"}, "`bias: all`"),
        ({"new_in_2030": 1}, "new_in_2030"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"init_lora_weights": None}, "changes the base's weights"),
        ({"r": 0}, "are not a rank"),
        ({"lora_alpha": "left out"}, "are not a rank"),
    ],
)
def test_what_may_change_the_result_is_refused_by_name(tmp_path, keys, says):
    with pytest.raises(LlameroError, match=says) as caught:
        peft.read(config(tmp_path, **keys))
    assert "adapter_config.json" in str(caught.value)


def test_a_broken_config_is_named_with_its_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{\n"r": }')
    with pytest.raises(LlameroError, match=r"adapter_config\.json:2"):
        peft.read(tmp_path)
