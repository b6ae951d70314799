"""Ctrl-C in the middle of training."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainings import TINY, write_data

from mlp_fused.train.interrupt import Interrupt
from mlp_fused.train.loop import train


@pytest.fixture(autouse=True)
def pythons_handler() -> Iterator[None]:
    """Restore Python's handler, because background processes of a shell start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    with Interrupt() as interrupt:
        items = interrupt.checked(range(4))
        assert next(items) == 0
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(items)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_acts_at_once() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_that_torchrun_repeats_acts_once() -> None:
    with Interrupt(repeats=True) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    os.kill(os.getpid(), signal.SIGINT)


def test_a_lost_peer_after_ctrl_c_is_reported_as_ctrl_c(tmp_path: Path) -> None:
    def report(text: str) -> None:
        if text.startswith("epoch"):
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("Connection closed by peer")

    config = dataclasses.replace(TINY, data=write_data(tmp_path), epochs=2, checkpoint=str(tmp_path / "run.pt"))
    with pytest.raises(KeyboardInterrupt, match="is the last checkpoint, after epoch 1;"):
        train(config, report=report)


def test_a_callers_handler_is_kept() -> None:
    def handler(number: int, frame: object) -> None:
        """A caller's handler."""

    signal.signal(signal.SIGINT, handler)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_that_a_finalizer_swallows_stops_training(tmp_path: Path) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def report(text: str) -> None:
        if text.startswith("epoch"):
            Swallows()

    config = dataclasses.replace(TINY, data=write_data(tmp_path), epochs=100, checkpoint=str(tmp_path / "run.pt"))
    with pytest.raises(KeyboardInterrupt, match="is the last checkpoint, after epoch 1;"):
        train(config, report=report)
