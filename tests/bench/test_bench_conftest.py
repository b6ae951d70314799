"""The pytest plugin of the benches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import (
    environment,
)

from bench import conftest, fresh, goals
from bench.conftest import copy_problems
from bench.machine import ROOT
from bench.problem import GRID
from bench.results import read
from bench.rows import NetworkRow
from mlp_fused.environment import DISTORTING, distorted

MEASURES = SimpleNamespace(benchmark=True, benchmark_enable=False, benchmark_only=False)  # pytest's options


@pytest.mark.parametrize("switch", DISTORTING)
def test_nothing_is_measured_under_a_distorting_switch(
    switch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in DISTORTING:
        monkeypatch.delenv(name, raising=False)
    assert distorted() is None
    monkeypatch.setenv(switch, "1")
    refused = f"{switch} is set, which .*: unset it to measure"
    assert re.match(f"{refused}$", str(distorted()))
    with pytest.raises(SystemExit):
        fresh.main(["warmup"])
    assert re.search(refused, capsys.readouterr().err)
    config: Any = SimpleNamespace(option=MEASURES, getoption=lambda name, default: default)
    with pytest.raises(pytest.UsageError, match=refused):
        conftest.pytest_configure(config)


@pytest.mark.parametrize("options", [{"dist": "load"}, {"dist": "no", "worker": True}], ids=["with -n", "in a worker"])
def test_rows_are_not_measured_side_by_side(options: dict[str, Any]) -> None:
    config: Any = SimpleNamespace(option=MEASURES, getoption=lambda name, default: options.get(name, default))
    if "worker" in options:
        config.workerinput = {}
    with pytest.raises(pytest.UsageError, match="--benchmark does not work with -n"):
        conftest.pytest_configure(config)


def test_the_kernels_of_copy_rows_are_compiled_ahead() -> None:
    def item(**params: Any) -> Any:
        return SimpleNamespace(callspec=SimpleNamespace(params=params))

    rows = [item(cell=cell) for cell in GRID]
    problems = copy_problems([SimpleNamespace(), item(phase="copy"), *rows, *rows])  # type: ignore[list-item]
    assert problems == [cell.problem for cell in GRID if cell.phase == "copy"]


def test_the_flag_measures_and_writes_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_grid.py", "bench/bench_compiled.py", "-q"]
    command += ["--benchmark", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    command += ["-k", "seed and m64-forward or test_compiled"]
    child = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stdout
    content = json.loads(path.read_text())
    assert content["machine_info"]["torch"] == torch.__version__
    (row,) = (row for row in read(path).rows.values() if row.device == "cpu")
    assert isinstance(row, NetworkRow)
    assert row.ours.floor.flops == 2 * 64 * (784 * 512 + 512 * 512 + 512 * 10)
    if not torch.cuda.is_available():
        assert "rows skipped: no CUDA device" in child.stdout
        assert "1 rows skipped: no CUDA device; use `python tests/compile_kernels.py --networks`" in child.stdout
        assert f"not measured  ≥ 1.3    {goals.GOALS[7].text}" in child.stdout
