"""Helpers for tests of the command line: a call in this process, and small data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mlp_fused.__main__ import main

TINY = ["--hidden", "8", "--epochs", "2", "--batch-size", "16"]


COMMAND = [sys.executable, "-m", "mlp_fused"]


def write(**arrays: Any) -> None:
    """Write data.npz in the current folder."""
    np.savez("data.npz", **arrays)


def call(*arguments: str, run: Callable[..., object] | None = None) -> int:
    """Run a command line and return the exit status. `run` replaces the command's own function."""
    try:
        return main(arguments, run)
    except SystemExit as stop:  # argparse exits by itself
        return -1 if stop.code is None else int(stop.code)


X, Y = np.ones((6, 3)), np.array([0, 1, 2, 0, 1, 2])
