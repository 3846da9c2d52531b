"""What commands share: options, and importing what takes long."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llamero.core.interrupt import Deferred

Override = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False, negative=())]
Recipe = Annotated[Path, Parameter(help="YAML file that describes the release.")]
Model = Annotated[str, Parameter(help="Model directory, GGUF file, or owner/name[:revision] of the hub.")]
OutDir = Annotated[Path | None, Parameter(name="--out")]


def import_uninterrupted(module: str) -> None:
    """Import what takes a second; a Ctrl-C in the middle of it would be lost in some library."""
    with Deferred() as stop:
        importlib.import_module(module)
    if stop.asked:
        raise KeyboardInterrupt
