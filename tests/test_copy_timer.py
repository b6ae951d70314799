"""CopyTimer: the time of the copies, and the fraction of it hidden behind kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_streams import LATE, Event, Streams, prefetch

from mlp_fused import prefetch as prefetch_module
from mlp_fused.prefetch import CopyTimer


def test_copies_are_timed() -> None:
    timer, streams = CopyTimer(), Streams(LATE["both late"])
    for batch in prefetch([torch.ones(2)] * 5, streams, timer=timer):
        streams.use(batch, torch.ones(2))
    streams.drain("consumer")
    timer.read()
    assert timer.batches == 5
    assert timer.copy_ms > 0
    assert 0 <= timer.hidden <= 1
    timer.reset()
    assert (timer.batches, timer.copy_ms, timer.hidden) == (0, 0, 0)


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
def test_staging_on_the_host_does_not_count_as_copying(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    streams = Streams(LATE["both late"])

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*arguments: Any, **keywords: Any) -> Any:
            done.append(name)
            return real(*arguments, **keywords)

        monkeypatch.setattr(owner, name, noted)

    note(streams, "record"), note(streams, "copy"), note(prefetch_module._Slot, "stage")
    x = torch.ones(2)
    next(iter(prefetch([{"x": streams.pin(x) if pinned else x, "name": "a"}], streams, timer=CopyTimer())))
    assert done[:-2] == [*([] if pinned else ["stage"]), "record", "copy", "record"]


def test_batches_without_tensors_are_counted() -> None:
    timer, streams = CopyTimer(), Streams(LATE["both late"])
    assert list(prefetch(["a", "b"], streams, timer=timer)) == ["a", "b"]
    streams.drain("side"), streams.drain("consumer")
    timer.read()
    assert timer.batches == 2


@pytest.mark.parametrize(("waited", "hidden"), [(0.0, 1.0), (1.0, 0.75), (4.0, 0.0), (9.0, 0.0)])
def test_copying_without_waiting_counts_as_hidden(waited: float, hidden: float) -> None:
    timer = CopyTimer()
    timer.add(Event(at=10), Event(at=14), Event(at=20), Event(at=20 + waited))  # type: ignore[arg-type]
    timer.read()
    assert (timer.copy_ms, timer.waited_ms, timer.hidden) == (4.0, waited, hidden)
