"""Sampling reports of OpenAssistant: prompts, configurations and reports on disk, byte for byte as published.

Layout of github.com/Open-Assistant/oasst-model-eval: prompts are JSON strings, one a line; a configuration is a
default that each of its parts overlays; a report is JSON, indented by two, everything beyond ASCII escaped, without a
newline at its end.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Configuration:
    """One way to sample: what `generate` is told, and what stands around a prompt."""

    name: str
    generate_args: Mapping[str, Any] = field(default_factory=dict)
    pre_text: str | None = None
    """Text before the prompt: a system message."""
    human_name: str | None = None
    bot_name: str | None = None
    add_prefix_tokens: bool | None = None


@dataclass(frozen=True)
class Outputs:
    """What a model said to one prompt, sampled in one way."""

    sampling_config: str
    sampling_params: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A prompt and all that was said to it."""

    prompt: str
    results: tuple[Outputs, ...]


@dataclass(frozen=True)
class Report:
    """A report."""

    model_name: str
    date: str
    """UTC, ISO 8601, without a zone."""
    args: Mapping[str, Any]
    """How the program was called."""
    prompts: tuple[Asked, ...]
    ends_in_newline: bool = False
    """As some published ones do."""


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: a JSON string on each line; `.gz` is unpacked.

    Raises:
        LlameroError: The file is missing or empty, or a line is no JSON string.
    """
    text = _text(path)
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            fix = "give a JSON string on each line; a published report is sampled again with --replay"
            raise LlameroError(f"not JSON: {error}", where=f"{path}:{number}", fix=fix) from error
        if not isinstance(prompt, str):
            raise LlameroError("not a JSON string", where=f"{path}:{number}", fix='write each prompt as "…"')
        found.append(prompt)
    if not found:
        raise LlameroError("there is no prompt in it", where=path)
    return found


def read_configurations(path: Path) -> list[Configuration]:
    """Return the configurations of a file, each laid over the file's default.

    Raises:
        LlameroError: The file is missing, is no JSON, lacks something or has a key that is not known.
    """
    read = _json(path)
    _known(read, {"default", "configurations"}, path)
    parts, default = read.get("configurations"), read.get("default") or {}
    if not isinstance(parts, list) or not parts:
        raise LlameroError("there are no `configurations` in it", where=path)
    found = [_laid_over(default, part, f"{path}: configurations.{number}") for number, part in enumerate(parts)]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise LlameroError("two configurations have the same name", where=path)
    return found


def _laid_over(default: Mapping[str, Any], part: Mapping[str, Any], where: str) -> Configuration:
    """Return a configuration; what it leaves empty is that of the default."""
    keys = {each.name for each in fields(Configuration)}
    for given in (default, part):
        _known(given, keys, where)
    if not isinstance(part.get("name"), str):
        raise LlameroError("the configuration has no `name`", where=where)
    said = {key: part.get(key) or default.get(key) for key in keys}
    arguments = {**default.get("generate_args", {}), **part.get("generate_args", {})}
    return Configuration(**{**said, "name": part["name"], "generate_args": arguments})


def _known(given: object, keys: set[str], where: object) -> None:
    if not isinstance(given, dict):
        raise LlameroError("not a JSON object", where=str(where))
    for key in given:
        if key not in keys:
            raise LlameroError(f"unknown key `{key}`", where=str(where), fix=did_you_mean(key, keys))


def read_report(path: Path) -> Report:
    """Return a report.

    Raises:
        LlameroError: The file is missing or is no sampling report.
    """
    text, read = _text(path), _json(path)
    try:
        prompts = tuple(
            Asked(
                asked["prompt"],
                tuple(
                    Outputs(each["sampling_config"], each["sampling_params"], tuple(each["outputs"]))
                    for each in asked["results"]
                ),
            )
            for asked in read["prompts"]
        )
        return Report(read["model_name"], read["date"], read["args"], prompts, text.endswith("\n"))
    except (KeyError, TypeError) as error:
        raise LlameroError(
            f"not a sampling report: {type(error).__name__} {error}", where=path, fix="give a file of such a report"
        ) from error


def written(report: Report) -> bytes:
    """Return a report as the bytes of its file."""
    value = {
        "model_name": report.model_name,
        "date": report.date,
        "args": dict(report.args),
        "prompts": [
            {
                "prompt": asked.prompt,
                "results": [
                    {
                        "sampling_config": each.sampling_config,
                        "sampling_params": dict(each.sampling_params),
                        "outputs": list(each.outputs),
                    }
                    for each in asked.results
                ],
            }
            for asked in report.prompts
        ],
    }
    return (json.dumps(value, indent=2) + ("\n" if report.ends_in_newline else "")).encode()


def configurations(report: Report, where: Path) -> list[Configuration]:
    """Return the configurations of a published report: their names and what `generate` was told.

    Raises:
        LlameroError: The report has no prompts, or prompts that were sampled in different ways.
    """
    ways = [[(each.sampling_config, each.sampling_params) for each in asked.results] for asked in report.prompts]
    if not ways:
        raise LlameroError("there is no prompt in it", where=where)
    if any(way != ways[0] for way in ways):
        raise LlameroError("its prompts were not all sampled in the same ways", where=where)
    return [Configuration(name, arguments) for name, arguments in ways[0]]


def file_name(report: Report, stem: str) -> str:
    """Return what the file of a report is called.

    Args:
        report: The report.
        stem: Name of its configuration file without the suffix.
    """
    model = re.sub(r"[^\w\d-]", "_", report.model_name)
    return f"{report.date.split('T')[0]}_{model}_sampling_{stem}.json"


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except FileNotFoundError as error:
        raise LlameroError("no such file", where=path) from error
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise LlameroError(f"cannot be read: {error}", where=path) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(_text(path))
    except ValueError as error:
        raise LlameroError(f"not JSON: {error}", where=path) from error
    if not isinstance(read, dict):
        raise LlameroError("not a JSON object", where=path)
    return read


def outputs_of(report: Report) -> Iterator[str]:
    """Yield every output, in the order of the file."""
    for asked in report.prompts:
        for each in asked.results:
            yield from each.outputs
