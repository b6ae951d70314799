"""The path and expected time of each network measured on an H100. No network is expected to be slower than torch.

The expected time of a network is the sum of its steps. A step takes the measured time of its product, scaled from a
batch of half to twice the size. Without such a reading, it takes the estimated time. If one kernel runs the network,
the network takes that kernel's measured time. If torch runs every product, the network takes torch's measured time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from narrow_readings import scaled_ms

from bench.readings import CELLS, TF32
from mlp_fused import ACTIVATIONS, explain
from mlp_fused.dtypes import DTYPES
from mlp_fused.engine import network_path, paths, table_files, tables
from mlp_fused.engine.layer_steps import choose_tile
from mlp_fused.kernels import devices, estimate, layer_tiles, tile_config

DATA = Path(__file__).with_name("data") / "h100"
H100 = dataclasses.replace(devices.DEVICES["NVIDIA H100"], name="NVIDIA H100 80GB HBM3")
BOUND = 1.05  # relative to torch's device time


# Networks expected to take more than BOUND, and the reasons.
EXCEPTIONS = {
    (
        "middle512",
        "fwd",
    ): "its products were measured with a store of z and cold caches; the whole network took 1.046 of torch's time",
}


READINGS = {cell["cell"]: cell for cell in map(json.loads, (DATA / "cells.jsonl").read_text().splitlines())}
PRODUCTS = table_files.read(DATA / "products.json").gemms


@dataclass(frozen=True)
class Expected:
    """The path of a cell in a phase, and the expected milliseconds of ours and of torch."""

    path: str
    ms: float
    torch_ms: float
    steps: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.ms / self.torch_ms


def nearest_reading(problem: tile_config.Problem) -> table_files.Gemm | None:
    """The reading of a product with the nearest batch, half to twice the size."""
    same = [row for row in PRODUCTS if dataclasses.replace(row.problem, m=0, n=0, k=0) == _kind(problem)]
    near = [
        row
        for row in same
        if row.problem.widths == problem.widths and 0.5 <= row.rows / problem.rows <= tables.FARTHEST
    ]
    return min(near, key=lambda row: max(row.rows / problem.rows, problem.rows / row.rows), default=None)


def _kind(problem: tile_config.Problem) -> tile_config.Problem:
    return dataclasses.replace(problem, m=0, n=0, k=0)


def step(problem: tile_config.Problem) -> tuple[float, bool, str]:
    """A product's milliseconds, True if torch runs it, and a line with the sources of both."""
    choice = choose_tile(problem, device=H100, torch_too=True)
    row = nearest_reading(problem)
    if choice.tile is not None and choice.tile.precision == "fp16x3":
        ms, source = 1e3 * layer_tiles.planes_seconds(problem, choice.tile, H100), "estimate"
    elif row is not None:
        measured = row.torch_ms if choice.tile is None else row.ms
        assert measured is not None
        ms, source = measured * problem.rows / row.rows, "reading"
    elif choice.tile is None:
        ms, source = 1e3 * estimate.torch_seconds(problem, H100), "estimate"
    else:
        ms, source = 1e3 * estimate.kernel_seconds(problem, choice.tile, H100), "estimate"
    k, n = reversed(problem.widths)
    runs = choice.tile or "torch"
    return ms, choice.tile is None, f"{problem.kind} {k} -> {n}: {ms:.4f} ms by {source}; {runs}, {choice.source}"


def expected(name: str, phase: str) -> Expected:
    """The expectation for a cell in a phase: "fwd" (inference), "train" (forward and backward) or "step" (and Adam)."""
    cell, reading = CELLS[name], READINGS[name]
    dtype, precision = DTYPES[cell.dtype], "tf32" if name in TF32 else "ieee"
    training = phase != "fwd"
    ours, torchs = reading["dev"][f"{phase} ours"], reading["dev"][f"{phase} eager"]
    shapes = list(pairwise(cell.widths))
    activations = (*(ACTIVATIONS[cell.activation] for _ in shapes[1:]), ACTIVATIONS["identity"])
    strides = tuple((k, 1, 1) for k, _ in shapes)
    path = paths.network_path(cell.widths, strides, activations, dtype, precision, H100, training, torch_too=True)
    if isinstance(path, network_path.NetworkPath):
        if path.network.precision == "fp16x3":  # the cell was measured with kernels that use FMA units
            times = scaled_ms(cell.widths[0], path.forward_tile, path.backward_tile, path.wgrad_tile)
            return Expected("network", *times, ("reading on an H200",))
        return Expected("network", ours, torchs, ("reading of the network",))
    x = torch.empty(cell.rows, cell.widths[0], dtype=dtype, device="meta")
    layers = explain.meta_layers(cell.widths, activations, dtype, training=training)
    by_layers = paths.find_layers(x, layers, dtype, "triton", precision)
    forwards, backwards, _ = explain.make_schedules(by_layers, x, layers, H100)
    products = [
        planned.problem
        for schedule in (*forwards, *backwards)
        for planned in schedule.steps
        if planned.kind in ("forward", "dgrad", "wgrad")
    ]
    tiles = [choose_tile(problem, device=H100, torch_too=True).tile for problem in products if problem is not None]
    if all(tile is not None and tile.precision == "fp16x3" for tile in tiles):
        source = "reading on an H200, with one exponent for each block of dz"
        return Expected("layer, by planes", *planes_ms(cell.widths, training), (source,))
    steps = [step(problem) for problem in products if problem is not None]
    lines = tuple(line for _, _, line in steps)
    if all(by_torch for _, by_torch, _ in steps):
        return Expected("layer, all of it torch's", torchs, torchs, lines)
    # Kernels of torch that belong to no product, such as those of the loss and the optimizer.
    rest = [ms for kernel, (ms, _) in reading["kernels"][f"{phase} ours"] if "at::" in kernel or "anonymous" in kernel]
    return Expected("layer", sum(ms for ms, _, _ in steps) + sum(rest), torchs, lines)


def planes_ms(widths: tuple[int, ...], training: bool) -> tuple[float, float]:
    """Milliseconds of a full-fp32 network with planes on an H200, and of torch."""
    for line in map(json.loads, (DATA.with_name("h200") / "planes.jsonl").read_text().splitlines()):
        if line["part"] == "nets" and line["case"].startswith("x".join(map(str, widths)) + " gelu"):
            ours, torchs, _ = line["times"]["training" if training else "forward"]
            return ours, torchs
    raise AssertionError(f"{widths} was not measured")


def phases(name: str) -> list[str]:
    return [phase for phase in ("fwd", "train", "step") if f"{phase} ours" in READINGS[name]["dev"]]


def lines() -> Iterator[str]:
    """One line for each cell and phase, and one for each of its steps."""
    for name in CELLS:
        for phase in phases(name):
            expectation = expected(name, phase)
            times = f"{expectation.ms:.4f} ms, torch {expectation.torch_ms:.4f}, {expectation.ratio:.2f}"
            yield f"{name} {phase}: {expectation.path}, {times}"
            yield from (f"    {line}" for line in expectation.steps)


@pytest.fixture(autouse=True)
def _packaged_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the packaged table, which tests of the rules do not use."""
    monkeypatch.setattr(tables, "PACKAGED", Path(layer_tiles.__file__).parent / "tuned")
    paths.forget_tables()
    yield
    paths.forget_tables()


def test_every_measured_cell_is_covered() -> None:
    assert CELLS.keys() == READINGS.keys()


@pytest.mark.parametrize("name", CELLS)
def test_no_network_is_expected_to_be_slower_than_torch(name: str) -> None:
    for phase in phases(name):
        if (name, phase) not in EXCEPTIONS:
            expectation = expected(name, phase)
            assert expectation.ratio <= BOUND, "\n".join((f"{expectation.ratio:.3f}", *expectation.steps))


def test_exceptions_are_few_and_needed() -> None:
    assert len(EXCEPTIONS) <= 3
    for (name, phase), reason in EXCEPTIONS.items():
        assert reason
        assert expected(name, phase).ratio > BOUND


def test_choices_are_as_listed() -> None:
    """After an intended change: PYTHONPATH=. python tests/test_paths_measured.py > tests/data/h100/choices.txt"""
    assert "".join(f"{line}\n" for line in lines()) == (DATA / "choices.txt").read_text()


if __name__ == "__main__":
    print(*lines(), sep="\n")
