"""The tuner on the CPU, with the interpreter's kernels on tiny networks and a simulated clock."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_tuning import (
    BROKEN,
    CPU,
    DIMS,
    FAST,
    PRODUCTS,
    SLOW,
    WRONG,
    Clock,
    KilledError,
    TracedPasses,
    only,
    path,
    run,
    traced,
    tuning_clock,
)

from mlp_fused import timing
from mlp_fused.engine import network_path, paths, table_files, tables
from mlp_fused.engine.recognize import resolve
from mlp_fused.engine.row_kernels import is_outdated
from mlp_fused.environment import DISTORTING
from mlp_fused.errors import UserError
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import INTERPRETED_DEVICE, Device
from mlp_fused.kernels.tile_config import Problem, TileConfig
from mlp_fused.tune import tuner
from mlp_fused.tune.config import Config
from mlp_fused.tune.operands import Operands
from mlp_fused.tune.tasks import Whole, list_tasks, products
from mlp_fused.tune.tuner import tune


@pytest.fixture
def clock() -> Clock:
    return tuning_clock()


def test_the_fastest_tile_is_found_and_used(clock: Clock, table_folder: Path) -> None:
    table, messages = run(clock)
    assert {row.kind for row in table.gemms} == set(table_files.KINDS)
    assert len(table.gemms) == PRODUCTS == 6
    for row in table.gemms:
        assert (row.rows, row.dtype, row.precision) == (8, "float32", "ieee")
        assert (row.tile, row.ms, row.torch_ms) == (FAST, pytest.approx(1), pytest.approx(3))
        assert tables.tile_for(row.problem, INTERPRETED_DEVICE) == FAST
    assert clock.timed == ["torch", SLOW, FAST] * PRODUCTS
    assert not any(map(is_outdated, table.rows))
    assert table_files.read(path()) == table
    assert table.device == INTERPRETED_DEVICE.name
    assert set(table.versions) == {"mlp_fused", "python", "torch", "triton", "cuda", "driver"}
    assert "forward 6 -> 5, relu, 8 rows, float32    3.0000   1.0000   3.00  16x16x16, 2 warps, 1 stages" in messages
    assert "our kernels are faster in 6 of 6 problems; the worst ratio is 3.00, of " in messages
    assert messages.endswith(f"measured 6 of 6 problems; the table is {path()}")


def test_planes_are_measured_with_the_split_of_their_operands(clock: Clock, table_folder: Path) -> None:
    """The table says how long planes took, also where another tile was faster."""
    config = Config(dims=((256, 256),), batch=(256,), dtype=("fp32",))
    planes: set[TileConfig] = set()

    def candidates(problem: Problem, device: Device) -> tuple[TileConfig, ...]:
        _, by_planes, *_ = layer_tiles.candidates(problem, device)
        planes.add(by_planes)
        clock.seconds[by_planes] = {"forward": 0.5e-3, "dgrad": 4e-3, "wgrad": 1.5e-3}[problem.kind]
        return by_planes, FAST

    table, _ = run(clock, config, candidates=candidates)
    assert {tile.precision for tile in planes} == {"fp16x3"}
    assert {row.kind: (row.tile in planes, row.ms, row.planes_ms) for row in table.gemms} == {
        "forward": (True, pytest.approx(0.5), pytest.approx(0.5)),
        "dgrad": (False, pytest.approx(1.0), pytest.approx(4.0)),
        "wgrad": (False, pytest.approx(1.0), pytest.approx(1.5)),
    }
    assert not any(map(is_outdated, table.rows))
    assert table_files.read(path()) == table


def test_torch_is_written_as_a_tile_of_none(clock: Clock, table_folder: Path) -> None:
    clock.seconds["torch"] = 0.5e-3
    table, messages = run(clock)
    for row in table.gemms:
        assert (row.tile, row.ms, row.torch_ms) == (None, pytest.approx(1), pytest.approx(0.5))
        assert tables.tile_for(row.problem, INTERPRETED_DEVICE) is None
    assert "0.50  PyTorch" in messages
    assert "our kernels are faster in 0 of 6 problems; the worst ratio is 0.50" in messages


def test_failing_and_wrong_tiles_are_skipped_and_reported(clock: Clock, table_folder: Path) -> None:
    clock.seconds |= {BROKEN: 1e-4, WRONG: 1e-4}

    def run_product(operands: Operands, index: int, tile: object, run: Callable[[], None]) -> None:
        if tile == BROKEN:
            raise RuntimeError("out of resource: shared memory.\nand more")
        if tile != WRONG:  # a wrong tile writes nothing
            run()

    clock.parts["operands"] = traced(clock, run_product)
    table, messages = run(clock, candidates=lambda *_: (BROKEN, WRONG, SLOW))
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    assert BROKEN not in clock.timed
    assert WRONG not in clock.timed
    assert (
        f"forward 6 -> 5, relu, 8 rows, fp32, {BROKEN} was left out: it fails: RuntimeError: out of resource: "
        "shared memory\n" in messages
    )
    sentence = "its result differs from PyTorch's (relative difference nan)"
    assert f"wgrad 5 -> 4, 8 rows, fp32, {WRONG} was left out: {sentence}" in messages

    path().unlink()
    table, messages = run(clock, candidates=lambda *_: (BROKEN,))
    assert [(row.tile, row.ms) for row in table.gemms] == [(None, None)] * PRODUCTS
    assert messages.count("-      -  PyTorch") == PRODUCTS
    assert table_files.read(path()) == table


@pytest.mark.parametrize(("dtype", "activation"), [("fp16", "relu"), ("bf16", "gelu")])
def test_a_correct_tile_is_kept_if_torch_is_less_accurate(
    dtype: str, activation: str, clock: Clock, table_folder: Path
) -> None:
    """cuBLAS rounds partial sums over many rows to fp16, so results are compared with float32."""
    factor = {"fp16": 1.01, "bf16": 1.06}[dtype]  # twice the bound

    def run_product(operands: Operands, index: int, tile: object, run: Callable[[], None]) -> None:
        run()
        for result in operands.sets[index][operands.inputs :]:
            if result is not None and (tile is None or tile == WRONG):
                result.mul_(factor)

    clock.parts["operands"] = traced(clock, run_product)
    clock.seconds |= {WRONG: 1e-4}
    config = dataclasses.replace(DIMS, dtype=(dtype,), activation=activation)
    table, messages = run(clock, config, candidates=lambda *_: (WRONG, SLOW, FAST))
    assert [row.tile for row in table.gemms] == [FAST] * PRODUCTS
    sentence = f"{WRONG} was left out: its result differs from PyTorch's"
    assert messages.count("was left out") == messages.count(sentence) == PRODUCTS


def test_an_interruption_writes_the_readings(clock: Clock, table_folder: Path) -> None:
    other = Config(dims=((3, 2),), batch=(8,), dtype=("fp32",))
    before, _ = run(clock, other)
    clock.timed.clear()

    def interrupted(call: Callable[[], object]) -> float:
        if len(clock.timed) == 7:
            raise KeyboardInterrupt
        return clock(call)

    with pytest.raises(KeyboardInterrupt) as raised:
        tune(DIMS, report=lambda text: None, device=CPU, time=interrupted, now=lambda: clock.now, **clock.parts)
    assert str(raised.value) == f"stopped; measured 2 of 6 problems; the table is {path()}"
    after = table_files.read(path())
    assert after.gemms[:3] == before.gemms
    assert len(after.gemms) == 5
    assert [file.name for file in path().parent.iterdir()] == [path().name]

    clock.timed = [None] * 7
    text = path().read_text()
    with pytest.raises(KeyboardInterrupt, match="^stopped; nothing was measured; .* is unchanged$"):
        tune(DIMS, report=lambda text: None, device=CPU, time=interrupted, now=lambda: clock.now, **clock.parts)
    assert path().read_text() == text


def test_rows_survive_a_killed_process(clock: Clock, table_folder: Path) -> None:
    def killed(call: Callable[[], object]) -> float:
        if len(clock.timed) == 7:
            raise KilledError
        return clock(call)

    with pytest.raises(KilledError):
        tune(DIMS, report=lambda text: None, device=CPU, time=killed, now=lambda: clock.now, **clock.parts)
    assert len(table_files.read(path()).gemms) == 2


ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("at", ["a timed call", "a checked call"])
def test_a_failing_gpu_ends_the_run_and_keeps_the_readings(at: str, clock: Clock, table_folder: Path) -> None:
    """In the second product, the first call of the fast tile fails, or the timing of the slow tile."""
    first, second = list_tasks(DIMS.workloads, INTERPRETED_DEVICE)[:2]
    broken = False

    def run_product(operands: Operands, index: int, tile: object, run: Callable[[], None]) -> None:
        nonlocal broken
        if at == "a checked call" and len(clock.timed) == 5 and tile == FAST:
            broken = True
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        run()

    def synchronize(device: torch.device) -> None:
        if broken:
            raise RuntimeError(f"{ILLEGAL}\nmore")

    def failing(call: Callable[[], object]) -> float:
        if at == "a timed call" and len(clock.timed) == 4:
            raise RuntimeError(f"{ILLEGAL}\nmore")
        return clock(call)

    clock.parts["operands"] = traced(clock, run_product)
    clock.parts["synchronize"] = synchronize
    tile = SLOW if at == "a timed call" else FAST
    with pytest.raises(UserError) as raised:
        tune(DIMS, report=lambda text: None, device=CPU, time=failing, now=lambda: clock.now, **clock.parts)
    written = f"measured 1 of 6 problems; the table is {path()}"
    assert str(raised.value) == f"the GPU failed at {second}, {tile}: {ILLEGAL}; {written}"
    assert [row.key for row in table_files.read(path()).gemms] == [first.key]


def test_a_problem_that_does_not_fit_is_skipped(clock: Clock, table_folder: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, messages = run(clock, operands=full)
    assert messages.count("was left out: it does not fit in GPU memory") == PRODUCTS
    assert messages.endswith(f"nothing was measured; {path()} is unchanged")
    assert not path().exists()


def test_a_table_of_other_versions_is_dropped(clock: Clock, table_folder: Path) -> None:
    old = {"mlp_fused": "0.0.9", "python": "3.12", "torch": "2.13", "triton": "3.7", "cuda": "13.0", "driver": "580"}
    for now, kept, sentence in (
        (old, 3, ""),
        (
            {**old, "triton": "3.8", "driver": "590"},
            0,
            f"{path()} was measured with triton 3.7, driver 580, but here is triton 3.8, driver 590; its 3 rows are",
        ),
        (
            {**{name: old[name] for name in old if name != "cuda"}, "hip": "7"},
            0,
            "with cuda 13.0, hip none, but here is cuda",
        ),
    ):
        path().unlink(missing_ok=True)
        run(clock, Config(dims=((3, 2),), batch=(8,), dtype=("fp32",)), versions=lambda: old)
        table, messages = run(clock, versions=lambda now=now: now)
        assert len(table.gemms) == kept + PRODUCTS
        assert table.versions == now
        assert sentence in messages
        assert ("dropped" in messages) == bool(sentence)


def test_rows_of_older_kernels_are_measured_before_current_ones(clock: Clock, table_folder: Path) -> None:
    table, _ = run(clock)
    *others, last = table.gemms
    older = dataclasses.replace(last, kernel="0" * 16)
    table_files.write(path(), dataclasses.replace(table, gemms=(*others, older)))
    clock.reading_seconds = 10.0
    clock.timed.clear()
    table, messages = run(clock, dataclasses.replace(DIMS, minutes=0.5))
    assert "problems were not measured, from" in messages
    assert not is_outdated(table.gemms[-1])
    assert table.gemms[-1].key == last.key


def test_foreign_files_are_not_overwritten(clock: Clock, table_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = table_folder / "notes.json"
    config = dataclasses.replace(DIMS, out=str(out))

    def refused(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            run(clock, config)

    out.write_text("{}")
    refused(
        "notes.json is not a measured table: .*, so it will not be overwritten; "
        "delete it, or use another file for --out$"
    )
    assert out.read_text() == "{}"
    other = table_files.Table("NVIDIA H200", "2026-01-31T12:00:00+00:00", tuner.versions())
    table_files.write(out, other)
    refused("notes.json was measured on NVIDIA H200, but this GPU is Triton's interpreter; use another file for --out$")
    out.unlink()
    out.mkdir()
    refused("notes.json cannot be read: Is a directory, so it will not be overwritten")
    (table_folder / "file").touch()
    config = dataclasses.replace(DIMS, out=str(table_folder / "file" / "t.json"))
    refused("cannot write into .*file, the folder of --out: (Not a directory|File exists)$")
    config = dataclasses.replace(DIMS, out=str(table_folder / "new" / "t.json"))
    run(clock, config)
    assert len(table_files.read(table_folder / "new" / "t.json").gemms) == PRODUCTS
    assert not path().exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused("cannot write .*t.json: .*No space left on device; the old file, if any, is unchanged$")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^mlp-fused tune needs a GPU, but PyTorch can use none here; mlp-fused env"):
        tune(DIMS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match="^the kernels cannot run on cuda:0: TRITON_INTERPRET=1 is set"):
        tune(DIMS)


@pytest.mark.parametrize("switch", DISTORTING)
def test_a_distorted_gpu_is_not_measured(switch: str, table_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DISTORTING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuner.paths, "why_not", lambda *_, **__: None)
    assert tuner._gpu() == torch.device("cuda", 0)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(UserError, match=f"^{switch} is set, which .*: unset it to measure$"):
        tune(DIMS)
    assert not path().exists()


@pytest.mark.parametrize(
    ("dtype", "activation"), [("fp32", "relu"), ("tf32", "gelu"), ("bf16", "gelu"), ("fp16", "relu")]
)
def test_products_and_paths_give_torchs_results(activation: str, dtype: Any, table_folder: Path) -> None:
    messages: list[str] = []
    config = Config(dims=((70, 32, 16),), batch=(33,), dtype=(dtype,), activation=activation)
    count = itertools.count(1)
    table = tune(
        config, report=messages.append, device=CPU, time=lambda call: (call(), next(count) * 1e-3)[1], now=lambda: 0.0
    )
    assert not [line for line in messages if "left out" in line]
    assert len(table.gemms) == 6
    # Readings of this clock only grow, so torch, which is measured first, is the fastest.
    assert {row.tile for row in table.gemms} == {None}
    precision = "tf32" if dtype == "tf32" else "ieee"
    assert {row.precision for row in (*table.gemms, *table.networks)} == {precision}
    assert [(row.training, row.path) for row in table.networks] == [(True, "torch"), (False, "torch")]
    training, inference = table.networks
    assert {"torch", "layer", "stored"} <= set(training.ms) <= {"torch", "layer", "recompute", "stored"}
    assert set(inference.ms) == {"torch", "layer", "network"}
    activations = [resolve(activation), resolve("identity")]
    for row in table.networks:
        path = paths.measured_path(
            row.widths, activations, getattr(torch, row.dtype), row.precision, row.training, INTERPRETED_DEVICE
        )
        assert path == "torch"


def test_the_fastest_path_is_chosen(clock: Clock, table_folder: Path) -> None:
    config = Config(dims=((16, 16, 16),), batch=(8,), dtype=("bf16",))
    for fastest in ("torch", "layer", "recompute", "stored"):
        clock.seconds = {fastest: 1e-3, "network": 2e-3}
        table, messages = run(clock, config, tasks=only(Whole))
        training, inference = table.networks
        assert training.path == fastest
        assert set(training.ms) == {"torch", "layer", "recompute", "stored"}
        assert inference.path == (fastest if fastest in ("torch", "layer") else "network")
        path = paths.network_path(
            (16, 16, 16), ((16, 1, 1),) * 2, (resolve("relu"), resolve("identity")), torch.bfloat16, "ieee",
            INTERPRETED_DEVICE, True,
        )  # fmt: skip
        if fastest == "layer":
            assert path == "it is faster as measured on this device"
        elif fastest != "torch":
            assert isinstance(path, network_path.NetworkPath)
            assert path.formulation == fastest
    assert "training 16-16-16, relu, 8 rows, bfloat16" in messages


def test_networks_are_measured_with_the_new_tiles(clock: Clock, table_folder: Path) -> None:
    """The path of layers uses the new tiles whatever file they go to. Afterwards the user's table applies again."""
    config = Config(dims=((16, 16, 16),), batch=(8,), dtype=("bf16",), out=str(table_folder / "other.json"))
    seen: list[Any] = []

    class WatchingTiles(TracedPasses):
        def by_layers(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(tables.tile_for(row.problem, INTERPRETED_DEVICE) for row in rows_of_products(config))
            return super().by_layers(x)

    def rows_of_products(config: Config) -> list[table_files.Gemm]:
        return [table_files.Gemm(*product.key, None, None, 1.0) for product in products(config.workloads[0])]

    table, _ = run(clock, config, tasks=list_tasks, passes=functools.partial(WatchingTiles, clock))
    assert [row.tile for row in table.gemms] == [FAST] * 3
    assert len(table.networks) == 2
    assert set(seen) == {FAST}
    for row in rows_of_products(config):
        source = tables.choice_for(row.problem, INTERPRETED_DEVICE).source
        assert not source.startswith("measured"), source  # the user's table has no rows


def test_a_wrong_path_is_skipped(clock: Clock, table_folder: Path) -> None:
    class Wrong(TracedPasses):
        def by_network(self, path: network_path.NetworkPath, x: torch.Tensor) -> torch.Tensor:
            return self.by_torch(x) * 1.5

    config = Config(dims=((16, 16, 16),), batch=(8,), dtype=("fp32",))
    table, messages = run(clock, config, tasks=only(Whole), passes=functools.partial(Wrong, clock))
    assert [set(row.ms) for row in table.networks] == [{"torch", "layer"}] * 2
    assert "inference 16-16-16, relu, 8 rows, fp32, network was left out: its result differs from PyTorch's" in messages


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A simulated host that issues work and a device that executes it, with times in seconds."""
    at = {"host": 0.0, "device": 0.0}

    class Event:
        time = math.nan

        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.time = max(at["host"], at["device"])

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.time - self.time)

    def work(issue: float, seconds: float) -> None:
        at["host"] += issue
        at["device"] = max(at["host"], at["device"]) + seconds

    at["work"] = work  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: at.update(host=max(at["host"], at["device"])))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: work(1e-6, cycles / 1e9))
    monkeypatch.setattr(time, "perf_counter", lambda: at["host"])
    timing.cycles_per_second.cache_clear()
    yield at
    timing.cycles_per_second.cache_clear()


@pytest.mark.parametrize(("issue", "seconds"), [(50e-6, 2e-6), (10e-6, 3e-3), (5e-6, 5e-6)], ids=str)
def test_the_clock_reads_the_devices_time(gpu: dict[str, Any], issue: float, seconds: float) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        gpu["work"](issue + 1e-2 * (calls == 1), seconds)  # the first one compiles

    assert tuner.EventClock()(call) == pytest.approx(seconds, rel=1e-6)
    assert calls >= 7
