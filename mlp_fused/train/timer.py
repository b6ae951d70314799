"""Measure the time of training steps, by phase."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ..prefetch import CopyTimer

__all__ = ["StepTimer"]


class StepTimer:
    """Measure the time of training steps, in milliseconds by phase.

    `mark(phase)` ends a phase, which began at the previous mark or at `start()`. On a CPU, a mark is a time of the
    clock. On a GPU, it is an event in the current stream; `read()` reads the events once an epoch, so that steps do not
    wait for the device. There, "loading" is the time in which the GPU was idle because no batch was loaded, and "copy"
    the time in which it waited for the copy of a loaded batch, as measured by `copies`. Loading and copying that
    overlap with the GPU's work do not count.

    Args:
        device: the device of the steps.
        now: a function that returns a mark: seconds on a CPU, a recorded event on a GPU. By default the clock, or an
            event in the current stream.
        most_pending: the maximum number of marks before they are read.
    """

    PHASES = ("loading", "copy", "forward", "backward", "optimizer")
    MOST_PENDING = 10_000  # marks; a longer epoch reads them in between, which waits for the device once in 2000 steps

    def __init__(
        self, device: torch.device, now: Callable[[], Any] | None = None, most_pending: int = MOST_PENDING
    ) -> None:
        self._device = device
        self._now = now or functools.partial(_moment, device)
        self._most_pending = most_pending
        self._pending: list[tuple[str, Any]] = []
        self.copies = None if device.type == "cpu" else CopyTimer()
        self.reset()

    def reset(self) -> None:
        """Discard all times."""
        self.steps = 0
        self._pending.clear()
        self._milliseconds = dict.fromkeys(self.PHASES, 0.0)
        if self.copies is not None:
            self.copies.reset()

    def start(self) -> None:
        """Start the first phase."""
        self.read()
        self._pending = [("start", self._now())]

    def mark(self, phase: str) -> None:
        """End a phase and start the next one. "optimizer" is the last phase of a step."""
        self._pending.append((phase, self._now()))
        self.steps += phase == self.PHASES[-1]
        if len(self._pending) >= self._most_pending:
            self.read()

    def read(self) -> None:
        """Wait for the device to reach the last mark, and add up the phases."""
        if self._device.type != "cpu" and self._pending:
            self._pending[-1][1].synchronize()
        for (_, begin), (phase, end) in zip(self._pending, self._pending[1:]):
            self._milliseconds[phase] += (end - begin) * 1e3 if self._device.type == "cpu" else begin.elapsed_time(end)
        del self._pending[:-1]
        if self.copies is not None:
            self.copies.read()

    @property
    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds per step, by phase."""
        return {phase: total / max(1, self.steps) for phase, total in self._totals.items()}

    @property
    def percent(self) -> dict[str, float]:
        """The percentage of each phase in the sum of all phases."""
        whole = sum(self._totals.values())
        return {phase: 100 * total / whole if whole else 0.0 for phase, total in self._totals.items()}

    @property
    def _totals(self) -> dict[str, float]:
        """Milliseconds by phase. The wait for copies, which the marks count as loading, is moved to "copy"."""
        totals = dict(self._milliseconds)
        if self.copies is not None:
            waited = min(totals["loading"], self.copies.waited_ms * self.copies.batches)
            totals["loading"] -= waited
            totals["copy"] += waited
        return totals

    def __str__(self) -> str:
        rows = [(phase, self.milliseconds[phase], self.percent[phase]) for phase in self.PHASES]
        rows.append(("sum", sum(self.milliseconds.values()), sum(self.percent.values())))
        lines = [f"{'':<10}{'ms/step':>10}{'percent':>9}"]
        lines += [f"{phase:<10}{milliseconds:>10.3f}{percent:>9.1f}" for phase, milliseconds, percent in rows]
        if self.copies is not None and self.copies.batches:
            lines.append(
                f"copying a batch takes {self.copies.copy_ms:.3f} ms on a separate stream; "
                f"{self.copies.hidden:.0%} of it overlaps with other work"
            )
        return "\n".join(lines)


def _moment(device: torch.device) -> Any:
    """Return the current time in seconds on a CPU, or a recorded event on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event
