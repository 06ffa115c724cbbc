"""Ctrl-C and polite termination, held back until a training step is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, SIGINT and SIGTERM raise KeyboardInterrupt where `safe` is set, and otherwise wait for `check`.

    A second signal does not wait. Outside the main thread signals cannot be caught and nothing is changed.
    """

    def __init__(self) -> None:
        self.safe = False  # no tensor is being changed: an exception may come out anywhere
        self._asked = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def asked(self) -> bool:
        """Whether a signal is held back."""
        return self._asked

    def check(self) -> None:
        """Raises the KeyboardInterrupt that was held back, if there is one."""
        if self._asked:
            raise KeyboardInterrupt

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked loader process: the terminal signals it too, but whether it ends is its parent's decision.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again, self._asked = self._asked, True
        if self.safe or again:
            raise KeyboardInterrupt
