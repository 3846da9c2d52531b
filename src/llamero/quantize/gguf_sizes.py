"""What a GGUF file of a model holds, from its shape alone: names, shapes, types, bytes."""

from llamero.checkpoint.gguf import TYPES, TensorSpec
from llamero.checkpoint.gguf_names import ROPE_FREQUENCIES, to_gguf
from llamero.checkpoint.gguf_write import sizes
from llamero.model.config import LlamaConfig
from llamero.model.load import empty_model
from llamero.model.rope import Llama3
from llamero.quantize import gguf_mix


def specs(config: LlamaConfig, mix: str, *, imatrix: bool = True) -> dict[str, TensorSpec]:
    """Return shape and type of every tensor, in the order of the file.

    Args:
        config: Shape of the model.
        mix: A name of `gguf_mix.MIXES`.
        imatrix: As of `gguf_mix.types`.
    """
    kinds = gguf_mix.types(config, mix, imatrix=imatrix)
    found: dict[str, TensorSpec] = {}
    if isinstance(config.rope, Llama3):
        found[ROPE_FREQUENCIES] = TensorSpec((config.head_dim // 2,), TYPES["F32"])
    for ours, parameter in empty_model(config).named_parameters():
        name = to_gguf(ours)
        if name is None:
            raise ValueError(f"{ours} has no name in GGUF")
        found[name] = TensorSpec(tuple(parameter.shape), TYPES[kinds.get(name, "F32")])
    return found


def size(config: LlamaConfig, mix: str, *, imatrix: bool = True) -> int:
    """Return the bytes of the file but for its metadata, which is the tokenizer and a few hundred bytes."""
    return sum(sizes({}, specs(config, mix, imatrix=imatrix)))
