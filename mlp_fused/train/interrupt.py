"""Handle Ctrl-C during training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Interrupt"]

Item = TypeVar("Item")


class Interrupt:
    """A context manager that delays the first Ctrl-C until `check()`. The second one raises at once.

    By default, Python raises KeyboardInterrupt between any two bytecodes. Inside a DataLoader's queue it leaves a
    message half sent. Inside a `__del__` it is swallowed, and training continues. `check()` raises it at a safe point.

    A signal handler set by the caller stays in place. Outside the main thread, where Python allows no signal handlers,
    nothing changes.

    Args:
        repeats: ignore every Ctrl-C after the first. torchrun receives Ctrl-C too, and sends it again to its processes.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.received = False
        self._repeats = repeats
        self._installed = False

    def __enter__(self) -> Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._receive)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _receive(self, number: int, frame: FrameType | None) -> Any:
        self.received = True
        self._installed = False
        signal.signal(signal.SIGINT, signal.SIG_IGN if self._repeats else signal.default_int_handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.received:
            raise KeyboardInterrupt

    def checked(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate over the items. Call `check` before each of them."""
        for item in items:
            self.check()
            yield item
