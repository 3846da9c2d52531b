"""The command that turns one kind of model directory into another: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llamero.cli.display import Bars, out, size
from llamero.cli.options import Model, import_uninterrupted


def convert(
    source: Model,
    out_dir: Annotated[Path, Parameter(help="Directory to write; must not be there yet.")],
    *,
    to: Literal["hf", "meta", "megatron"],
    tensor: int = 1,
    pipeline: int = 1,
    shards: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    true_vocab: int | None = None,
    context: int | None = None,
    rope_factor: float | None = None,
    verify: bool = False,
) -> None:
    """Convert a model between Hugging Face, Meta and Megatron directories, or from GGUF, a tensor at a time.

    Parameters
    ----------
    to
        hf (config.json and safetensors), meta (params.json and consolidated.00.pth) or megatron (release).
    tensor
        Tensor ranks of a Megatron checkpoint.
    pipeline
        Pipeline ranks of a Megatron checkpoint.
    shards
        Files of a Meta directory.
    dtype
        Precision to write; the source's by default.
    true_vocab
        Rows of the vocabulary that are tokens; those after them, padding, are cut off.
    context
        Longest input in tokens, where a Meta or Megatron source does not say it.
    rope_factor
        Factor of `use_scaled_rope` in a Meta source: 8 (the default) in Llama 3.1, 32 in Llama 3.2.
    verify
        Compare the logits of both sides on random tokens; the output gets its name only if they agree.
    """
    from llamero.convert.config import ConvertConfig
    from llamero.core.config import parse
    from llamero.core.download import resolve_model

    keys = {"to": to, "tensor": tensor, "pipeline": pipeline, "shards": shards, "dtype": dtype}
    keys |= {"true_vocab": true_vocab, "context": context, "rope_factor": rope_factor, "verify": verify}
    options: ConvertConfig = parse(ConvertConfig, keys)
    directory = resolve_model(source)
    import_uninterrupted("llamero.convert.run")
    from llamero.convert.run import run

    with Bars():
        report = run(directory, out_dir, options)
    for note in report.notes:
        out.print(f"note: {note}", highlight=False, markup=False)
    if report.verified is not None:
        highest, mean = report.verified
        out.print(f"logits of both sides differ by at most {highest:.2e}, {mean:.2e} on average", highlight=False)
    out.print(f"{report.parameters:,} parameters, {report.kind} to {to}, in {out_dir}", soft_wrap=True)
    out.print(
        f"largest layer {size(report.largest_bytes)}, peak memory of the process {size(report.peak_bytes)}",
        highlight=False,
    )
