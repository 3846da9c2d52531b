"""Our GGUF files in llama.cpp: it reads every one as we do, gives every tensor the type that we give it, and what it
rounds of the same file with the same importances is not better than ours.
"""

import pytest
import torch
from safetensors.torch import save_file

from llamero.checkpoint.gguf_names import to_gguf
from llamero.core import gguf
from llamero.infer import score
from llamero.model.load import load_config, load_model
from llamero.quantize import calibrate, gguf_mix
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.run import run
from llamero.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.slow]

MIXES = tuple(gguf_mix.MIXES)
ROUNDED = tuple(name for name in MIXES if name not in gguf_mix.PLAIN)
WORDS = (
    "The tower is 324 metres tall, about the same height as an 81-storey building.\n\n  Ünïcode: 漢字, don't — 12,345"
)


@pytest.fixture(scope="module")
def calibration(text):
    return list(text("valid", 32, 256))


@pytest.fixture(scope="module")
def ours(trained, calibration, tmp_path_factory):
    """Our file of every mix, from one look at the text."""
    place = tmp_path_factory.mktemp("ours")
    names = [f"gguf-{mix}" for mix in MIXES]
    config = QuantizeConfig.model_validate({"variants": names, "calibration": {"text": "given.txt"}})
    run(config, model=trained, out=lambda variant: place / variant.name, tokens=calibration)
    files = {mix: gguf.find(place / f"gguf-{mix}") for mix in MIXES}
    return {mix: file for mix, file in files.items() if file is not None}


@pytest.fixture(scope="module")
def importances(trained, calibration, tmp_path_factory):
    """The importances that ours were rounded with, by tensor, as a file."""
    found = {}
    for layer in calibrate.Walk(trained, load_config(trained), calibration):
        for source, statistics in layer.statistics.items():
            for name in calibrate.INPUTS[source]:
                tensor = to_gguf(f"model.layers.{layer.number}.{name}.weight")
                found[tensor] = (statistics.second_moment.diagonal() / statistics.tokens).float().contiguous()
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.safetensors"
    save_file(found, path)
    return path


@pytest.fixture(scope="module")
def theirs(ours, importances, peer, tmp_path_factory):
    """llama.cpp's file of every mix, made of our file of F16."""
    place = tmp_path_factory.mktemp("theirs")
    files = [
        {"model": ours["F16"], "out": place / f"{mix}.gguf", "file_type": gguf_mix.MIXES[mix].file_type}
        for mix in ROUNDED
    ]
    peer("llamacpp").run("llamacpp_quantize", imatrix=importances, files=files)
    return {mix: place / f"{mix}.gguf" for mix in ROUNDED}


@pytest.fixture(scope="module")
def held_out(text, tmp_path_factory):
    ids, path = text("test", 8, 512), tmp_path_factory.mktemp("held_out") / "ids.safetensors"
    save_file({"ids": ids.to(torch.int32)}, path)
    return ids, path


@pytest.fixture(scope="module")
def heard(ours, peer, held_out):
    """What llama.cpp makes of our files."""
    done = peer("llamacpp").run("llamacpp_score", tokens=held_out[1], models=list(ours.values()), text=WORDS)
    return dict(zip(ours, done.answer["models"], strict=True))


@pytest.fixture(scope="module")
def agreement(trained, held_out):
    """Return how far a file is from the model, by our own reading of it."""
    reference, ids = load_model(trained, dtype=torch.float32), held_out[0]

    def measured(file):
        other = load_model(file, dtype=torch.float32)
        return score.compare(reference, other, ids.flatten().tolist(), windows(ids))

    return measured


def asked(ids):
    """Return how many tokens are predicted: all but the first of each row."""
    return ids.numel() - len(ids)


def windows(ids):
    return score.documents([ids.shape[1]] * len(ids))


def test_every_mix_was_made(ours):
    assert set(ours) == set(MIXES)


@pytest.fixture(scope="module")
def surprise(held_out):
    """Return how surprised we are by the text, per token, with a file."""
    found, ids = {}, held_out[0]

    def measured(file):
        if file not in found:
            model = load_model(file, dtype=torch.float32)
            found[file] = score.perplexity(model, ids.flatten().tolist(), windows(ids)).nll_sum / asked(ids)
        return found[file]

    return measured


@pytest.mark.parametrize("mix", MIXES)
def test_llama_cpp_is_as_surprised_by_a_text_as_we_are(ours, heard, held_out, surprise, mix):
    """Within a thousandth of the perplexity, though it rounds activations to 8 bits; with Q2_K that is felt most."""
    gap = heard[mix]["nll"] / asked(held_out[0]) - surprise(ours[mix])
    assert abs(gap) < (2e-3 if mix == "Q2_K" else 1e-3)


def test_what_llama_cpp_decodes_is_what_we_decode(ours, peer, held_out, surprise, tmp_path):
    """It makes float32 of our files itself and so rounds no activations: hardly any difference is left."""
    files = [{"model": ours[mix], "out": tmp_path / f"{mix}.gguf", "file_type": 0} for mix in ROUNDED]
    program, models = peer("llamacpp"), [each["out"] for each in files]
    program.run("llamacpp_quantize", files=files)
    done = program.run("llamacpp_score", tokens=held_out[1], models=models)
    for mix, said in zip(ROUNDED, done.answer["models"], strict=True):
        assert abs(said["nll"] / asked(held_out[0]) - surprise(ours[mix])) < 1e-4, mix


def test_llama_cpp_reads_the_same_tokens(trained, heard):
    expected = load_tokenizer(trained).encode(WORDS)
    assert len(expected) > 20
    assert all(each["tokens"] == expected for each in heard.values())


@pytest.mark.parametrize("mix", ROUNDED)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(trained, ours, theirs, mix):
    mine, other = (
        {name: spec.type.name for name, spec in gguf.read_header(file).specs.items()}
        for file in (ours[mix], theirs[mix])
    )
    assert mine == other
    assert set(gguf_mix.types(load_config(trained), mix).items()) <= set(mine.items())


@pytest.mark.parametrize("mix", ROUNDED)
def test_what_llama_cpp_rounds_is_not_better(ours, theirs, agreement, mix):
    mine, other = agreement(ours[mix]).kl, agreement(theirs[mix]).kl
    assert mine <= other * 1.005, f"{mix}: ours {mine:.4e}, llama.cpp's {other:.4e}"


def test_we_read_what_llama_cpp_wrote_as_it_does(theirs, peer, held_out, surprise):
    done = peer("llamacpp").run("llamacpp_score", tokens=held_out[1], models=list(theirs.values()))
    for mix, said in zip(theirs, done.answer["models"], strict=True):
        gap = said["nll"] / asked(held_out[0]) - surprise(theirs[mix])
        assert abs(gap) < (2e-3 if mix == "Q2_K" else 1e-3), mix
