"""What Transformers makes of our quantized directories, and we of those that others wrote: the same weights and logits.

GPTQ and AWQ through GPTQModel's kernels, compressed-tensors through its own library: `make peers` installs them.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamero.infer import score
from llamero.model.linear import PackedLinear
from llamero.model.load import load_model
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run

pytestmark = [pytest.mark.parity, pytest.mark.slow]

GPTQ = (
    "gptq-2bit-32g-actorder_True",
    "gptq-3bit-128g-actorder_True",
    "gptq-3bit-128g-actorder_static-asym-v2",
    "gptq-4bit--1g-actorder_True",
    "gptq-4bit-64g-actorder_static",
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-128g-actorder_True-v2",
    "gptq-4bit-128g-actorder_static-asym",
    "gptq-8bit--1g-actorder_False",
    "gptq-8bit-128g-actorder_True",
)
AWQ = ("awq-4bit-32g", "awq-4bit-128g")
COMPRESSED = (
    "gptq-4bit--1g-actorder_static-ct",
    "awq-4bit-128g-ct",
    *(f"gptq-{bits}bit-128g-actorder_static-ct" for bits in range(2, 9)),
    *(f"gptq-{bits}bit-32g-actorder_static-asym-ct" for bits in range(2, 9)),
)

BITSANDBYTES = ("int8", "nf4")

KERNELS = {"gptq-4bit--1g-actorder_True": {"bits": 4, "backend": "torch"}}
"""Kernels to ask GPTQModel for; the one that it chooses itself for rows of 768 channels on a CPU then refuses them."""


@pytest.fixture(scope="module")
def ours(two_layers, text, tmp_path_factory):
    """Directories of all variants, from one look at the text."""
    place = tmp_path_factory.mktemp("ours")
    config = QuantizeConfig.model_validate(
        {"variants": (*GPTQ, *AWQ, *COMPRESSED, *BITSANDBYTES), "calibration": {"text": "given.txt"}}
    )
    rows = list(text("valid", 16, 128))
    run(config, model=two_layers, out=lambda variant: place / variant.name, tokens=rows)
    return place


def read(peer, directories, questions, place, *, dtype="float32"):
    """Return what Transformers made of directories, by their names."""
    models = [
        {"model": path, "out": place / f"{path.name}.safetensors", "dtype": dtype, **KERNELS.get(path.name, {})}
        for path in directories
    ]
    done = peer.run("transformers_logits", tokens=questions[1], models=models)
    return {
        path.name: ({} if seen["problem"] else load_file(told["out"]), seen)
        for path, told, seen in zip(directories, models, done.answer["models"], strict=True)
    }


@pytest.fixture(scope="module")
def gptq_as_read(ours, peer, questions, tmp_path_factory):
    place = tmp_path_factory.mktemp("gptq")
    return read(peer("gptqmodel"), [ours / name for name in GPTQ], questions, place)


@pytest.fixture(scope="module")
def awq_as_read(ours, peer, questions, tmp_path_factory):
    place = tmp_path_factory.mktemp("awq")
    return read(peer("gptqmodel"), [ours / name for name in AWQ], questions, place, dtype="bfloat16")


@pytest.fixture(scope="module")
def compressed_as_read(ours, peer, questions, tmp_path_factory):
    place = tmp_path_factory.mktemp("compressed")
    return read(peer("llmcompressor"), [ours / name for name in COMPRESSED], questions, place)


@pytest.fixture(scope="module")
def bitsandbytes_as_read(ours, peer, questions, tmp_path_factory):
    place = tmp_path_factory.mktemp("bitsandbytes")
    return read(peer("bitsandbytes"), [ours / name for name in BITSANDBYTES], questions, place)


def logits(directory, questions, dtype):
    """Return ours."""
    model, ids = load_model(directory, dtype=dtype), questions[0]
    windows = score.documents([ids.shape[1]] * len(ids))
    with torch.inference_mode():
        hidden = score._windows_hidden(model, ids.flatten().tolist(), windows)
        return model.lm_head(hidden).float().view(*ids.shape, -1)


def packed_layers(directory):
    """Return the layers that rest as codes, as they are read from files."""
    return {name: layer for name, layer in load_model(directory).named_modules() if isinstance(layer, PackedLinear)}


def largest_gap(theirs, mine):
    return float((theirs - mine).abs().max() / mine.abs().max())


def near(mine, theirs):
    """Return whether weights are the same up to the bfloat16 in which bitsandbytes computes them on CPUs.

    Scale, code and product are rounded to it, up to a hundredth was seen; neighbouring codes are a quarter apart.
    """
    return torch.allclose(mine, theirs, rtol=2**-6, atol=0)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads_the_same_weights(ours, compressed_as_read, questions, name):
    theirs, seen = compressed_as_read[name]
    assert not seen["problem"]
    for layer, packed in packed_layers(ours / name).items():
        assert torch.equal(packed.dequantize(torch.float32), theirs[layer]), layer
    assert largest_gap(theirs["logits"], logits(ours / name, questions, torch.float32)) < 1e-5


@pytest.mark.parametrize("name", GPTQ)
def test_gptqmodel_reads_the_same_weights(ours, gptq_as_read, questions, name):
    theirs, seen = gptq_as_read[name]
    assert not seen["problem"]
    assert "Linear" not in seen["layers"]
    for layer, packed in packed_layers(ours / name).items():
        assert torch.equal(packed.dequantize(torch.float16).float(), theirs[layer]), layer
    assert largest_gap(theirs["logits"], logits(ours / name, questions, torch.float32)) < 1e-3


@pytest.mark.parametrize("name", AWQ)
def test_gptqmodel_reads_the_same_awq_weights(ours, awq_as_read, questions, name):
    theirs, seen = awq_as_read[name]
    assert not seen["problem"]
    assert "Linear" not in seen["layers"]
    for layer, packed in packed_layers(ours / name).items():
        assert torch.equal(packed.dequantize(torch.bfloat16).float(), theirs[layer]), layer
    assert largest_gap(theirs["logits"], logits(ours / name, questions, torch.bfloat16)) < 2e-2


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_reads_the_same_weights(ours, bitsandbytes_as_read, questions, name):
    theirs, seen = bitsandbytes_as_read[name]
    assert not seen["problem"]
    assert seen["layers"] == ["Linear8bitLt" if name == "int8" else "Linear4bit"]
    if name == "nf4":  # int8 rounds the rows of an identity too
        for layer, packed in packed_layers(ours / name).items():
            assert near(packed.dequantize(torch.float32), theirs[layer]), layer
    assert largest_gap(theirs["logits"], logits(ours / name, questions, torch.float32)) < TOLERANCES.get(name, 2e-3)


TOLERANCES = {"int8": 1e-2}
"""How far logits may be apart; LLM.int8 rounds activations to 8 bits too."""

WRITTEN = {
    "gptqmodel": {
        "gptq": ("gptqmodel_quantize", {"bits": 4, "group_size": 128, "sym": True, "desc_act": True}),
        "gptq-3bit-asym": ("gptqmodel_quantize", {"bits": 3, "group_size": 32, "sym": False, "desc_act": False}),
        "gptq-v2-8bit": (
            "gptqmodel_quantize",
            {"bits": 8, "group_size": 128, "sym": True, "desc_act": False, "format": "gptq_v2"},
        ),
    },
    "llmcompressor": {
        "gptq-static": ("llmcompressor_quantize", {"bits": 4, "group_size": 128, "sym": True, "actorder": "static"}),
        "rtn-3bit-asym": ("llmcompressor_quantize", {"bits": 3, "group_size": 32, "sym": False, "method": "rtn"}),
        "rtn-8bit-rows": ("llmcompressor_quantize", {"bits": 8, "group_size": -1, "sym": True, "method": "rtn"}),
    },
    "bitsandbytes": {
        "int8": ("bitsandbytes_quantize", {"method": "int8"}),
        "nf4": ("bitsandbytes_quantize", {"method": "nf4", "double": False}),
        "nf4-double": ("bitsandbytes_quantize", {"method": "nf4", "double": True}),
    },
}
"""What peers are asked to write, by peer and name: the script and what it is told."""


@pytest.fixture(scope="module", params=list(WRITTEN))
def written(request, peer, two_layers, text, questions, tmp_path_factory):
    """Directories that a peer wrote, and what Transformers makes of them in the same environment."""
    program, place = peer(request.param), tmp_path_factory.mktemp(request.param)
    tokens = place / "tokens.safetensors"
    save_file({"ids": text("valid", 16, 128).to(torch.int32)}, tokens)
    for name, (script, told) in WRITTEN[request.param].items():
        program.run(script, model=two_layers, out=place / name, tokens=tokens, **told)
    directories = [place / name for name in WRITTEN[request.param]]
    return place, read(program, directories, questions, tmp_path_factory.mktemp("read"))


def test_we_read_what_others_wrote(written, questions):
    place, seen = written
    for name, (theirs, about) in seen.items():
        assert not about["problem"], name
        mine = logits(place / name, questions, torch.float32)
        for layer, packed in packed_layers(place / name).items():
            if about["layers"] != ["Linear8bitLt"]:  # which rounds the rows of an identity too
                assert near(packed.dequantize(torch.float32), theirs[layer]), f"{name}: {layer}"
        assert largest_gap(theirs["logits"], mine) < TOLERANCES.get(name, 2e-3), name
