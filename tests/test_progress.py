"""The progress bar of a training: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from trainings import TINY, run, write_data


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run(TINY, data=data)
    assert "epoch 3/3" in terminal.getvalue()
    assert "4/4" in terminal.getvalue() or "/4 [" in terminal.getvalue()


def test_no_bar_elsewhere(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(TINY, data=data)
    assert capfd.readouterr().err == ""


def test_no_bar_without_tqdm(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert len(run(TINY, data=data).history) == 3
    assert terminal.getvalue() == ""
