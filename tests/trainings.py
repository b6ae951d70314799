"""Short training runs on generated data, for the tests of mlp_fused.train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlp_fused.train import loop
from mlp_fused.train.config import Config
from mlp_fused.train.distributed import Processes
from mlp_fused.train.loop import train

CPU = torch.device("cpu")


ALONE = Processes(CPU)


TINY = Config(hidden=(8,), epochs=3, batch_size=16)


def write_data(folder: Path) -> str:
    """70 rows of 2 x 3 "pixels" in 3 classes; 56 to train on, so that the last batch of 16 is not full."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 70)
    x = random.normal(size=(70, 2, 3)) + 2 * y[:, None, None]
    path = folder / "data.npz"
    np.savez(path, x=x, y=y)
    return str(path)


def quiet(text: str) -> None:
    """Discard a report."""


def run(config: Config, **changes: Any) -> loop.Result:
    return train(dataclasses.replace(config, **changes), report=quiet)


def assert_same_bits(one: loop.Result, other: loop.Result) -> None:
    assert one.history == other.history
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
