"""A stretched context in GGUF means to llama.cpp what it means to us: whatever is written, both read the same model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from llamero.checkpoint.gguf_names import ROPE_FREQUENCIES, rows_to_gguf, to_gguf
from llamero.checkpoint.gguf_write import GgufWriter
from llamero.infer import score
from llamero.model.load import load_config, load_model
from llamero.model.rope import Linear, Llama3, Yarn
from llamero.quantize import gguf_metadata, gguf_sizes

pytestmark = [pytest.mark.parity, pytest.mark.slow]

ROPES = {
    "linear": Linear(10000.0, 32, 4.0),
    "yarn": Yarn(10000.0, 32, 4.0, 256),
    "yarn-attention": Yarn(10000.0, 32, 4.0, 256, attention_factor=1.48),
    "llama3": Llama3(10000.0, 32, 8.0, 256, 1.0, 4.0),
}
"""Of heads of 32 channels, as the trained model has them."""


@pytest.fixture(scope="module")
def held_out(text, tmp_path_factory):
    ids, path = text("test", 4, 512), tmp_path_factory.mktemp("held_out") / "ids.safetensors"
    save_file({"ids": ids.to(torch.int32)}, path)
    return ids, path


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The trained model with each scaling; it was not trained with any, so that they are seen in what it says."""
    place = tmp_path_factory.mktemp("scalings")
    model = load_model(trained, dtype=torch.float32)
    for name, rope in ROPES.items():
        config = replace(load_config(trained), rope=rope)
        specs = gguf_sizes.specs(config, "F16")
        values = gguf_metadata.metadata(trained, config, "F16").values
        with GgufWriter(place, name, values, specs) as writer:
            if isinstance(rope, Llama3):
                writer.add(ROPE_FREQUENCIES, rope.divisors())
            for ours, parameter in model.named_parameters():
                theirs = str(to_gguf(ours))
                rows = rows_to_gguf(ours, parameter.detach(), config.head_dim)
                writer.add(theirs, rows.half() if specs[theirs].type.name == "F16" else rows)
    return {name: place / f"{name}.gguf" for name in ROPES}


def test_llama_cpp_is_as_surprised_as_we_are(files, peer, held_out, trained):
    ids, path = held_out
    done = peer("llamacpp").run("llamacpp_score", tokens=path, models=list(files.values()))
    count = ids.numel() - len(ids)

    def surprise(model):
        found = score.perplexity(load_model(model, dtype=torch.float32), ids.flatten().tolist(), rows)
        return found.nll_sum / count

    rows = score.documents([ids.shape[1]] * len(ids))
    plain = surprise(trained)
    for name, said in zip(files, done.answer["models"], strict=True):
        mine = surprise(files[name])
        assert abs(said["nll"] / count - mine) < 1e-3, name
        assert abs(mine - plain) > 0.01, f"{name} changes nothing"
