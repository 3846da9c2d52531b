import os
import signal
import subprocess
import sys

import pytest

from llamero.core.interrupt import Deferred


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    with Deferred() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_the_handlers_from_before_are_back_after_the_block():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Deferred():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


ONE_OF_SEVERAL = """
import os, signal, sys, threading
from llamero.core import interrupt
interrupt.SAME = float(sys.argv[1])
with interrupt.Deferred() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.asked:
        pass
    waiting = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    threading.Timer(0.6, waiting.set).start()
    waiting.wait()
print("saved")
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("same", "code", "said"), [("60", -signal.SIGTERM, "saved\n"), ("0", 143, "")])
def test_one_of_several_ends_at_a_second_request_and_not_at_an_echo_of_the_first(same, code, said):
    command = [sys.executable, "-u", "-c", ONE_OF_SEVERAL, same]
    environment = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    assert ("asked to stop again" in done.stderr) == (code == 143)
