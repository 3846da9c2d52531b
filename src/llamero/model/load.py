"""A model from a directory, and a directory from a model."""

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from llamero.checkpoint import bitsandbytes, hf, packed, peft
from llamero.core import gguf, progress
from llamero.core.errors import LlameroError
from llamero.model import gguf_files
from llamero.model.adapter_files import base_of, load_adapter
from llamero.model.adapters import LoraLinear
from llamero.model.bitsandbytes_files import under_our_names
from llamero.model.config import LlamaConfig, from_hf
from llamero.model.kquant_linear import make_room
from llamero.model.linear import LAYERS, PackedLinear, encode, make_ready, room
from llamero.model.llama import Block, Llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Products = Literal["fast", "plain"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(directory: Path) -> LlamaConfig:
    """Return the shape of the model in a directory, or in a GGUF file."""
    in_gguf = gguf.find(directory)
    if in_gguf is not None:
        return gguf_files.load_config(in_gguf)
    return from_hf(hf.read_config(directory), where=str(directory / "config.json"))


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pack: str | None = None,
    products: Products = "fast",
) -> Llama:
    """Return the model of a directory, in evaluation mode, tensor by tensor (peak = model + one tensor).

    The linear layers of a quantized directory stay packed and compute in the dtype of what comes in, as does all of a
    GGUF file that is made of blocks. The directory of an adapter is its base with the adapter attached.

    Args:
        directory: A Hugging Face model directory, quantized or not, or a GGUF file.
        dtype: Dtype of the weights and, where those are packed, of the computation; `None` keeps that of the files.
        device: Where to put it.
        pack: Form to encode the linear layers of decoder blocks in as they come (`linear.encode`).
        products: Whether packed layers may rest in another form than that of the files, which is faster to compute
            with (`kernels/low_bit.py`), or dequantize for every product.
    """
    if peft.is_adapter(directory):
        model = load_model(base_of(directory), dtype=dtype, device=device, pack=pack, products=products)
        load_adapter(model, directory)
        return model.eval()
    model, tensors, dtype = open_model(directory, dtype=dtype)
    fill(model, tensors, dtype=dtype, device=device, pack=pack)
    check_codes(model, tensors)
    if products == "fast":
        make_ready(model, model.model.norm.weight.dtype)
    return model.eval()


def open_model(directory: Path, *, dtype: torch.dtype | None = None) -> tuple[Llama, hf.Tensors, torch.dtype | None]:
    """Return a model without storage, with room for what its files hold packed; its tensors, and their dtype.

    Args:
        directory: A Hugging Face model directory, quantized or not, or a GGUF file.
        dtype: Dtype that is wanted; `None` keeps that of the files. Norms and tables of a GGUF file are of one dtype,
            whatever the file mixes.
    """
    in_gguf = gguf.find(directory)
    if in_gguf is not None:
        found = gguf_files.open_model(in_gguf)
        model, dtype = empty_model(found.config), dtype or found.dtype
        make_room(model, found.kinds, dtype=dtype)
        model.tie()
        return model, found.tensors, dtype
    model = empty_model(load_config(directory))
    layout = packed.read_format(directory)
    tensors = packed.open_tensors(directory, layout)
    if isinstance(layout, bitsandbytes.Format):
        tensors = _as_ours(model, tensors, layout)
    elif layout is not None:
        make_room_for_codes(model, tensors, layout)
    return model, tensors, dtype


def empty_model(config: LlamaConfig) -> Llama:
    """Return a model without storage, on the meta device."""
    with torch.device("meta"):
        return Llama(config)


def load_block(
    config: LlamaConfig,
    tensors: hf.Tensors,
    number: int,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
) -> Block:
    """Return one decoder layer, in evaluation mode, so that a model can be walked through layer by layer.

    Args:
        config: Shape of the model.
        tensors: Of the model.
        number: Of the layer.
        dtype: Of the parameters, `None` as they are stored.
        device: Where they go.
    """
    with torch.device("meta"):
        block = Block(config)
    for name, _ in list(block.named_parameters()):
        put(block, name, tensors, f"model.layers.{number}.{name}", dtype=dtype, device=device)
    return block.eval()


def _as_ours(model: Llama, tensors: hf.Tensors, layout: bitsandbytes.Format) -> hf.Tensors:
    """Replace the layers that the files hold packed by bitsandbytes, and return the tensors under their names."""
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in plain.items()}
    ours = under_our_names(tensors, layout, shapes)
    with torch.device("meta"):
        for name, layer in plain.items():
            if f"{name}.{layout.marker}" in tensors:
                bias = f"{name}.bias" in tensors
                model.set_submodule(name, room(layout, layer.in_features, layer.out_features, bias=bias))
    return ours


def make_room_for_codes(model: Llama, tensors: hf.Tensors, layout: packed.OnGrids) -> None:
    """Replace the layers that the files hold packed."""
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name in plain if f"{name}.{layout.marker}" in tensors]
    if not found:
        raise LlameroError(
            f"the config says that weights are packed, and no tensor is (`….{layout.marker}`)", where=tensors.directory
        )
    with torch.device("meta"):
        for name in found:
            # some writers give every packed layer a bias (of zeros), whatever the config says
            bias = f"{name}.bias" in tensors
            inputs, outputs = plain[name].in_features, plain[name].out_features
            model.set_submodule(name, room(layout, inputs, outputs, bias=bias))


def check_codes(model: Llama, tensors: hf.Tensors, prefix: str = "") -> None:
    """Refuse broken codes in the packed layers whose names begin so."""
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        if isinstance(module, tuple(LAYERS.values())) and (problem := module.problem()):
            raise LlameroError(f"`{name}`: {problem}", where=tensors.files[f"{name}.{module.layout.marker}"])


def fill(
    model: Llama,
    tensors: hf.Tensors,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    pack: str | None = None,
) -> None:
    """Give every parameter of a meta-device model its tensor; nothing may be missing or left over."""
    stored = stored_names(model, tensors)
    for name, source in progress.track(sorted(stored.items()), "load", unit="tensors"):
        put(model, name, tensors, source, dtype=dtype, device=device)
        if pack is not None and name.startswith("model.layers."):
            _pack_if_whole(model, name.rpartition(".")[0], pack)
    model.tie()


def _pack_if_whole(model: Llama, name: str, form: str) -> None:
    """Encode a plain linear layer that has all of its parameters."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear) and not any(parameter.is_meta for parameter in layer.parameters()):
        model.set_submodule(name, encode(layer, form))


def put(
    model: nn.Module,
    name: str,
    tensors: hf.Tensors,
    source: str,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Give one parameter, or one buffer of codes, its tensor."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    codes = leaf in dict(module.named_buffers(recurse=False))
    slot = module.get_buffer(leaf) if codes else module.get_parameter(leaf)
    tensor = tensors[source]
    if tensor.shape != slot.shape or (codes and tensor.is_floating_point() != slot.is_floating_point()):
        raise LlameroError(
            f"tensor `{source}` is {tuple(tensor.shape)} {tensor.dtype}, the config says {tuple(slot.shape)}"
            + (f" {slot.dtype}" if codes else ""),
            where=tensors.files[source],
        )
    if codes:
        module.register_buffer(leaf, tensor.to(device=device, copy=True))
    else:
        value = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        module.register_parameter(leaf, nn.Parameter(value))


def stored_names(model: Llama, tensors: hf.Tensors) -> dict[str, str]:
    """Return under which stored name each parameter is found; refuse what is missing or has no place.

    A tied weight may be stored as the embedding, as the head, or as both if they are equal. The
    frequencies that Llama-1 files carry are computed, so they are passed over.
    """
    stored = {name: name for name, _ in (*model.named_parameters(), *model.named_buffers())}
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
    """Write config.json and the weights of a model that is not packed and has no adapter."""
    if any(isinstance(module, PackedLinear | LoraLinear) for module in model.modules()):
        raise ValueError("a packed model, or one with an adapter, cannot be written as a plain one")
    named: dict[str, Tensor] = dict(model.named_parameters())
    specs = {name: hf.Spec(tuple(p.shape), dtype) for name, p in named.items()}
    hf.write_tensors(directory, specs, ((name, p.detach().to(dtype)) for name, p in named.items()))
    write_config(model.config, directory, dtype=dtype)


def write_config(config: LlamaConfig, directory: Path, *, dtype: torch.dtype) -> None:
    """Write config.json."""
    text = json.dumps(config.to_hf(dtype=str(dtype).removeprefix("torch.")), indent=2)
    (directory / "config.json").write_text(text + "\n")
