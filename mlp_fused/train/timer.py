"""Where the time of training steps goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ..prefetch import CopyTimer

__all__ = ["StepTimer"]


class StepTimer:
    """Where the time of training steps goes: milliseconds by phase.

    Each `mark(phase)` ends a phase that began at the mark before it, or at `start()`. On the CPU marks are read off the
    host's clock. On a GPU they are events in its stream, which the host does not wait for: they are read once an epoch,
    by `read()`. "loading" is then the time in which the device stood waiting for its next batch, "copy" that in which
    it waited for the copy of one that was loaded, as `copies` has timed it: what hides behind its work costs nothing.

    Args:
        device: where the steps run.
        now: marks this moment: seconds on a CPU, an event with timing on a GPU; by default the clock, or the stream.
        most_pending: marks that are kept before they are read.
    """

    PHASES = ("loading", "copy", "forward", "backward", "optimizer")
    MOST_PENDING = 10_000  # marks; beyond, they are read in mid-epoch: one wait in 2000 steps

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
        """Forget what was timed."""
        self.steps = 0
        self._pending.clear()
        self._milliseconds = dict.fromkeys(self.PHASES, 0.0)
        if self.copies is not None:
            self.copies.reset()

    def start(self) -> None:
        """The next phase begins now."""
        self.read()
        self._pending = [("start", self._now())]

    def mark(self, phase: str) -> None:
        """The phase ends now, and the next one begins. "optimizer" is a step's last."""
        self._pending.append((phase, self._now()))
        self.steps += phase == self.PHASES[-1]
        if len(self._pending) >= self._most_pending:
            self.read()

    def read(self) -> None:
        """Add up the phases marked so far, waiting for the device to reach the last mark."""
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
        """Each phase's part of the sum of all."""
        whole = sum(self._totals.values())
        return {phase: 100 * total / whole if whole else 0.0 for phase, total in self._totals.items()}

    @property
    def _totals(self) -> dict[str, float]:
        """Milliseconds by phase; the wait for a copy, which is within the loading that was marked, apart."""
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
                f"a batch's copy takes {self.copies.copy_ms:.3f} ms on a stream of its own: "
                f"{self.copies.hidden:.0%} of it were hidden"
            )
        return "\n".join(lines)


def _moment(device: torch.device) -> Any:
    """Now: the clock's seconds on a CPU, a recorded event on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event
