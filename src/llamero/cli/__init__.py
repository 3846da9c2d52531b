"""The command line: one function a command, and the only place that prints."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from cyclopts import App

from llamero.cli import convert, data, evaluate, launch, lm_eval, plan, quantize, release, talk
from llamero.cli.display import err, say_error
from llamero.core import world
from llamero.core.errors import LlameroError
from llamero.core.interrupt import Interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

# On a machine that does other work too, threads that wait by spinning slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FIRST_SPEAKS = 3.0
"""Seconds in which the first of several processes can say what is wrong before the others do."""

app = App(
    name="llamero",
    help="From a Llama's base weights to a published, measured, served release: one recipe in.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `main` says what is kept
)
for command in (
    release.run,
    release.check,
    plan.plan,
    evaluate.evaluate,
    quantize.quantize,
    convert.convert,
    talk.generate,
    talk.chat,
    release.watch,
    launch.launch,
):
    app.command(command)
app.command(lm_eval.lm_eval, name="lm-eval", help_flags=())
app.command(data.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake is one message and exit code 2, `--debug` shows where it came from."""
    if world.size() == 1:
        _obey(arguments)
        return
    code: object = 0
    try:
        _obey(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # taking a process group down at the end aborts now and then


def _obey(arguments: Sequence[str] | None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        app(given)
    except LlameroError as error:
        if debug:
            raise
        _refuse(error)
    except OSError as error:
        if debug or error.filename is None:
            raise
        _refuse(LlameroError(str(error.strerror), where=error.filename))
    except Interrupted as stopped:
        _stop(f"stopped: {stopped}. Run the same command again to go on.")
    except KeyboardInterrupt:
        _stop("stopped. Finished stages are kept; run the same command again to go on.")


def _refuse(error: LlameroError) -> NoReturn:
    """Say what is wrong and end; of several processes the first says what all of them find."""
    if world.rank():
        time.sleep(FIRST_SPEAKS)  # torchrun ends the others with the first that ends
        where = " at ".join(filter(None, [f"rank {world.rank()}", error.where]))
        error = LlameroError(error.problem, where=where, fix=error.fix)
    say_error(error)
    world.tell_torchrun(str(error))
    sys.exit(2)


def _stop(said: str) -> NoReturn:
    if world.rank() == 0:
        err.print(said, highlight=False)
    sys.exit(130)
