"""One command, two ways: on the CPU kernels run in Triton's interpreter; under `-m gpu` the same tests run on a GPU.

A test that takes the fixture `device` is of both kinds. Triton reads TRITON_INTERPRET when the package is imported, so
it is set here, before any test module is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

COMPILED = pytest.StashKey[list[str]]()  # lines of the table of registers, spills and instructions


def _wants(config: pytest.Config, mark: str) -> bool:
    expression = config.getoption("markexpr") or ""
    return mark in expression.replace(f"not {mark}", "")


def pytest_configure(config: pytest.Config) -> None:
    if not _wants(config, "gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        _patch_the_language_once_a_launch()


def _patch_the_language_once_a_launch() -> None:
    """Triton's interpreter patches its language anew for every function that a kernel calls: a third of all its time.

    Once for each module and launch is enough, as the patches stay until the launch ends.
    """
    try:
        from triton.runtime import interpreter

        launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    except (ImportError, AttributeError):  # no Triton, or another one, which is as right and slower
        return
    patched: set[str] = set()

    def launch_afresh(executor, *arguments, **constants):
        patched.clear()
        try:
            return launch(executor, *arguments, **constants)
        finally:
            patched.clear()

    def patch_once(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_afresh, patch_once


@functools.cache
def declare_torchvisions_operators() -> None:
    """Make torchvision importable where its wheel is for CUDA and torch is built for the CPU.

    The operators of such a wheel do not load, and its Python needs two of them declared. timm, transformers and
    torchmetrics import it too.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda is not None:
        return
    if "+cu" in (Path(found.origin).parent / "version.py").read_text():
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `-m gpu`, what takes `device` counts as marked; otherwise what is marked gpu or full is left out."""
    gpu, full = _wants(config, "gpu"), _wants(config, "full")
    left_out = []
    for item in items:
        if gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif (not gpu and item.get_closest_marker("gpu")) or (not full and item.get_closest_marker("full")):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(COMPILED, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: "cpu" (the interpreter) or "cuda"."""
    import torch

    if not _wants(request.config, "gpu"):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    return "cuda"


@pytest.fixture(params=["reference", "layer", pytest.param("layer by layer", marks=pytest.mark.full), "network"])
def backend_of_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path in turn; returns the backend with which networks that fit in one kernel take it."""
    from mlp_fused import chain, functional

    if request.param == "layer by layer":
        monkeypatch.setattr(chain, "LAUNCH_BOUND", -1)
    if request.param.startswith("layer"):
        monkeypatch.setattr(functional, "find_network", lambda *arguments: "the other path is tested")
    return "reference" if request.param == "reference" else "triton"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its like give NaN, so that an element that no kernel wrote shows."""
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
def by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are only prepared the first time, and nothing is written; made again, they run, in the interpreter.

    As on a GPU, they are told nothing then but pointers.
    """
    import torch

    from mlp_fused.kernels.launch import Launch, _aligned

    through_triton = Launch.through_triton

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
        if not _aligned(tensors):  # such a one is never made again
            through_triton(launch, tensors)
            return
        of_tensors = tuple(map(dtypes, tensors))

        def run(programs: int, *arguments: object) -> None:
            pointers = arguments[8 : 8 + len(of_tensors)]  # after the grid, stream, kernel and what hooks are told
            launch.kernel[(programs,)](*map(at, pointers, of_tensors), *launch.scalars, **launch.constants)

        if launch.programs:
            launch.run, launch.binary = run, (None, None)

    monkeypatch.setattr(Launch, "through_triton", prepare)


@pytest.fixture(params=["layer", "network"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that the public functions and modules take."""
    from mlp_fused import functional

    if request.param == "layer":
        monkeypatch.setattr(functional, "find_network", lambda *arguments: "the other path is tested")
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _no_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests are of the rules; neither what this machine's user measured nor what the package brings overrules them."""
    from mlp_fused.kernels import tables

    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.mktemp("tables")
        patch.setenv("XDG_CACHE_HOME", str(empty))
        patch.setattr(tables, "PACKAGED", empty / "tuned")
        yield


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder each for the user's and the packaged tables, both empty; what was read of them is forgotten after."""
    from mlp_fused import plan
    from mlp_fused.kernels import tables

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "tuned")
    plan.forget_tables()
    yield tmp_path
    plan.forget_tables()


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Every test starts from torch's own precision settings and seed."""
    import torch

    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before
