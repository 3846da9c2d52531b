"""The command that measures a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llamero.cli.display import Bars, say_results
from llamero.cli.options import Model, import_uninterrupted
from llamero.core.errors import LlameroError


def evaluate(
    model: Model,
    *,
    tasks: str,
    data: Path | None = None,
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=False, negative=())] = (),
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    limit: int | None = None,
    subjects: int | None = None,
    truthfulqa: Literal["2021", "later"] | None = None,
    protocol: Literal["window", "llama.cpp"] | None = None,
    window: int | None = None,
    stride: int | None = None,
    template: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure a model.

    Parameters
    ----------
    tasks
        h4, arc_challenge, hellaswag, mmlu, truthfulqa_mc, perplexity, wikitext, samples or toy_world.
    data
        Directory of the benchmark files (for h4 and its parts).
    text
        Text file to measure perplexity on (perplexity, wikitext); may be given several times.
    prompt
        What to say to the model (samples); may be given several times.
    limit
        Questions of each task.
    subjects
        MMLU subjects to take, the first ones by name.
    truthfulqa
        Edition of TruthfulQA: 2021 by default, which the published scores used.
    protocol
        How perplexity is measured: a window that slides, or llama.cpp's chunks.
    window
        Tokens of a perplexity window, 512 by default.
    stride
        Tokens between windows, 256 by default.
    template
        Chat template of prompts (toy_world).
    json
        Also write the results to this file.
    """
    from llamero.core.download import resolve_model
    from llamero.core.results import write_file
    from llamero.evaluate.config import named

    given: dict[str, object] = {
        "data": None if data is None else str(data.resolve()),
        "texts": {path.name: str(path.resolve()) for path in text} or None,
        "prompts": list(prompt) or None,
        "limit": limit,
        "subjects": subjects,
        "truthfulqa": truthfulqa,
        "protocol": protocol,
        "window": window,
        "stride": stride,
    }
    task = named(tasks, {key: value for key, value in given.items() if value is not None})
    directory = resolve_model(model)
    if json is not None and not json.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=json.parent)
    import_uninterrupted("llamero.evaluate.run")
    from llamero.evaluate.run import run as measure

    with Bars():
        found = measure(task, model=directory, name=model, template=template, root=Path())
    say_results(found)
    if json is not None:
        write_file(json, found)
