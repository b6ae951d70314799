"""Tuning by a clock that is made up, with two tiles for every product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlp_fused.engine import network_path, tables
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import INTERPRETED_DEVICE
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.tune import operands, tasks
from mlp_fused.tune.config import Config
from mlp_fused.tune.tasks import products
from mlp_fused.tune.tuner import tune

CPU = torch.device("cpu")


SLOW, FAST, BROKEN, WRONG = (TileConfig(16, 16, 16, group_m=1, num_warps=warps) for warps in (1, 2, 4, 8))


DIMS = Config(dims=((6, 5, 4),), batch=(8,), dtype=("fp32",))


PRODUCTS = len(products(DIMS.workloads[0]))


class Clock:
    """Runs each call once, and says how long it would have taken: by the tile or the path that it ran."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.seconds: dict[Any, float] = {"torch": 3e-3, SLOW: 2e-3, FAST: 1e-3}
        self.ran: list[Any] = []
        self.timed: list[Any] = []
        self.each = 1.0  # what one reading takes of the time limit

    def __call__(self, call: Callable[[], object]) -> float:
        self.ran.clear()
        call()
        self.now += self.each
        self.timed.append(self.ran[0])
        return self.seconds.get(self.ran[0], 5e-3)

    def watch(self, what: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, noting that it ran."""

        def watched(*arguments: Any, **keywords: Any) -> Any:
            self.ran.append(arguments[-1] if what == "tile" else what)
            return run(*arguments, **keywords)

        return watched


def watch_ways(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that sees which way is taken; two tiles for every product, and no whole networks."""
    clock = Clock()
    for kind in tables.KINDS:
        monkeypatch.setitem(operands.BY_TORCH, kind, clock.watch("torch", operands.BY_TORCH[kind]))
        monkeypatch.setitem(operands.BY_KERNEL, kind, clock.watch("tile", operands.BY_KERNEL[kind]))
    for path, name in (("by_torch", "torch"), ("by_layers", "layer")):
        monkeypatch.setattr(operands.Passes, path, clock.watch(name, getattr(operands.Passes, path)))
    by_network = operands.Passes.by_network

    def watched(self: operands.Passes, path: network_path.NetworkPlan, x: torch.Tensor) -> torch.Tensor:
        clock.ran.append(path.formulation or "network")
        return by_network(self, path, x)

    monkeypatch.setattr(operands.Passes, "by_network", watched)
    monkeypatch.setattr(layer_tiles, "candidates", lambda *_: (SLOW, FAST))
    monkeypatch.setattr(tasks, "network_plan", lambda *arguments: "only products are tested")
    return clock


def run(clock: Clock, config: Config = DIMS) -> tuple[tables.Table, str]:
    """The table, and what was reported."""
    said: list[str] = []
    table = tune(config, report=said.append, device=CPU, time=clock, now=lambda: clock.now)
    return table, "\n".join(said)


def path() -> Path:
    return tables.user_path(INTERPRETED_DEVICE.name)
