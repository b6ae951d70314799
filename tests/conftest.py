"""The same tests run on a CPU, in Triton's interpreter, and with `-m gpu` on a GPU.

A test that takes the fixture `device` runs on both. Triton reads TRITON_INTERPRET when the package is imported, so
it is set here, before a test module is imported. With `-n`, every worker reads this file and does the same.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import interpreter
import pytest
from _pytest.mark.expression import Expression

COMPILED = pytest.StashKey[list[str]]()  # lines of the table of registers, spills and instructions

WORKER_BYTES = 3 << 30  # GPU memory for one worker: CUDA context and tensors; tests that need more are marked alone
TENSORS_SHARE = 0.8  # the share of GPU memory that the workers divide; contexts and libraries need the rest


def asks_for(expression: str, mark: str) -> bool:
    """True if a mark expression selects tests because of this mark: it is true with the mark and false without.

    "gpu and not alone" asks for gpu; "not gpu" and "full" do not.
    """
    try:
        compiled = Expression.compile(expression)
    except Exception:  # its class varies; pytest reports the mistake when it applies the expression
        return False
    others = set(re.findall(r"[^\s()]+", expression)) - {mark}

    def selects(marks: set[str]) -> bool:
        return compiled.evaluate(lambda name, /, **_: name in marks)

    subsets = (set(some) for size in range(len(others) + 1) for some in itertools.combinations(others, size))
    return any(selects(some | {mark}) and not selects(some) for some in subsets)


def _wants(config: pytest.Config, mark: str) -> bool:
    return asks_for(config.getoption("markexpr") or "", mark)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--failures",
        metavar="FILE",
        type=Path,
        help="append each failure to this file at once, so that a run that is killed loses none",
    )


def pytest_configure(config: pytest.Config) -> None:
    workers = _count_workers(config)
    if workers or config.getoption("dist", "no") != "no":
        config.option.benchmark_disable = True  # or pytest-benchmark disables itself with a warning
    if workers:
        _share_the_cores(workers)
    elif file := config.getoption("failures"):
        config.pluginmanager.register(Failures(file))
    if not _wants(config, "gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.take_shortcuts()


def _count_workers(config: pytest.Config) -> int:
    """In a worker of pytest-xdist, the number of workers; 0 in any other process."""
    return getattr(config, "workerinput", {}).get("workercount", 0)


class Failures:
    """Append every failure to a file as soon as it is reported. With `-n`, the workers report to one process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.append(f"{report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.append(f"{report.nodeid} (collection)", report.longreprtext)

    def append(self, title: str, text: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{title}\n{text}\n\n")
            file.flush()
            os.fsync(file.fileno())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_the_cores(workers: int) -> None:
    """Give each worker its part of the cores. By default, torch and its compiler would use all cores in every worker.

    It has to be called before torch is imported.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A worker for each core that this process may use, but no more than the GPU has memory for."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist reads it
    if not _wants(config, "gpu"):
        return _cores()
    import torch

    if not torch.cuda.is_available():
        return _cores()
    return max(1, min(_cores(), torch.cuda.get_device_properties(0).total_memory // WORKER_BYTES))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect gpu tests unless `-m` asks for gpu, and full tests unless it asks for full.

    If `-m` asks for gpu, tests that take `device` are marked gpu. `full("cpu")` marks tests that are slow only in the
    interpreter: under `-m gpu` they always run.
    """
    gpu, full = _wants(config, "gpu"), _wants(config, "full")
    left_out = set()
    for item in items:
        if gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        slow = any(not gpu or "cpu" not in mark.args for mark in item.iter_markers("full"))
        if (item.get_closest_marker("gpu") and not gpu) or (slow and not full):
            left_out.add(item)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(COMPILED, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device on which kernels run: "cpu" (the interpreter) or "cuda"."""
    import torch

    if not _wants(request.config, "gpu"):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    if workers := _count_workers(request.config):  # a test that needs more memory fails itself, and not another test
        torch.cuda.set_per_process_memory_fraction(TENSORS_SHARE / workers)
    return "cuda"


@pytest.fixture(params=["reference", "layer", pytest.param("layer by layer", marks=pytest.mark.full), "network"])
def backend_of_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on each path. Returns the backend with which a narrow network takes this path."""
    from mlp_fused.engine import autograd, paths

    if request.param == "layer by layer":
        monkeypatch.setattr(autograd, "LAUNCH_BOUND", -1)
    if request.param.startswith("layer"):
        monkeypatch.setattr(paths, "find_network", lambda *arguments: "the other path is tested")
    return "reference" if request.param == "reference" else "triton"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory of torch.empty and similar functions with NaN, to detect elements that no kernel writes."""
    import torch

    def poison(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def by_pointers(device: str) -> Iterator[None]:
    """In the interpreter, replay launches from pointers alone, as a GPU does. On a GPU nothing changes.

    A first call only prepares its launches and computes nothing. So tests use the results of the second call.
    """
    if device == "cuda":
        yield
        return
    import torch

    from mlp_fused.kernels.launch import Launch, _aligned, launched_by

    def at(pointer: object, dtype: object) -> object:
        if isinstance(pointer, tuple):
            return tuple(map(at, pointer, dtype))
        if pointer is None:
            return None
        if pointer == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer((ctypes.c_byte * 16).from_address(pointer), dtype=dtype, count=1)

    def dtypes(tensor: object) -> object:
        if isinstance(tensor, tuple):
            return tuple(map(dtypes, tensor))
        return None if tensor is None else tensor.dtype

    def prepare(launch: Launch, tensors: Sequence[object]) -> None:
        if not _aligned(tensors):  # such a launch is never replayed
            launch.kernel[(launch.programs,)](*tensors, *launch.scalars, **launch.constants)
            return
        tensor_dtypes = tuple(map(dtypes, tensors))

        def run(programs: int, *arguments: object) -> None:
            # The pointers come after the grid, the stream, the kernel and the arguments for hooks.
            pointers = arguments[8 : 8 + len(tensor_dtypes)]
            launch.kernel[(programs,)](*map(at, pointers, tensor_dtypes), *launch.scalars, **launch.constants)

        if launch.programs:
            launch.run, launch.binary = run, (None, None)

    with launched_by(prepare):
        yield


@pytest.fixture(params=["layer", "network"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that the public functions and modules take."""
    from mlp_fused.engine import paths

    if request.param == "layer":
        monkeypatch.setattr(paths, "find_network", lambda *arguments: "the other path is tested")
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _no_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Test the rules without measured tables: neither the user's nor the packaged ones overrule them."""
    from mlp_fused.engine import tables

    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.mktemp("tables")
        patch.setenv("XDG_CACHE_HOME", str(empty))
        patch.setattr(tables, "PACKAGED", empty / "tuned")
        yield


@pytest.fixture
def table_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of all measured tables, empty at first: the user's are in `cache`, and the packaged ones in `tuned`.

    The cached tables are cleared before and after the test.
    """
    from mlp_fused.engine import paths, tables

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "tuned")
    paths.forget_tables()
    yield tmp_path
    paths.forget_tables()


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Set torch's seed to 0 before every test, and restore the fp32 precision of products after it."""
    import torch

    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data.npz in it: 50 rows, 3 features, 2 classes."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(50, 3)), y=np.arange(50) % 2)
    return tmp_path
