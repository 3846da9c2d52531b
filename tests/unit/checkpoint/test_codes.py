import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamero.checkpoint import awq, compressed_tensors, gptq, packed
from llamero.checkpoint.codes import GroupCodes, pack, unpack
from llamero.core.errors import LlameroError


def bits_of(words):
    """The bits of each column of int32 words, the first one first."""
    as_bytes = np.ascontiguousarray(words.T).view(np.uint8)  # (columns, bytes)
    return np.unpackbits(as_bytes, axis=1, bitorder="little")


@given(st.sampled_from([2, 3, 4, 5, 6, 7, 8]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_codes_survive_packing_and_lie_as_one_bit_stream(bits, periods, columns, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (32 * periods, columns), dtype=np.uint8))
    stream = pack(codes, bits)
    assert torch.equal(unpack(stream, bits), codes)
    digits = bits_of(stream.numpy()).reshape(columns, -1, bits)
    assert np.array_equal((digits * (1 << np.arange(bits))).sum(-1).T, codes.numpy())


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="33 codes of 4 bits"):
        pack(torch.zeros(33, 1, dtype=torch.uint8), 4)


def made(bits, group_size, *, sym, low=0, shuffled=False):
    """Random codes of 64 outputs and 96 inputs."""
    random = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else 96 // group_size
    zeros = torch.randint(low, 2**bits, (64, groups), generator=random)
    group = torch.arange(96) // (96 // groups)
    return GroupCodes(
        torch.randint(0, 2**bits, (64, 96), generator=random).to(torch.uint8),
        torch.rand(64, groups, generator=random).half(),
        (torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros).to(torch.uint8),
        (group[torch.randperm(96, generator=random)] if shuffled else group).to(torch.int32),
        bits,
    )


FORMATS = [
    *((gptq.Format(bits, 32, offset), offset) for bits in gptq.BITS for offset in (0, 1)),
    (gptq.Format(4, -1), 1),
    *((awq.Format(size), 0) for size in (32, 16, -1)),  # 16: what a variant's name may say
    *((compressed_tensors.Format(bits, 32, sym), 0) for bits in compressed_tensors.BITS for sym in (True, False)),
    (compressed_tensors.Format(3, -1, False), 0),
]


@pytest.mark.parametrize(("layout", "low"), FORMATS, ids=str)
def test_every_format_returns_what_it_was_given(layout, low):
    sym = getattr(layout, "sym", False)
    weight = made(layout.bits, layout.group_size, sym=sym, low=low)
    stored = layout.encode(weight)
    specs = layout.specs(96, 64)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert layout.marker in stored
    assert all(tensor.is_contiguous() for tensor in stored.values())
    read = layout.decode(stored)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(read, name), getattr(weight, name)), name
    assert read.bits == weight.bits


@pytest.mark.parametrize(("layout", "low"), FORMATS, ids=str)
def test_every_format_is_read_from_its_own_config(layout, low):
    keys = layout.config(sym=getattr(layout, "sym", False))
    assert packed.parse_format(keys, where="here") == layout
    assert "/" not in str(keys)


def test_codes_of_awq_lie_where_its_readers_look_for_them():
    """Nibble k of a word holds output 8c + [0, 2, 4, 6, 1, 3, 5, 7][k] (AutoAWQ, WQLinear_GEMM)."""
    weight = made(4, 32, sym=False)
    stored = awq.Format(32).encode(weight)
    for what, name in ((weight.codes.T, "qweight"), (weight.zeros.T, "qzeros")):
        words = stored[name].numpy().astype(np.int64) & 0xFFFFFFFF
        for row, column in np.ndindex(*what.shape):
            nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
            assert words[row, column // 8] >> (4 * nibble) & 0xF == what[row, column]


def test_codes_of_compressed_tensors_are_the_stream_of_each_row():
    weight = made(3, 32, sym=False)
    stored = compressed_tensors.Format(3, 32, False).encode(weight)
    digits = bits_of(stored["weight_packed"].numpy().T).reshape(64, 96, 3)
    assert np.array_equal((digits * [1, 2, 4]).sum(-1), weight.codes.numpy())
    digits = bits_of(stored["weight_zero_point"].numpy()).reshape(3, 64, 3)
    assert np.array_equal((digits * [1, 2, 4]).sum(-1).T, weight.zeros.numpy())
    assert stored["weight_shape"].tolist() == [64, 96]


@pytest.mark.parametrize("layout", [awq.Format(32), compressed_tensors.Format(4, 32, False)], ids=str)
def test_groups_that_do_not_lie_side_by_side_need_a_format_that_says_so(layout):
    with pytest.raises(ValueError, match="neighbouring channels"):
        layout.encode(made(4, 32, sym=False, shuffled=True))


def test_what_a_format_cannot_hold_is_no_silent_rounding():
    with pytest.raises(ValueError, match="bfloat16 cannot hold"):
        compressed_tensors.Format(4, 32, True, torch.bfloat16).encode(made(4, 32, sym=True))
    with pytest.raises(ValueError, match="not in the middle"):
        compressed_tensors.Format(4, 32, True).encode(made(4, 32, sym=False))
    with pytest.raises(ValueError, match="4-bit"):
        awq.Format(32).encode(made(3, 32, sym=False))


CT = compressed_tensors.Format(4, 32, True).config(sym=True)
AWQ = awq.Format(128).config(sym=False)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (AWQ | {"version": "gemv"}, "layout `gemv`"),
        (AWQ | {"bits": 8}, "`bits: 8`"),
        (AWQ | {"group_size": 0}, "`group_size: 0`"),
        (AWQ | {"zero_point": False}, "`zero_point` is not true"),
        (AWQ | {"new": 1}, "`new: 1`"),
        (CT | {"format": "int-quantized"}, "format `int-quantized`"),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (CT | {"config_groups": {}}, "one group of layers"),
        (CT | {"config_groups": {"a": CT["config_groups"]["group_0"] | {"targets": ["re:.*up"]}}}, "targets"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(keys, says):
    with pytest.raises(LlameroError, match=says):
        packed.parse_format(keys, where="config.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_bits": 9}, "num_bits: 9"), ({"strategy": "token"}, "strategy"), ({"actorder": "group"}, "actorder"),
     ({"group_size": None}, "group_size: None"), ({"dynamic": True}, "dynamic")],
)  # fmt: skip
def test_weights_of_compressed_tensors_that_are_not_understood_are_refused(change, says):
    group = CT["config_groups"]["group_0"]
    with pytest.raises(LlameroError, match=says):
        packed.parse_format(
            CT | {"config_groups": {"g": group | {"weights": group["weights"] | change}}}, where="config.json"
        )
