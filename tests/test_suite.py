"""The test suite itself: equal ids in every process, the tests that a mark expression selects, failures on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import CASES
from conftest import asks_for

HERE = Path(__file__).parent
ROOT = HERE.parent

pytestmark = pytest.mark.alone


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start Python in a new process group, without the environment variables of pytest-xdist."""
    inherited = {
        name: value for name, value in os.environ.items() if "XDIST" not in name and name != "TRITON_INTERPRET"
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output(process: subprocess.Popen[str], status: int = 0) -> str:
    """The output of a process, once it has ended with this status."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == status, text
    return text


# Collect the suite for the first mark expression, select from it for the others, and write the ids as JSON.
COLLECT = """
import json, sys
import pytest

file, *expressions = sys.argv[1:]
selected = {}

class Collected:
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        self.items = list(items)
        selected.setdefault("all", [item.nodeid for item in items])
        yield
        selected[config.option.markexpr] = [item.nodeid for item in items]

    def pytest_collection_finish(self, session):
        selected["full"] = [item.nodeid for item in self.items if any(not m.args for m in item.iter_markers("full"))]
        for expression in expressions[1:]:
            session.config.option.markexpr = expression
            items = list(self.items)
            session.config.hook.pytest_collection_modifyitems(session=session, config=session.config, items=items)

arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", expressions[0], "tests"]
status = pytest.main(arguments, plugins=[Collected()])
with open(file, "w") as opened:
    json.dump(selected, opened)
sys.exit(status)
"""
ON_A_GPU = ("gpu", "gpu and not alone", "gpu and alone", "gpu and full")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """The ids of all tests ("all"), and those that expressions select.

    They come from two processes with different hash seeds, one for the interpreter and one for a GPU.
    """
    folder = tmp_path_factory.mktemp("ids")
    runs = {"cpu": ("1", ("",)), "gpu": ("2", ON_A_GPU)}
    processes = [
        start("-c", COLLECT, str(folder / name), *expressions, cwd=ROOT, PYTHONHASHSEED=seed)
        for name, (seed, expressions) in runs.items()
    ]
    for process in processes:
        output(process)
    return {name: json.loads((folder / name).read_text()) for name in runs}


def test_ids_are_the_same_in_every_process(collected: dict[str, dict[str, list[str]]]) -> None:
    """The order of ids is the same too, which pytest-xdist needs. A mark expression only deselects tests."""
    cpu, gpu = collected["cpu"]["all"], collected["gpu"]["all"]
    assert [pair for pair in zip(cpu, gpu) if pair[0] != pair[1]] == []
    assert len(cpu) == len(gpu) == len(set(cpu))


def test_a_gpu_runs_full_tests_only_on_request(collected: dict[str, dict[str, list[str]]]) -> None:
    selected = collected["gpu"]
    full = set(selected["full"])
    assert full
    assert not full & set(selected["gpu"])
    assert selected["gpu and full"]
    assert set(selected["gpu and full"]) >= full & {
        test for test in selected["all"] if "test_torch_products.py" in test
    }
    layers = "tests/test_kernels_table.py::test_forward_and_gradients[layer-"
    # Only the interpreter, which is slow, leaves these tests out.
    assert any(test.startswith(layers) for test in selected["gpu"])
    assert not any(test.startswith(layers) for test in collected["cpu"][""])


def test_the_two_commands_for_a_gpu_run_each_of_its_tests_once(collected: dict[str, dict[str, list[str]]]) -> None:
    selected = collected["gpu"]
    together, alone = selected["gpu and not alone"], selected["gpu and alone"]
    assert sorted(together + alone) == sorted(selected["gpu"])
    assert len(together) > 10 * len(alone)
    files = {test.split("::")[0] for test in alone}
    assert {"tests/test_distributed.py", "tests/test_timing.py", "tests/test_transfer_measurement.py"} <= files


@pytest.mark.parametrize(
    ("expression", "asked"),
    [
        ("", ""),
        ("gpu", "gpu"),
        ("not gpu", ""),
        ("not  gpu", ""),
        ("gpu and not alone", "gpu"),
        ("gpu and alone", "gpu alone"),
        ("full", "full"),
        ("gpu and full", "gpu full"),
        ("gpu and not full", "gpu"),
        ("gpu or full", "gpu full"),
        ("not (gpu or full)", ""),
        ("not (not gpu)", "gpu"),
        ("alone and not (gpu or full)", "alone"),
        ("gpu and (fast or full)", "gpu full"),
        ("gpus", ""),
        ("gpu and", ""),
    ],
)
def test_a_mark_expression_asks_for_marks(expression: str, asked: str) -> None:
    assert [mark for mark in ("gpu", "full", "alone") if asks_for(expression, mark)] == asked.split()


def test_dropout_leaves_enough_elements_for_a_norm() -> None:
    """The bound is twice torch's error in a norm. Over two elements, that error may be almost 0 by chance."""
    dropping = [case for case in CASES if case.rows and 0 < case.dropout < 1]
    assert dropping
    assert [case.id for case in dropping if case.rows * case.widths[-1] * (1 - case.dropout) < 8] == []


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for file in ("conftest.py", "interpreter.py"):
        shutil.copy(HERE / file, tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers\nmarkers =\n    gpu\n    full\n    alone\n"
    )
    return tmp_path


# Replacements for fixtures that import torch for every test.
QUICK = """
import pytest

@pytest.fixture(autouse=True, scope="session")
def _no_tables(): pass

@pytest.fixture(autouse=True)
def _fresh_settings(): pass
"""


def pytest_run(suite: Path, test: str, *arguments: str) -> subprocess.Popen[str]:
    (suite / "test_small.py").write_text(QUICK + test)
    return start("-m", "pytest", "-p", "no:cacheprovider", *arguments, cwd=suite)


IN_WORKERS = """
import os

ON_GPU = {on_gpu}

@pytest.mark.gpu
def test_kernels_are_compiled():
    assert ON_GPU and "TRITON_INTERPRET" not in os.environ

def test_kernels_are_interpreted():
    assert not ON_GPU and os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.gpu
@pytest.mark.alone
def test_alone():
    assert "PYTEST_XDIST_WORKER" not in os.environ

@pytest.mark.parametrize("mark", [pytest.param("gpu", marks=pytest.mark.gpu), ""])
def test_nothing_is_benchmarked(mark, benchmark, record_property):
    assert benchmark.disabled
    assert os.environ["OMP_NUM_THREADS"] and benchmark(int) == 0
"""


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [(["-n", "2"], 2), (["-n", "2", "-m", "gpu and not alone"], 2), (["-m", "gpu and alone"], 1)],
    ids=["cpu", "gpu and not alone", "gpu and alone"],
)
def test_workers_read_the_mark_expression(suite: Path, arguments: list[str], passed: int) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    text = output(pytest_run(suite, IN_WORKERS.format(on_gpu="-m" in arguments), *arguments))
    assert f"{passed} passed" in text
    assert "warning" not in text.lower()


FAILS_THEN_HANGS = """
import pathlib, time

def test_fails():
    assert 17 + 4 == 22, "in the first test"

def test_hangs():
    time.sleep(0.5)
    pathlib.Path("hangs").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "a worker"])
def test_a_killed_run_leaves_its_failures_on_disk(suite: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    process = pytest_run(suite, FAILS_THEN_HANGS, *workers, "--failures", "failures.txt")
    try:
        deadline = time.monotonic() + 120
        while not (suite / "hangs").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    text = output(process, -signal.SIGKILL)
    assert "in the first test" not in text  # pytest prints this only at the end
    failures = (suite / "failures.txt").read_text()
    assert failures.startswith("test_small.py::test_fails (call)\n")
    assert "AssertionError: in the first test" in failures


def test_every_failure_is_appended_whatever_fails(suite: Path) -> None:
    (suite / "failures.txt").write_text("of an earlier run\n")
    (suite / "test_broken.py").write_text("import nothing_of_that_name")
    test = (
        "@pytest.fixture\ndef broken():\n    yield\n    raise ValueError('in teardown')\n"
        "def test_passes(broken): pass\n"
        "def test_skips(): pytest.skip('no')\n"
    )
    arguments = ["--failures", "failures.txt", "--continue-on-collection-errors"]
    output(pytest_run(suite, test, *arguments), status=1)
    failures = (suite / "failures.txt").read_text()
    assert failures.startswith("of an earlier run\n")
    titles = [
        line for line in failures.splitlines() if line.endswith(("(call)", "(setup)", "(teardown)", "(collection)"))
    ]
    assert titles == ["test_broken.py (collection)", "test_small.py::test_passes (teardown)"]


def test_file_names_are_unique_and_no_folder_is_a_package() -> None:
    """pytest imports test files by their names alone."""
    names = [path.name for path in HERE.rglob("*.py") if path.name != "conftest.py"]
    assert "__init__.py" not in names
    assert sorted(names) == sorted(set(names))
