"""RoPE: what each way of stretching promises, from its own formula."""

import math

import pytest
import torch

from llamero.core.errors import LlameroError
from llamero.model import rope

THETA, HEAD, CONTEXT = 10000.0, 16, 64
PLAIN = torch.tensor([THETA ** (-2 * i / HEAD) for i in range(HEAD // 2)])


def built(kind, **keys):
    return rope.from_hf(
        {"rope_type": kind, "rope_theta": THETA, **keys}, head_dim=HEAD, context=CONTEXT, where="config.json"
    )


ALL = {
    "default": built("default"),
    "linear": built("linear", factor=4.0),
    "dynamic": built("dynamic", factor=4.0),
    "yarn": built("yarn", factor=4.0, original_max_position_embeddings=CONTEXT),
    "llama3": built(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=CONTEXT
    ),
}


@pytest.mark.parametrize("kind", ALL)
def test_what_is_written_to_a_config_is_read_back(kind):
    written = ALL[kind].to_hf()
    assert rope.from_hf(written, head_dim=HEAD, context=CONTEXT, where="config.json") == ALL[kind]


def test_rotation_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, HEAD, generator=generator) for _ in range(2))

    def score(i, j):
        turned = [
            rope.rotate(x, rope.rotations(torch.tensor([at]), ALL["default"].frequencies(CONTEXT)))
            for x, at in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_rotation_keeps_lengths_and_dtype():
    x = torch.randn(5, 2, HEAD, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rope.rotate(x, rope.rotations(torch.arange(5), ALL["default"].frequencies(CONTEXT)))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0)


def test_default_and_linear():
    torch.testing.assert_close(ALL["default"].frequencies(10**6), PLAIN)
    torch.testing.assert_close(ALL["linear"].frequencies(1), PLAIN / 4)


def test_dynamic_grows_with_the_sequence_and_never_within_the_original_context():
    dynamic = ALL["dynamic"]
    torch.testing.assert_close(dynamic.frequencies(CONTEXT), PLAIN)
    assert torch.equal(dynamic.frequencies(1), dynamic.frequencies(CONTEXT))
    theta = THETA * (4 * 128 / CONTEXT - 3) ** (HEAD / (HEAD - 2))
    expected = torch.tensor([theta ** (-2 * i / HEAD) for i in range(HEAD // 2)])
    torch.testing.assert_close(dynamic.frequencies(128), expected)


def test_llama3_keeps_fast_channels_and_slows_slow_ones():
    for plain, stretched in zip(PLAIN.tolist(), ALL["llama3"].frequencies(1).tolist(), strict=True):
        turns = CONTEXT * plain / (2 * math.pi)
        keep = min(max((turns - 1) / 3, 0), 1)
        assert stretched == pytest.approx(plain * keep + plain / 4 * (1 - keep), rel=1e-6)


def test_yarn_keeps_fast_channels_slows_slow_ones_and_sharpens():
    frequencies = ALL["yarn"].frequencies(1)
    assert float(frequencies[0]) == pytest.approx(float(PLAIN[0]))
    assert float(frequencies[-1]) == pytest.approx(float(PLAIN[-1]) / 4)
    assert ALL["yarn"].attention_scale == pytest.approx(0.1 * math.log(4) + 1)


def test_each_token_may_have_its_own_frequencies():
    own = torch.stack([PLAIN, PLAIN / 4])
    together = rope.rotations(torch.tensor([7, 9]), own)
    for row, position in enumerate((7, 9)):
        torch.testing.assert_close(together[row], rope.rotations(torch.tensor([position]), own[row])[0])


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("lineer", {}, "did you mean `linear`"),
        ("linear", {}, "lacks the key 'factor'"),
        ("linear", {"factor": 2.0, "extra": 1}, "does not know the key 'extra'"),
        ("default", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_parameters_that_are_not_understood_are_refused(kind, keys, message):
    with pytest.raises(LlameroError) as error:
        built(kind, **keys)
    assert message in str(error.value)
