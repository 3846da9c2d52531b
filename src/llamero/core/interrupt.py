"""Ctrl-C and SIGTERM that wait for a good moment: the loop asks, saves, and says how to go on."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from llamero.core import world

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818  (it is not an error: the user asked for it)
    """The user asked to stop, and everything is saved."""


log = logging.getLogger(__name__)
SAME = 3.0
"""Seconds in which signals to a run of several processes are one request: a terminal, a job's manager and torchrun may
each send the same one."""


class Deferred:
    """While this block runs, a first Ctrl-C (or SIGTERM) is only noted in `asked`; a second one acts at once.

    A process that is alone raises KeyboardInterrupt then. One of several is ended: it mostly waits for the others in a
    collective, where Python raises nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._told: int | None = None
        """End of a pipe into which the system's handler writes each signal."""

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
            if world.size() > 1:
                heard, self._told = os.pipe()
                os.set_blocking(self._told, False)
                signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
                threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self._told is None:
            raise KeyboardInterrupt
        self.asked = True

    def _listen(self, heard: int) -> None:
        """End the process at a second request; signals are heard here even when the main thread waits for others."""
        since = math.inf
        while said := os.read(heard, 1):
            if said[0] in self._before and time.monotonic() - since > SAME:
                log.warning("asked to stop again: ended at once, what was saved before is kept")
                os._exit(128 + said[0])
            if said[0] in self._before:
                since = min(since, time.monotonic())
        os.close(heard)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._told is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._told)
            self._told = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside Python
