"""A model from a directory, and a directory from a model."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from llamero.checkpoint import hf
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig, from_hf
from llamero.model.llama import Llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(directory: Path) -> LlamaConfig:
    """Return the shape of the model in a directory."""
    return from_hf(hf.read_config(directory), where=str(directory / "config.json"))


def load_model(directory: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Llama:
    """Return the model of a directory, in evaluation mode, tensor by tensor (peak = model + one tensor).

    Args:
        directory: A Hugging Face model directory.
        dtype: Dtype of the weights; `None` keeps that of the files.
        device: Where to put it.
    """
    config = load_config(directory)
    tensors = hf.open_tensors(directory)
    with torch.device("meta"):
        model = Llama(config)
    fill(model, tensors, dtype=dtype, device=device)
    return model.eval()


def fill(model: Llama, tensors: hf.Tensors, *, dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Give every parameter of a meta-device model its tensor; nothing may be missing or left over."""
    stored = stored_names(model, tensors)
    for name, source in progress.track(sorted(stored.items()), "load", unit="tensors"):
        tensor = tensors[source]
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        expected = module.get_parameter(leaf).shape
        if tensor.shape != expected:
            raise LlameroError(
                f"tensor `{name}` is {tuple(tensor.shape)}, the config says {tuple(expected)}",
                where=tensors.files[source],
            )
        value = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        module.register_parameter(leaf, nn.Parameter(value))
    model.tie()


def stored_names(model: Llama, tensors: hf.Tensors) -> dict[str, str]:
    """Return under which stored name each parameter is found; refuse what is missing or has no place.

    A tied weight may be stored as the embedding, as the head, or as both if they are equal. The
    frequencies that Llama-1 files carry are computed, so they are passed over.
    """
    stored = {name: name for name, _ in model.named_parameters()}
    left = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - set(stored)
    if model.config.tie_word_embeddings and HEAD in left:
        if EMBEDDING not in tensors:
            stored[EMBEDDING] = HEAD
        elif not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise LlameroError(
                f"the config ties `{HEAD}` to `{EMBEDDING}`, and they differ",
                where=tensors.files[HEAD],
                fix="set `tie_word_embeddings: false` in config.json",
            )
        left.discard(HEAD)
    if left:
        name = min(left)
        raise LlameroError(f"tensor `{name}` has no place in this model", where=tensors.files[name])
    missing = sorted(source for source in stored.values() if source not in tensors)
    if missing:
        raise LlameroError(f"tensor `{missing[0]}` is missing ({len(missing)} are)", where=tensors.directory)
    return stored


def save_model(model: Llama, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and the weights of a model."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    specs = {name: hf.Spec(tuple(p.shape), dtype) for name, p in named.items()}
    hf.write_tensors(directory, specs, ((name, p.detach().to(dtype)) for name, p in named.items()))
    write_config(model.config, directory, dtype=dtype)


def write_config(config: LlamaConfig, directory: Path, *, dtype: torch.dtype) -> None:
    """Write config.json."""
    text = json.dumps(config.to_hf(dtype=str(dtype).removeprefix("torch.")), indent=2)
    (directory / "config.json").write_text(text + "\n")
