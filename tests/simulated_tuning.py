"""Tuning with a simulated clock and two tiles for every product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlp_fused.engine import network_path, table_files, tables
from mlp_fused.kernels.devices import INTERPRETED_DEVICE
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.tune.config import Config
from mlp_fused.tune.operands import Operands, Passes
from mlp_fused.tune.tasks import Product, Task, Whole, list_tasks, products
from mlp_fused.tune.tuner import tune

CPU = torch.device("cpu")
SLOW, FAST, BROKEN, WRONG = (TileConfig(16, 16, 16, group_m=1, num_warps=warps) for warps in (1, 2, 4, 8))
DIMS = Config(dims=((6, 5, 4),), batch=(8,), dtype=("fp32",))
PRODUCTS = len(products(DIMS.workloads[0]))


class KilledError(BaseException):
    """A stand-in for a kill, which no code can handle."""


class Clock:
    """A clock that runs each call once, and returns a made-up time for the tile or path that it ran."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.seconds: dict[Any, float] = {"torch": 3e-3, SLOW: 2e-3, FAST: 1e-3}
        self.ran: list[Any] = []
        self.timed: list[Any] = []
        self.reading_seconds = 1.0  # the seconds that one reading takes from the time limit
        # Arguments of tune.
        self.parts: dict[str, Any] = {"candidates": lambda *_: (SLOW, FAST), "tasks": only(Product)}

    def __call__(self, call: Callable[[], object]) -> float:
        self.ran.clear()
        call()
        self.now += self.reading_seconds
        self.timed.append(self.ran[0])
        return self.seconds.get(self.ran[0], 5e-3)


def run_unchanged(operands: Operands, index: int, tile: TileConfig | None, run: Callable[[], None]) -> None:
    """Run a product as it is."""
    run()


class TracedOperands(Operands):
    """Operands that tell the clock which tile runs. A test may replace the function that runs it."""

    def __init__(
        self,
        clock: Clock,
        run_product: Callable[..., None],
        product: Product,
        device: torch.device,
        count: int | None = None,
    ) -> None:
        super().__init__(product, device, count)
        self.clock, self.run_product = clock, run_product

    def run(self, index: int, tile: TileConfig | None) -> None:
        self.clock.ran.append("torch" if tile is None else tile)
        self.run_product(self, index, tile, functools.partial(super().run, index, tile))


class TracedPasses(Passes):
    """Passes that tell the clock which path runs."""

    def __init__(self, clock: Clock, whole: Whole, device: torch.device) -> None:
        super().__init__(whole, device)
        self.clock = clock

    def by_torch(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.ran.append("torch")
        return super().by_torch(x)

    def by_layers(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.ran.append("layer")
        return super().by_layers(x)

    def by_network(self, path: network_path.NetworkPath, x: torch.Tensor) -> torch.Tensor:
        self.clock.ran.append(path.formulation or "network")
        return super().by_network(path, x)


def only(kind: type[Task]) -> Callable[..., list[Task]]:
    """Return a function that lists the tasks of one kind."""
    return lambda *arguments: [task for task in list_tasks(*arguments) if isinstance(task, kind)]


def traced(clock: Clock, run_product: Callable[..., None] = run_unchanged) -> Callable[..., Operands]:
    """Return a constructor of operands whose products run by `run_product(operands, index, tile, run)`."""
    return functools.partial(TracedOperands, clock, run_product)


def tuning_clock() -> Clock:
    """A clock that sees which tile runs, for a tuning with two tiles for every product and no whole networks."""
    clock = Clock()
    clock.parts["operands"] = traced(clock)
    clock.parts["passes"] = functools.partial(TracedPasses, clock)
    return clock


def run(clock: Clock, config: Config = DIMS, **parts: Any) -> tuple[table_files.Table, str]:
    """Tune, and return the table and the reported text. `parts` replace the clock's."""
    messages: list[str] = []
    table = tune(
        config, report=messages.append, device=CPU, time=clock, now=lambda: clock.now, **{**clock.parts, **parts}
    )
    return table, "\n".join(messages)


def path() -> Path:
    return tables.user_path(INTERPRETED_DEVICE.name)
