"""Which variants a model can become."""

from pathlib import Path

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.load import empty_model
from llamero.quantize.config import QuantizeConfig
from llamero.quantize.gguf_metadata import metadata
from llamero.quantize.variants import Variant, fitting, refuse_misfits
from llamero.quantize.write import widths


def choose(
    config: QuantizeConfig, shape: LlamaConfig, *, source: Path | None, where: str
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Return the variants that are made, and why some of the default ones cannot be, by name.

    Args:
        config: What is asked for.
        shape: Of the unquantized model.
        source: Its directory, or one with its tokenizer; `None` if there is none yet.
        where: What an error names.

    Raises:
        LlameroError: If a variant that the config names cannot be made, or none can.
    """
    layers = widths(empty_model(shape))
    if "variants" in config.model_fields_set:
        refuse_misfits(config.parsed(), layers, where=where)
        return config.parsed(), {}
    kept, left = fitting(config.parsed(), layers)
    if source is not None and (problem := _tokenizer_misfit(source, shape)):
        left |= {variant.name: f"its tokenizer: {problem}" for variant in kept if variant.layout == "gguf"}
        kept = tuple(variant for variant in kept if variant.layout != "gguf")
    if not kept:
        refuse_misfits(config.parsed(), layers, where=where)
    return kept, left


def _tokenizer_misfit(source: Path, shape: LlamaConfig) -> str:
    """Return why GGUF files cannot hold the tokenizer of a model, or nothing."""
    try:
        metadata(source, shape, "Q8_0")
    except LlameroError as error:
        return error.problem
    return ""
