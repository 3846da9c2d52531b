"""lm-evaluation-harness with this project's model in it: its command line, and its tasks as measurements."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

NEEDED = "0.4.13"
"""Version that the adapter was written against."""


def harness() -> Callable[[], None]:
    """Return lm-eval's command line, in which `--model llamero` is known."""
    adapter().register()
    return importlib.import_module("lm_eval.__main__").cli_evaluate


def adapter() -> ModuleType:
    """Return the module of the model, which needs lm-eval.

    Raises:
        LlameroError: It is not installed.
    """
    try:
        importlib.import_module("lm_eval.api.model")
    except ImportError as error:
        raise LlameroError(
            f"lm-evaluation-harness is not here ({error})", fix=f"pip install 'llamero[lm-eval]' (lm_eval>={NEEDED})"
        ) from error
    return importlib.import_module("llamero.evaluate.lm_eval_model")
