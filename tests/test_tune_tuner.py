"""`mlp-fused tune` on the CPU: the interpreter's kernels on tiny networks, timed by a clock that is made up."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlp_fused import environment, timing
from mlp_fused.compiling import Compilers, NotYetError
from mlp_fused.engine import network_path, paths, tables
from mlp_fused.engine.recognize import resolve
from mlp_fused.environment import DISTORTING
from mlp_fused.errors import UserError
from mlp_fused.grid import ANCHORS, GRID, Workload
from mlp_fused.kernels import devices, layer_tiles
from mlp_fused.kernels.devices import DEVICES, INTERPRETED_DEVICE
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.tune import compile_ahead, operands, tasks, tuner
from mlp_fused.tune.config import Config
from mlp_fused.tune.tasks import Product, Whole, list_tasks, products
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
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


def test_the_fastest_tile_is_found_and_used(clock: Clock, measured: Path) -> None:
    table, said = run(clock)
    assert {row.kind for row in table.gemms} == set(tables.KINDS)
    assert len(table.gemms) == PRODUCTS == 6
    for row in table.gemms:
        assert (row.rows, row.dtype, row.precision) == (8, "float32", "ieee")
        assert (row.tile, row.ms, row.torch_ms) == (FAST, pytest.approx(1), pytest.approx(3))
        assert tables.tile_for(row.problem, INTERPRETED_DEVICE) == FAST
    assert clock.timed == ["torch", SLOW, FAST] * PRODUCTS
    assert tables.read(path()) == table
    assert table.device == INTERPRETED_DEVICE.name
    assert set(table.versions) == {"mlp_fused", "python", "torch", "triton", "cuda", "driver"}
    assert "forward 6 -> 5, relu, 8 rows, float32    3.0000   1.0000   3.00  16x16x16, 2 warps, 1 stages" in said
    assert "Our kernels won 6 of 6; the worst ratio is 3.00, of " in said
    assert said.endswith(f"6 of 6 problems were measured, and are in {path()}")


def test_torch_is_recorded_as_none(clock: Clock, measured: Path) -> None:
    clock.seconds["torch"] = 0.5e-3
    table, said = run(clock)
    for row in table.gemms:
        assert (row.tile, row.ms, row.torch_ms) == (None, pytest.approx(1), pytest.approx(0.5))
        assert tables.tile_for(row.problem, INTERPRETED_DEVICE) is None
    assert "0.50  torch's own" in said
    assert "Our kernels won 0 of 6; the worst ratio is 0.50" in said


def test_what_fails_or_is_wrong_is_skipped_and_said(
    clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.seconds |= {BROKEN: 1e-4, WRONG: 1e-4}
    monkeypatch.setattr(layer_tiles, "candidates", lambda *_: (BROKEN, WRONG, SLOW))
    for kind in tables.KINDS:

        def by_kernel(*arguments: Any, original: Callable[..., None] = operands.BY_KERNEL[kind]) -> None:
            if arguments[-1] == BROKEN:
                raise RuntimeError("out of resource: shared memory.\nand more")
            if arguments[-1] != WRONG:  # which writes nothing
                original(*arguments)

        monkeypatch.setitem(operands.BY_KERNEL, kind, by_kernel)
    table, said = run(clock)
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    assert BROKEN not in clock.timed
    assert WRONG not in clock.timed
    assert (
        f"forward 6 -> 5, relu, 8 rows, fp32, {BROKEN} was left out: it fails: RuntimeError: out of resource: "
        "shared memory\n" in said
    )
    assert (
        f"wgrad 5 -> 4, 8 rows, fp32, {WRONG} was left out: its result is not torch's (relative difference nan)" in said
    )

    path().unlink()
    monkeypatch.setattr(layer_tiles, "candidates", lambda *_: (BROKEN,))
    table, said = run(clock)
    assert [(row.tile, row.ms) for row in table.gemms] == [(None, None)] * PRODUCTS
    assert said.count("-      -  torch's own") == PRODUCTS
    assert tables.read(path()) == table


@pytest.mark.parametrize(("dtype", "activation"), [("fp16", "relu"), ("bf16", "gelu")])
def test_a_right_tile_is_kept_where_torchs_own_product_is_the_worse_side(
    dtype: str, activation: str, clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS rounds partial sums over many rows to fp16, so results are compared with float32."""
    factor = {"fp16": 1.01, "bf16": 1.06}[dtype]  # off by twice the bound

    def off(kind: str, run: Callable[..., object], is_off: Callable[..., bool]) -> Callable[..., object]:
        def wrapped(*arguments: Any) -> object:
            made = run(*arguments)
            for result in arguments[2 if kind == "wgrad" else 3 :]:
                if isinstance(result, torch.Tensor) and is_off(result, arguments[-1]):
                    result.mul_(factor)
            return made

        return wrapped

    for kind in tables.KINDS:
        by_torch = off(kind, operands.BY_TORCH[kind], lambda result, _: result.dtype.itemsize == 2)
        by_kernel = off(kind, operands.BY_KERNEL[kind], lambda _, tile: tile == WRONG)
        monkeypatch.setitem(operands.BY_TORCH, kind, by_torch)
        monkeypatch.setitem(operands.BY_KERNEL, kind, by_kernel)
    clock.seconds |= {WRONG: 1e-4}
    monkeypatch.setattr(layer_tiles, "candidates", lambda *_: (WRONG, SLOW, FAST))
    table, said = run(clock, dataclasses.replace(DIMS, dtype=(dtype,), activation=activation))
    assert [row.tile for row in table.gemms] == [FAST] * PRODUCTS
    assert said.count("was left out") == said.count(f"{WRONG} was left out: its result is not torch's") == PRODUCTS


def test_the_time_is_shared_and_what_was_not_reached_is_said(clock: Clock, measured: Path) -> None:
    clock.each = 10.0
    table, said = run(clock, dataclasses.replace(DIMS, minutes=2.0))
    # 120 s over 6 products are 20 s each, which torch and the first tile take.
    assert clock.timed == ["torch", SLOW] * PRODUCTS
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    clock.timed.clear()
    os.unlink(path())
    table, said = run(clock, dataclasses.replace(DIMS, minutes=0.5))
    assert clock.timed == ["torch", SLOW] * 2
    assert len(table.gemms) == 2
    missed = next(each for each in products(DIMS.workloads[0]) if each.key not in [row.key for row in table.gemms])
    assert f"4 of 6 problems were not reached, the first of them {missed}; the same command again begins with" in said
    assert f"2 of 6 problems were measured, and are in {path()}" in said
    # Again: what is missing, before what is there.
    table, said = run(clock, dataclasses.replace(DIMS, minutes=1.0))
    assert len(table.gemms) == 5
    table, said = run(clock)
    assert len(table.gemms) == 6


def test_what_a_reading_leaves_is_for_the_others(clock: Clock, measured: Path) -> None:
    """A product that ends early leaves its part to the rest; one that is slow takes of theirs."""
    clock.each = 0.0
    run(clock, dataclasses.replace(DIMS, minutes=0.01))
    assert clock.timed == ["torch", SLOW, FAST] * PRODUCTS


def test_an_interruption_writes_what_was_measured(clock: Clock, measured: Path) -> None:
    other = Config(dims=((3, 2),), batch=(8,), dtype=("fp32",))
    before, _ = run(clock, other)
    clock.timed.clear()

    def interrupted(call: Callable[[], object]) -> float:
        if len(clock.timed) == 7:
            raise KeyboardInterrupt
        return clock(call)

    with pytest.raises(KeyboardInterrupt) as raised:
        tune(DIMS, report=lambda text: None, device=CPU, time=interrupted, now=lambda: clock.now)
    assert str(raised.value) == f"stopped; 2 of 6 problems were measured, and are in {path()}"
    after = tables.read(path())
    assert after.gemms[:3] == before.gemms
    assert len(after.gemms) == 5
    assert [each.name for each in path().parent.iterdir()] == [path().name]

    clock.timed = [None] * 7
    text = path().read_text()
    with pytest.raises(KeyboardInterrupt, match="^stopped; nothing was measured; .* is as it was$"):
        tune(DIMS, report=lambda text: None, device=CPU, time=interrupted, now=lambda: clock.now)
    assert path().read_text() == text


def test_what_was_measured_outlives_a_process_that_is_killed(clock: Clock, measured: Path) -> None:
    class KilledError(BaseException):
        """What nothing has a chance to handle."""

    def killed(call: Callable[[], object]) -> float:
        if len(clock.timed) == 7:
            raise KilledError
        return clock(call)

    with pytest.raises(KilledError):
        tune(DIMS, report=lambda text: None, device=CPU, time=killed, now=lambda: clock.now)
    assert len(tables.read(path()).gemms) == 2


ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("at", ["a timed call", "a checked call"])
def test_a_gpu_that_fails_ends_it_and_leaves_what_was_measured(
    at: str, clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second product: the first call of its fast tile fails, or its slow one's timing."""
    first, second = list_tasks(DIMS.workloads, INTERPRETED_DEVICE)[:2]
    broken = False

    def by_kernel(*arguments: Any, original: Callable[..., None] = operands.BY_KERNEL[second.kind]) -> None:
        nonlocal broken
        if at == "a checked call" and len(clock.timed) == 5 and arguments[-1] == FAST:
            broken = True
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        original(*arguments)

    def synchronize(device: torch.device) -> None:
        if broken:
            raise RuntimeError(f"{ILLEGAL}\nmore")

    def failing(call: Callable[[], object]) -> float:
        if at == "a timed call" and len(clock.timed) == 4:
            raise RuntimeError(f"{ILLEGAL}\nmore")
        return clock(call)

    monkeypatch.setitem(operands.BY_KERNEL, second.kind, by_kernel)
    monkeypatch.setattr(tuner, "_synchronize", synchronize)
    tile = SLOW if at == "a timed call" else FAST
    with pytest.raises(UserError) as raised:
        tune(DIMS, report=lambda text: None, device=CPU, time=failing, now=lambda: clock.now)
    written = f"1 of 6 problems were measured, and are in {path()}"
    assert str(raised.value) == f"the GPU failed at {second}, {tile}: {ILLEGAL}; {written}"
    assert [row.key for row in tables.read(path()).gemms] == [first.key]


def test_a_problem_that_does_not_fit_is_left_out(clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(operands, "_random", full)
    _, said = run(clock)
    assert said.count("was left out: it does not fit in the GPU's memory") == PRODUCTS
    assert said.endswith(f"nothing was measured; {path()} is as it was")
    assert not path().exists()


def test_a_table_of_other_versions_is_dropped(clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"mlp_fused": "0.0.9", "python": "3.12", "torch": "2.13", "triton": "3.7", "cuda": "13.0", "driver": "580"}
    for now, kept, sentence in (
        (old, 3, ""),
        (
            {**old, "triton": "3.8", "driver": "590"},
            0,
            f"{path()} was measured with triton 3.7, driver 580; this is triton 3.8, driver 590, so its 3 rows are",
        ),
        (
            {**{name: old[name] for name in old if name != "cuda"}, "hip": "7"},
            0,
            "with cuda 13.0, hip none; this is cuda",
        ),
    ):
        path().unlink(missing_ok=True)
        monkeypatch.setattr(tuner, "versions", lambda: old)
        run(clock, Config(dims=((3, 2),), batch=(8,), dtype=("fp32",)))
        monkeypatch.setattr(tuner, "versions", lambda now=now: now)
        table, said = run(clock)
        assert len(table.gemms) == kept + PRODUCTS
        assert table.versions == now
        assert sentence in said
        assert ("dropped" in said) == bool(sentence)


def test_files_that_are_not_overwritten(clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = measured / "notes.json"
    config = dataclasses.replace(DIMS, out=str(out))

    def refused(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            run(clock, config)

    out.write_text("{}")
    refused(
        "notes.json is no measured table: .*, so it will not be overwritten; delete it, or name another with --out$"
    )
    assert out.read_text() == "{}"
    other = tables.Table("NVIDIA H200", "2026-01-31T12:00:00+00:00", tuner.versions())
    tables.write(out, other)
    refused("notes.json was measured on NVIDIA H200, this is Triton's interpreter; name another file with --out$")
    out.unlink()
    out.mkdir()
    refused("notes.json cannot be read: Is a directory, so it will not be overwritten")
    (measured / "file").touch()
    config = dataclasses.replace(DIMS, out=str(measured / "file" / "t.json"))
    refused("cannot write into .*file: (Not a directory|File exists)$")
    config = dataclasses.replace(DIMS, out=str(measured / "new" / "t.json"))
    run(clock, config)
    assert len(tables.read(measured / "new" / "t.json").gemms) == PRODUCTS
    assert not path().exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused("cannot write .*t.json: .*No space left on device; what was there before is as it was$")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^tuning measures a GPU, and there is none that torch can use; mlp-fused env"):
        tune(DIMS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match="^there are no kernels to tune: TRITON_INTERPRET=1 is set"):
        tune(DIMS)


@pytest.mark.parametrize("switch", DISTORTING)
def test_a_distorted_gpu_is_not_measured(switch: str, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- Real candidates and paths, in the interpreter ---


@pytest.mark.parametrize(
    ("dtype", "activation"), [("fp32", "relu"), ("tf32", "gelu"), ("bf16", "gelu"), ("fp16", "relu")]
)
def test_products_and_paths_give_torchs_results(activation: str, dtype: Any, measured: Path) -> None:
    said: list[str] = []
    config = Config(dims=((70, 20, 16),), batch=(33,), dtype=(dtype,), activation=activation)
    count = itertools.count(1)
    table = tune(
        config, report=said.append, device=CPU, time=lambda call: (call(), next(count) * 1e-3)[1], now=lambda: 0.0
    )
    assert not [line for line in said if "left out" in line]
    assert len(table.gemms) == 6
    # The clock only ever slows down: torch, which is measured first, is the fastest.
    assert {row.tile for row in table.gemms} == {None}
    precision = "tf32" if dtype == "tf32" else "ieee"
    assert {row.precision for row in (*table.gemms, *table.networks)} == {precision}
    assert [(row.training, row.path) for row in table.networks] == [(True, "torch"), (False, "torch")]
    training, inference = table.networks
    assert {"torch", "layer", "stored"} <= set(training.ms) <= {"torch", "layer", "recompute", "stored"}
    assert set(inference.ms) == {"torch", "layer", "network"}
    for training_too in (True, False):
        activations = [resolve(activation), resolve("identity")]
        row = table.networks[0]
        why = paths.why_torch(
            row.widths, activations, getattr(torch, row.dtype), row.precision, training_too, None, INTERPRETED_DEVICE
        )
        assert why == "torch is faster as measured on this device"


def test_paths_by_their_times(clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "network_plan", NETWORK_PLAN)
    monkeypatch.setattr(tasks, "products", lambda workload: [])
    config = Config(dims=((16, 16, 16),), batch=(8,), dtype=("bf16",))
    for fastest in ("torch", "layer", "recompute", "stored"):
        clock.seconds = {fastest: 1e-3, "network": 2e-3}
        table, said = run(clock, config)
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
            assert isinstance(path, network_path.NetworkPlan)
            assert path.formulation == fastest
    assert "training 16-16-16, relu, 8 rows, bfloat16" in said


NETWORK_PLAN = tasks.network_plan


def test_networks_are_measured_with_the_tiles_just_found(
    clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file that they go to: what the path of layers runs with, and what holds after it."""
    monkeypatch.setattr(tasks, "network_plan", NETWORK_PLAN)
    config = Config(dims=((16, 16, 16),), batch=(8,), dtype=("bf16",), out=str(measured / "other.json"))
    by_layers, seen = operands.Passes.by_layers, []

    def watched(self: operands.Passes, x: torch.Tensor) -> torch.Tensor:
        seen.extend(tables.tile_for(row.problem, INTERPRETED_DEVICE) for row in products_of(config))
        return by_layers(self, x)

    def products_of(config: Config) -> list[tables.Gemm]:
        return [tables.Gemm(*each.key, None, None, 1.0) for each in products(config.workloads[0])]

    monkeypatch.setattr(operands.Passes, "by_layers", watched)
    table, _ = run(clock, config)
    assert [row.tile for row in table.gemms] == [FAST] * 3
    assert len(table.networks) == 2
    assert set(seen) == {FAST}
    for row in products_of(config):
        assert tables.choice_for(row.problem, INTERPRETED_DEVICE).source != "measured"  # the user's own has no rows


def test_a_path_that_is_wrong_is_left_out(clock: Clock, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "network_plan", NETWORK_PLAN)
    monkeypatch.setattr(tasks, "products", lambda workload: [])
    monkeypatch.setattr(operands.Passes, "by_network", lambda self, path, x: self.by_torch(x) * 1.5)
    table, said = run(clock, Config(dims=((16, 16, 16),), batch=(8,), dtype=("fp32",)))
    assert [set(row.ms) for row in table.networks] == [{"torch", "layer"}] * 2
    assert "inference 16-16-16, relu, 8 rows, fp32, network was left out: its result is not torch's" in said


# --- Compiled ahead ---


class FewCompilers(Compilers):
    """Compiles in no time, but for what it is told."""

    def __init__(self, outcomes: dict[TileConfig | str, str | type[Exception] | None]) -> None:
        super().__init__(compile_ahead.compile_ahead, INTERPRETED_DEVICE, None, 0)
        self.told = outcomes
        self.asked: dict[Any, Any] = {}

    def ask(self, work: Any, first: bool = False) -> None:
        self.asked = {**work, **self.asked} if first else {**self.asked, **work}

    def wait(self, key: Any, seconds: float) -> str | None:
        work = self.asked[key]
        outcome = self.told.get(work.tile if isinstance(work, compile_ahead.TileWork) else work.path)
        if outcome is NotYetError:
            raise NotYetError
        return outcome  # type: ignore[return-value]


def test_what_does_not_compile_is_left_out(clock: Clock, measured: Path) -> None:
    said: list[str] = []
    compilers = FewCompilers({FAST: "the process that compiled it ended with status -6"})
    table = tune(DIMS, report=said.append, device=CPU, time=clock, now=lambda: clock.now, compilers=compilers)
    assert [row.tile for row in table.gemms] == [SLOW] * PRODUCTS
    assert sum(f"{FAST} was left out: the process that compiled it ended with status -6" in line for line in said) == 6
    compilers = FewCompilers({})
    compilers.failure = "they end with status 1"
    tune(DIMS, report=said.append, device=CPU, time=clock, now=lambda: clock.now, compilers=compilers)
    assert "kernels were compiled where they were launched, as ahead it failed: they end with status 1" in said


def test_what_is_not_compiled_in_time_is_not_reached(clock: Clock, measured: Path) -> None:
    said: list[str] = []

    def tuned(outcomes: dict[Any, Any]) -> tables.Table:
        compilers = FewCompilers(outcomes)
        return tune(DIMS, report=said.append, device=CPU, time=clock, now=lambda: clock.now, compilers=compilers)

    assert [row.tile for row in tuned({FAST: NotYetError}).gemms] == [SLOW] * PRODUCTS
    path().unlink()
    assert tuned({SLOW: NotYetError}).gemms == ()  # a row that says that torch is faster would be a guess
    assert any(line.startswith("6 of 6 problems were not reached") for line in said)


def test_the_tile_of_a_row_that_is_measured_again_is_not_lost(clock: Clock, measured: Path) -> None:
    run(clock)
    clock.each = 10.0
    clock.timed.clear()
    table, _ = run(clock, dataclasses.replace(DIMS, minutes=2.0))
    assert clock.timed == ["torch", FAST] * PRODUCTS  # there was time for one tile each
    assert [row.tile for row in table.gemms] == [FAST] * PRODUCTS


class Model(Compilers):
    """Time as it passes on a machine with a GPU and 16 cores: compiling there, measuring here."""

    BOOT = 8.0  # seconds until a process is there
    TILE, PATH = 2.0, 8.0  # of compiling a product by a tile, a network's path
    LAYER = 3.0  # of compiling what a path of layers needs beside its products' kernels
    READING = 0.12  # seconds of a reading, and of making and checking what is read

    def __init__(self) -> None:
        super().__init__(compile_ahead.compile_ahead, DEVICES["NVIDIA H200"], None, 0)
        self.now = 0.0
        self.free = [self.BOOT] * 14
        self.queue: dict[Any, Any] = {}
        self.done: dict[Any, float] = {}

    def ask(self, work: Any, first: bool = False) -> None:
        self.work()
        new = {key: each for key, each in work.items() if key not in self.done}
        self.queue = {**new, **self.queue} if first else {**self.queue, **new}

    def work(self) -> None:
        """What the processes have begun by now."""
        while self.queue and min(self.free) <= self.now:
            self.begin(next(iter(self.queue)))

    def begin(self, key: Any) -> None:
        work = self.queue.pop(key)
        seconds = self.TILE if isinstance(work, compile_ahead.TileWork) else self.LAYER if work.table else self.PATH
        self.free.sort()
        self.done[key] = self.free[0] = max(self.free[0], self.now - seconds) + seconds

    def wait(self, key: Any, seconds: float) -> str | None:
        self.work()
        if key in self.queue:
            self.begin(key)
        if self.done[key] > self.now + seconds:
            self.now += max(0.0, seconds)
            raise NotYetError
        self.now = max(self.now, self.done[key])
        return None

    def read(self, call: Callable[[], object]) -> float:
        self.now += self.READING
        return 1e-3


def shares(seconds: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, float, float]]:
    """Of each part of the grid: its problems, the part of them that was reached, and of their candidates, all or the
    first few.
    """
    counts: dict[Any, int] = {}

    class NoOperands:
        def __init__(self, product: Product, device: torch.device) -> None:
            self.key = product.key

        def turns(self, run: Callable[..., object]) -> Callable[..., object]:
            return run

        def written(self, run: Callable[[int], object]) -> list[torch.Tensor]:
            run(0)
            return [torch.ones(1)]

        def in_float32(self) -> list[torch.Tensor]:
            return [torch.ones(1)]

        def by_torch(self, index: int) -> None:
            pass

        def by_kernel(self, index: int, tile: TileConfig) -> None:
            counts[self.key] = counts.get(self.key, 0) + 1

    class NoPasses(NoOperands):
        by_layers = by_network = NoOperands.by_torch

        def __call__(self, path: Callable[..., Any], index: int) -> list[torch.Tensor]:
            counts[self.key] = counts.get(self.key, 0) + 1
            return [torch.ones(1)]

    model, device = Model(), DEVICES["NVIDIA H200"]
    monkeypatch.setattr(devices, "describe", lambda *_: device)
    empty = tables.Table(device.name, "2026-01-31T12:00:00+00:00", tuner.versions())
    fast = tuner.Tuner(CPU, model.read, lambda: model.now, model, empty, empty, NoOperands, NoPasses)
    asked = list_tasks(Config().workloads, device)
    fast.measure(asked, seconds)
    assert model.now < seconds + Model.PATH
    parts: dict[str, list[tuple[int, float]]] = {}
    family = {workload: index for index, each in enumerate(GRID) for workload in each.workloads}
    keys = {each.key: family[work] for work in family for each in products(work)}
    for task in asked:
        part = "networks" if isinstance(task, Whole) else f"family {keys[task.key]}"
        part = "anchors" if task.anchor and isinstance(task, Product) else part
        wanted = 1
        if isinstance(task, Product):
            candidates = len(layer_tiles.candidates(task.problem, device))
            wanted = candidates if task.anchor else min(tuner.FEW, candidates)
        count = counts.get(task.key, 0)
        parts.setdefault(part, []).append((count > 0, min(1.0, count / wanted)))
    return {
        part: (len(each), *(sum(column) / len(each) for column in zip(*each)))  # type: ignore[misc]
        for part, each in parts.items()
    }


def test_what_eight_minutes_of_a_gpu_are_spent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 102 s the anchors are tuned; in 337 s every problem is reached. That is what `bench/gpu.py --minutes 8
    --tests-share 0 --tune-share 0.75` gives the tuner once the anchors have rows.
    """
    families = {f"family {index}" for index in range(len(GRID))}
    long = shares(337, monkeypatch)
    assert set(long) == {"anchors", "networks", *families}
    assert all(reached == 1 for _, reached, _ in long.values())
    assert long["anchors"][2] == 1  # every candidate
    assert long["networks"][2] == 1
    assert {part: few for part, (_, _, few) in long.items() if few < 0.7} == {}  # three of the first four
    short = shares(102, monkeypatch)
    assert short["anchors"][1:] == (1, pytest.approx(1, abs=0.1))
    hour = shares(3600, monkeypatch)
    assert all(few == 1 for _, _, few in hour.values())


# --- What is measured, and in which order ---


def test_the_products_of_a_network() -> None:
    found = products(Workload((30, 20, 20, 10), 64, "bf16", "gelu"))
    assert len(found) == len({product.key for product in found}) == 9
    by_key = {(product.kind, product.width_in, product.width_out): product for product in found}
    assert by_key["forward", 30, 20].activation == "gelu"
    assert by_key["forward", 20, 10].activation == "identity"
    assert by_key["dgrad", 30, 20].activation == "identity"
    assert by_key["dgrad", 20, 10].activation == "gelu"
    assert sum(product.share for product in found) == pytest.approx(1)
    # Layers alike are measured once, with the epilogue that has more to do.
    alike = products(Workload((20, 20, 20), 64, "bf16", "gelu"))
    assert [(product.kind, product.activation) for product in alike] == [
        ("forward", "gelu"), ("dgrad", "gelu"), ("wgrad", "identity"),
    ]  # fmt: skip
    assert [product.share for product in alike] == pytest.approx([1 / 3] * 3)


def test_versions_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_driver", lambda: "unknown: [Errno 2]\n no such file")
    found = environment.versions()
    assert found["driver"] == "unknown: [Errno 2] no such file"
    assert set(found) == {*tables.VERSIONS, "cuda"}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert set(environment.versions()) == {*tables.VERSIONS, "hip"}


def test_rows_that_descriptors_cannot_describe() -> None:
    (odd,) = {product.problem.aligned for product in products(Workload((33, 64), 64, "bf16"))}
    (even,) = {product.problem.aligned for product in products(Workload((40, 64), 64, "bf16"))}
    assert (odd, even) == (False, True)


def test_the_order_new_problems_anchors_then_by_part_of_the_flops() -> None:
    workloads = [Workload((8, 8, 600), 64, "fp32"), ANCHORS[0]]
    order = list_tasks(workloads, INTERPRETED_DEVICE)
    anchors = {product.key for product in products(ANCHORS[0])}
    assert {task.key for task in order[: len(anchors)]} == anchors
    for part in (order[: len(anchors)], order[len(anchors) :]):
        shares = [task.share for task in part]
        assert shares == sorted(shares, reverse=True)
    known = [order[0].key, order[3].key]
    again = list_tasks(workloads, INTERPRETED_DEVICE, known)
    assert [task.key for task in again[-2:]] == known
    assert sorted(map(str, again)) == sorted(map(str, order))


def test_narrow_networks_are_measured_as_a_whole_too() -> None:
    wholes = [
        task for task in list_tasks([Workload((16,) * 4, 64, "bf16")], DEVICES["NVIDIA H200"]) if type(task) is Whole
    ]
    assert [task.training for task in wholes] == [True, False]
    wide = list_tasks([Workload((784, 512, 10), 64, "bf16")], DEVICES["NVIDIA H200"])
    assert {type(task) for task in wide} == {Product}


def test_every_candidate_of_the_grid_can_stand_in_a_table(tmp_path: Path) -> None:
    grid = {workload for family in GRID for workload in family.workloads}
    assert set(ANCHORS) <= grid
    for device in DEVICES.values():
        rows = {}
        for product in dict.fromkeys(product for workload in grid for product in products(workload)):
            for index, tile in enumerate(layer_tiles.candidates(product.problem, device)):
                kind, _, *rest = product.key
                row = tables.Gemm(kind, 2 * index + 1, *rest, tile, 1.0, 1.0)
                rows[row.key] = row
        table = tables.Table(device.name, "2026-01-31T12:00:00+00:00", tuner.versions(), tuple(rows.values()))
        tables.write(tmp_path / "t.json", table)
        assert tables.read(tmp_path / "t.json") == table


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"dims": ((4,),)}, "--dims is 4; it needs to be two widths or more, each 1 or more"),
        ({"dims": ((4, 0),)}, "--dims is 4 0; it needs to be two widths or more"),
        ({"dims": ((),)}, "--dims is empty; it needs to be two widths"),
        ({"dims": ((4, 4),), "batch": (0,)}, "--batch is 0; it needs to be 1 or more"),
        ({"dims": ((4, 4),), "dtype": ("fp8",)}, "--dtype is fp8; it needs to be one of fp32, tf32, bf16, fp16"),
        ({"dims": ((4, 4),), "activation": "rleu"}, "--activation is 'rleu'; it needs to be one of: identity, "),
        ({"batch": (64,)}, "--batch is of networks that --dims gives; without --dims the grid is measured"),
        ({"dtype": ("fp32",)}, "--dtype is of networks that --dims gives"),
        ({"activation": "relu"}, "--activation is of networks that --dims gives"),
        ({"minutes": 0.0}, "--minutes is 0.0; it needs to be a finite number above 0"),
        ({"minutes": math.nan}, "--minutes is nan; it needs to be a finite number"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        Config(**told)


def test_what_is_asked_for() -> None:
    asked = Config(dims=((4, 5), (6, 7, 8)), batch=(1, 2), dtype=("tf32",), activation="tanh").workloads
    assert asked == [Workload(widths, rows, "tf32", "tanh") for widths in ((4, 5), (6, 7, 8)) for rows in (1, 2)]
    assert [(each.rows, each.dtype, each.activation) for each in Config(dims=((4, 5),)).workloads] == [
        (64, "fp32", "relu"), (64, "bf16", "relu"), (1024, "fp32", "relu"), (1024, "bf16", "relu"),
    ]  # fmt: skip


# --- Operands and clocks ---


def test_operands_come_from_more_memory_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert [operands._sets(torch.device("cuda"), nbytes) for nbytes in (100, 1999, 2000, 10**6)] == [20, 2, 1, 1]
    assert operands._sets(torch.device("cuda"), 1) == operands.MOST_SETS
    assert operands._sets(CPU, 1) == 1
    monkeypatch.setattr(operands, "_sets", lambda device, nbytes: 3)
    product = operands.Operands(products(Workload((33, 7), 5, "bf16"))[0], CPU)
    addresses = {tensor.data_ptr() for each in product.sets for tensor in each if tensor is not None}
    assert len(addresses) == 3 * 4
    assert all((address - min(addresses)) % 16 == 0 for address in addresses)
    seen: list[int] = []
    turn = product.turns(seen.append)
    for _ in range(5):
        turn()
    assert seen == [0, 1, 2, 0, 1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A host that issues and a device that works, in seconds."""
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
def test_the_clock_reads_what_the_device_works(gpu: dict[str, Any], issue: float, seconds: float) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        gpu["work"](issue + 1e-2 * (calls == 1), seconds)  # the first one compiles

    assert tuner.EventClock()(call) == pytest.approx(seconds, rel=1e-6)
    assert calls >= 7
