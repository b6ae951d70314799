"""`mlp-fused` itself: its commands, its version, Ctrl-C, and output by the first process alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import X, Y, call

import mlp_fused
from mlp_fused.train import data, distributed
from mlp_fused.train.config import Config


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert capsys.readouterr().err.startswith("mlp-fused: the following arguments are required: ")


@pytest.mark.parametrize("text", ["stopped; run.pt is the last checkpoint", ""])
def test_ctrl_c_gives_one_line_and_exit_status_130(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: Config, report: object) -> None:
        raise KeyboardInterrupt(*[text] * bool(text))

    assert call("train", run=interrupted) == 130
    assert capsys.readouterr().err == f"mlp-fused: {text or 'stopped'}\n"


@pytest.mark.parametrize(
    "flags", [("--epochs", "0"), ("--epochs", "many"), ("--data", "none.npz"), ("--data", "labels.npz")], ids=" ".join
)
@pytest.mark.parametrize("first", [0, 1])
def test_an_error_in_every_process_is_printed_once(
    first: int,
    flags: tuple[str, ...],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first process to fail prints the error. Here the two processes run one after the other."""
    np.savez("labels.npz", x=X, y=Y - 1)  # a label below 0, which load_data refuses
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda *address: store)

    def run(config: Any, report: object) -> None:
        data.load_data(config.data)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    errors = []
    for rank in (first, 1 - first):
        monkeypatch.setenv("RANK", str(rank))
        assert call("train", *flags, run=run) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0].startswith("mlp-fused")
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


@pytest.mark.parametrize("flags", [("--version",), ("--help",), ("train", "--help"), ("env",)], ids=" ".join)
def test_only_the_first_process_prints(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert call(*flags) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mlp-fused {mlp_fused.__version__}\n"


def test_output_beyond_the_encoding_of_stdout_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    def run(config: Config, report: Callable[[str], None]) -> None:
        report("validation R² of Öl\udcff: 1")

    monkeypatch.setattr(sys, "stdout", stdout)
    assert call("train", run=run) == 0
    assert stdout.buffer.getvalue() == b"validation R\\xb2 of \\xd6l\\udcff: 1\n"
