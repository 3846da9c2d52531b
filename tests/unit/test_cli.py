"""The command line answers at once, and a mistake is one message and exit code 2."""

import subprocess
import sys

import pytest

from llamero.cli import app, main

COMMANDS = ("run", "check", "evaluate", "quantize", "generate", "chat", "watch")


def test_help_never_imports_torch():
    code = f"""
import sys
from llamero.cli import app
for command in {COMMANDS!r}:
    app([command, "--help"], result_action="return_value")
app(["--help"], result_action="return_value")
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_described(command, capsys):
    app([command, "--help"], result_action="return_value")
    said = capsys.readouterr().out
    assert "Usage: llamero" in said


@pytest.mark.parametrize(
    ("given", "meant"), [(["rn"], '"run"'), (["run", "x.yaml", "--ot", "y"], "--out"), (["chta", "m"], '"chat"')]
)
def test_a_mistyped_command_or_option_is_answered_with_the_nearest(given, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code != 0
    said = capsys.readouterr()
    assert f"Did you mean {meant}?" in said.out + said.err


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["run", "none.yaml"], "no such recipe"),
        (["chat", "no/such/model/here"], "no such model directory"),
        (["evaluate", ".", "--tasks", "perplexty"], "did you mean `perplexity`?"),
        (["evaluate", ".", "--tasks", "perplexity"], "give --text FILE"),
        (["evaluate", ".", "--tasks", "samples"], "give --prompt TEXT"),
        (["evaluate", ".", "--tasks", "h4"], "give --data DIR"),
        (["evaluate", ".", "--tasks", "toy_world", "--window", "9"], "window"),
        (["quantize", ".", "out", "--text", "x.txt", "--variant", "gptq-9bit"], "gptq-9bit"),
        (["watch", "nowhere"], "no such run directory"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(given, problem, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert problem in said
    assert "Traceback" not in said


def test_debug_shows_where_an_error_came_from(tmp_path):
    from llamero.core.errors import LlameroError

    with pytest.raises(LlameroError):
        main(["run", str(tmp_path / "none.yaml"), "--debug"])
