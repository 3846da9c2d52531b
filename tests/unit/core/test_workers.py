import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from llamero.core import workers
from llamero.core.errors import LlameroError


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 3, 50])
def test_results_come_in_the_order_of_the_items(team, items):
    assert list(workers.ordered(partial(pow, 2), range(items), workers=team)) == [2**i for i in range(items)]


def test_what_the_work_raises_is_raised_with_where_it_came_from():
    results = workers.ordered(partial(divmod, 1), [1, 1, 1, 0], workers=2)
    with pytest.raises(ZeroDivisionError) as error:
        list(results)
    assert "workers.py" in error.value.__notes__[0]


def test_an_error_of_ours_survives_the_way(tmp_path):
    from llamero.text.tokenizer import load_tokenizer

    with pytest.raises(LlameroError, match="no such file") as error:
        list(workers.ordered(load_tokenizer, [tmp_path / "not there"] * 4, workers=2))
    assert error.value.fix == "give a model directory"


def test_a_killed_worker_is_an_error_that_says_so():
    with pytest.raises(LlameroError, match="signal 9"):
        list(workers.ordered(_die_outside, [os.getpid()] * 4, workers=2))


def _die_outside(parent):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def test_items_are_not_read_far_ahead_of_their_results():
    numbers = count()
    results = workers.ordered(partial(pow, 1), numbers, workers=2)
    for _ in range(20):
        next(results)
    assert next(numbers) < 20 + 2 * 2 * workers._AT_ONCE
    results.close()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, itertools\n"
        "from llamero.core import workers\n"
        "for pid in workers.ordered(eval, itertools.repeat('__import__(\"os\").getpid()'), workers=2):\n"
        "    print(pid, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        seen = {int(next(parent.stdout)) for _ in range(40)} - {parent.pid}
        parent.kill()
        assert seen
    deadline = time.monotonic() + 20
    while any(map(_alive, seen)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, seen))


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
