"""lm-evaluation-harness's own command line, with this project's model in it."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from llamero.cli.options import import_uninterrupted


def lm_eval(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, help="As for `lm_eval`.")]) -> None:
    """Run lm-evaluation-harness with this project's scorer in it: `--model llamero --model_args pretrained=DIR …`.

    All its options and tasks: `llamero lm-eval --help`, `llamero lm-eval ls tasks`.
    """
    from llamero.evaluate.lm_eval_run import harness

    import_uninterrupted("llamero.evaluate.lm_eval_run")
    main = harness()
    sys.argv = ["lm-eval", *arguments]
    main()
