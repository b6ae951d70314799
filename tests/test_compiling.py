"""Ahead-of-time compilation: its keys equal those of launches, and its processes may fail, die or be interrupted.

Real kernels compile in processes without TRITON_INTERPRET. The first such process runs this file as a program.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlp_fused import compiling
from mlp_fused.compiling import Compilers, NotYetError, count_workers
from mlp_fused.engine import table_files
from mlp_fused.grid import Workload
from mlp_fused.kernels import devices, layer_tiles
from mlp_fused.tune import compile_ahead, config, operands, tasks, tuner
from mlp_fused.tune.compile_ahead import PathWork, TileWork
from mlp_fused.tune.tasks import Whole

pytestmark = pytest.mark.alone

H100 = devices.DEVICES["NVIDIA H100"]
WORKLOADS = (Workload((64, 19), 96, "bf16", "gelu"), Workload((64, 128), 4096, "fp32"))
NETWORK = Whole(Workload((16, 16, 16), 96, "bf16", "gelu"), training=True)


def works() -> list[TileWork | PathWork]:
    """One tile for each product (for wgrad, one that splits), and every path of a network."""
    results: list[TileWork | PathWork] = []
    for product in (product for workload in WORKLOADS for product in tasks.products(workload)):
        tiles = layer_tiles.candidates(product.problem, H100)
        results.append(TileWork(product, next((tile for tile in tiles if tile.split > 1), tiles[0])))
    table = table_files.Table(H100.name, "2026-01-31T12:00:00+00:00", tuner.versions())
    paths = tasks.network_paths(NETWORK, H100)
    return [*results, *(PathWork(NETWORK, path) for path in paths), PathWork(NETWORK, "layer", table)]


def launch(work: TileWork | PathWork, device: torch.device) -> None:
    """Launch the kernels of a measurement."""
    if isinstance(work, TileWork):
        operands.Operands(work.task, device).by_kernel(0, work.tile)
        return
    passes = operands.Passes(work.task, device)
    path = tasks.network_paths(work.task, H100).get(work.path)
    passes(functools.partial(passes.by_network, path) if path else passes.by_layers, 0)


def compile_then_launch() -> dict[str, Any]:
    """Compile ahead, then launch. Returns the results, and for each compilation of a launch whether it was cached."""
    from test_launch import StandIn
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    asked = {work.key: work for work in works()}
    with Compilers(compile_ahead.compile_ahead, H100, GPUTarget("cuda", 90, 32), 2) as compilers:
        compilers.ask(asked)
        outcomes = [compilers.wait(key, 300) for key in asked]
    driver.set_active(StandIn("cuda", 90, 32, 0))
    torch.cuda.current_device = lambda: 0
    results: list[tuple[str, bool]] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: results.append((src.name, cache_hit))
    with devices.pretended(H100):
        for work in asked.values():
            launch(work, torch.device("cpu"))  # CPU tensors have addresses, like those of a GPU
    knobs.compilation.listener = None
    return {"outcomes": outcomes, "failure": compilers.failure, "launched": results, "keys": keys()}


def keys() -> list[tuple[str, str]]:
    """Our key and Triton's for a sample of the grid's candidates. Nothing is compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction

    triton_keys: list[str] = []
    JITFunction._do_compile = lambda self, key, *_: triton_keys.append(f"{self.__name__} {key}")
    results = []
    with compiling.compile_only(H100, GPUTarget("cuda", 90, 32)):
        for task in tasks.list_tasks(config.Config().workloads, H100)[::5]:
            if isinstance(task, tasks.Product):
                for tile in layer_tiles.candidates(task.problem, H100)[::4]:
                    triton_keys.clear()
                    compile_ahead.compile_ahead(TileWork(task, tile))
                    if triton_keys:  # else the kernel occurred before
                        results.append((str(TileWork(task, tile).key), triton_keys[0]))
    return results


if __name__ == "__main__":
    json.dump(compile_then_launch(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a process that compiles for a GPU with an empty cache."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**inherited, "PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_CACHE_DIR": cache}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_launch_finds_kernels_compiled_ahead_in_the_cache(results: dict[str, Any]) -> None:
    assert (results["outcomes"], results["failure"]) == ([None] * len(works()), None)
    launched = {name for name, _ in results["launched"]}
    assert launched >= {
        "layer_forward_kernel", "dgrad_kernel", "wgrad_kernel", "sum_partials_kernel", "network_forward_kernel",
        "network_one_pass_kernel", "network_dgrad_kernel", "network_wgrad_kernel",
    }  # fmt: skip
    assert [name for name, hit in results["launched"] if not hit] == []


def test_equal_keys_mean_equal_kernels(results: dict[str, Any]) -> None:
    by_key: dict[str, set[str]] = {}
    for key, triton_key in results["keys"]:
        by_key.setdefault(key, set()).add(triton_key)
    assert len(by_key) > 100
    assert {len(triton_keys) for triton_keys in by_key.values()} == {1}


def work_on(work: Any) -> None:
    """Do this work instead of compiling."""
    if work == "fails":
        raise ValueError("no such layout.\nand more")
    if work == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(work, float):
        time.sleep(work)
    if isinstance(work, Path):
        with work.open("a") as file:
            file.write(f"{os.getpid()}\n")


@contextlib.contextmanager
def started(monkeypatch: pytest.MonkeyPatch, workers: int = 1, **parts: Any) -> Iterator[Compilers]:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compilers = Compilers(work_on, H100, None, workers, **parts)
    try:
        with compilers:
            yield compilers
    finally:
        assert not any(worker.process.is_alive() for worker in compilers._workers)
        assert not any(thread.is_alive() for thread in compilers._threads)


def test_failures_are_reported_and_other_compilations_continue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with started(monkeypatch) as compilers:
        compilers.ask({"fails": "fails", "dies": "dies", "slow": 0.5, "last": tmp_path / "ran"})
        with pytest.raises(NotYetError):
            compilers.wait("slow", 0.0)
        assert compilers.wait("fails", 60) is None  # the launch will raise the same error
        assert compilers.failure == "ValueError: no such layout"
        assert compilers.wait("dies", 60) == "the process that compiled it ended with status -9"
        assert compilers.wait("last", 60) is None
        assert compilers.wait("slow", 60) is None
        assert compilers.wait("never asked for", 0) is None
    assert len((tmp_path / "ran").read_text().splitlines()) == 1


def test_a_key_that_is_waited_for_comes_first_and_no_key_is_queued_twice() -> None:
    compilers = Compilers(work_on, H100, None, 1)
    compilers._threads.clear()  # no worker runs, so that the order can be checked
    compilers.ask({"a": 1, "b": 2})
    compilers.ask({"b": 2, "c": 4})
    assert list(compilers._waiting.items()) == [("a", 1), ("b", 2), ("c", 4)]
    compilers.ask({"d": 5, "c": 6}, first=True)
    assert list(compilers._waiting) == ["d", "c", "a", "b"]
    with pytest.raises(NotYetError):
        compilers.wait("b", 0)
    assert list(compilers._waiting) == ["b", "d", "c", "a"]


def test_processes_that_do_not_start_leave_compiling_to_the_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with started(monkeypatch, serve=sys.exit) as compilers:  # sys.exit takes no such arguments, so the process ends
        compilers.ask({"a": tmp_path / "ran"})
        assert compilers.wait("a", 60) is None
        assert compilers.failure == "the processes that compile do not start: they end with status 1"
    assert not (tmp_path / "ran").exists()


def test_ctrl_c_does_not_reach_the_processes_and_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with started(monkeypatch) as compilers:
            compilers.ask({"first": 0.0, "long": 600.0})
            assert compilers.wait("first", 60) is None
            (worker,) = compilers._workers
            process = worker.process
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)  # a terminal sends it to all of them
            process.join(0.3)
            assert process.is_alive()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            compilers.wait("long", 60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (3, 1), (16, 14), (128, 16)])
def test_cores_are_left_free(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert count_workers() == workers


def test_without_processes_wait_returns_at_once() -> None:
    with Compilers(work_on, H100, None, 0) as compilers:
        compilers.ask({"a": "dies"})
        assert compilers.wait("a", 0) is None
