import json
import stat

import pytest
import torch

from llamero.checkpoint import gptq, hf, packed
from llamero.checkpoint.codes import GroupCodes, pack
from llamero.core.errors import LlameroError


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zeros_are_the_words_that_everybody_writes(bits, word):
    zeros = torch.full((32, 2), 2 ** (bits - 1), dtype=torch.uint8)
    codes = GroupCodes(
        torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2).half(), zeros, torch.arange(64) // 32, bits
    )
    assert set((gptq.Format(codes.bits, -1).encode(codes)["qzeros"].flatten().long() & 0xFFFFFFFF).tolist()) == {word}


@pytest.mark.parametrize("bits", gptq.BITS)
def test_zeros_are_read_as_they_were_written(bits):
    zeros = torch.arange(64, dtype=torch.uint8).view(32, 2) % (2**bits - 1) + 1
    codes = GroupCodes(
        torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2).half(), zeros, torch.arange(64) // 32, bits
    )
    stored = gptq.Format(codes.bits, -1).encode(codes)["qzeros"]
    assert torch.equal(gptq.decode_zeros(stored, bits, offset=1), zeros.T)
    assert torch.equal(gptq.decode_zeros(stored, bits, offset=0), zeros.T - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_borrow_between_zeros_is_given_back(bits):
    zeros = (torch.arange(32)[:, None] % 2**bits).to(torch.uint8)  # with zeros among them
    ones = int(pack(torch.ones(32 // bits, 1, dtype=torch.uint8), bits))
    words = (pack(zeros, bits).long() - ones).to(torch.int32).T  # subtracted from whole words
    assert torch.equal(gptq.decode_zeros(words, bits, offset=1), zeros.T)


def test_a_zero_point_of_zero_is_never_written():
    codes = GroupCodes(
        torch.zeros(32, 32, dtype=torch.uint8),
        torch.ones(32, 1).half(),
        torch.zeros(32, 1, dtype=torch.uint8),
        torch.zeros(32),
        4,
    )
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq.Format(codes.bits, -1).encode(codes)


PLAIN = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True, "quant_method": "gptq"}


@pytest.mark.parametrize(
    ("change", "offset"),
    [({}, 1), ({"checkpoint_format": "gptq"}, 1), ({"checkpoint_format": "gptq_v2"}, 0), ({"format": "gptq_v2"}, 0)],
)
def test_both_layouts_are_told_apart(change, offset):
    assert packed.parse_format({**PLAIN, **change}, where="x") == gptq.Format(4, 128, offset)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "hqq"}, "quantized with `hqq`"),
        ({"bits": 5}, "`bits: 5`"),
        ({"group_size": 0}, "`group_size: 0`"),
        ({"checkpoint_format": "marlin"}, "layout `marlin`"),
        ({"dynamic": {"down": {"bits": 8}}}, "`dynamic: "),
        ({"shuffle": 1}, "`shuffle: 1` is not understood"),
    ],
)
def test_what_is_not_understood_is_refused(change, says):
    with pytest.raises(LlameroError, match=says) as caught:
        packed.parse_format({**PLAIN, **change}, where="config.json")
    assert caught.value.where == "config.json"
    assert caught.value.fix


def test_keys_of_auto_round_are_understood():
    told = {"provider": "auto-round", "autoround_version": "0.15.1", "data_type": "int"}
    granular = {"static_kv_granularity": "tensor", "static_attention_granularity": "tensor"}
    assert packed.parse_format({**PLAIN, **told, **granular}, where="x") == gptq.Format(4, 128, 1)
    with pytest.raises(LlameroError, match="`data_type: fp` is not understood"):
        packed.parse_format({**PLAIN, "data_type": "fp"}, where="x")


def test_older_directories_describe_themselves_beside_the_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert packed.read_format(tmp_path) is None
    old = {"bits": 4, "group_size": -1, "desc_act": False, "sym": True, "damp_percent": 0.1}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    assert packed.read_format(tmp_path) == gptq.Format(4, -1, 1)


def test_our_own_config_is_understood_and_names_no_path():
    keys = gptq.Format(4, 128).config(sym=True, actorder="desc", damp=0.1)
    assert packed.parse_format(keys, where="x") == gptq.Format(4, 128, 1)
    assert "/" not in json.dumps(keys)
    assert "damp_percent" not in gptq.Format(4, 128).config(sym=True)


def shards(directory, **how):
    specs = {name: hf.Spec((4,), torch.float32) for name in "abc"}
    return hf.ShardWriter(directory, specs, **how)


def test_shards_are_readable_by_everybody_and_indexed(tmp_path):
    with shards(tmp_path, shard_bytes=40) as writer:
        for i, name in enumerate("abc"):
            writer.add(name, torch.full((4,), float(i)))
    assert [stat.S_IMODE(path.stat().st_mode) for path in writer.paths] == [0o644, 0o644]
    tensors = hf.open_tensors(tmp_path)
    assert [tensors[name][0].item() for name in "abc"] == [0, 1, 2]


def test_shards_take_only_what_was_announced(tmp_path):
    with pytest.raises(ValueError, match="announced b "), shards(tmp_path) as writer:
        writer.add("b", torch.zeros(5))
    with pytest.raises(ValueError, match="announced and never came: b, c"), shards(tmp_path) as writer:
        writer.add("a", torch.zeros(4))
    with shards(tmp_path) as writer:
        for name in "abc":
            writer.add(name, torch.zeros(4))
        with pytest.raises(ValueError, match="d was not announced"):
            writer.add("d", torch.zeros(4))
