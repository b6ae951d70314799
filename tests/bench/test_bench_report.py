"""The report, on invented rows of an invented GPU."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import comparison, copy_row, errors, gemm_row, network_row

from bench import report, report_plots, results
from bench.baselines import BASELINES
from bench.copies import WAYS
from bench.figures import strip
from bench.gemm import GEMM_BASELINES
from bench.machine import machine
from bench.markdown import number
from bench.problem import COPIED_PHASES, FRESH_PHASES, GEMM_PHASES, GRID, Cell, Problem
from bench.rows import CellRow, Copied, FailedRow, FreshRow, Kept, Memory, NetworkRow, TimedRow, to_json
from mlp_fused import plots

to_rgba = pytest.importorskip("matplotlib.colors", reason="matplotlib is not installed").to_rgba

# Rows of every kind, with times that a GPU might take


def invented_row(cell: Cell, chance: random.Random) -> CellRow:
    """An invented row for a cell."""
    if cell.phase == "lecture":
        names = ("cpu_product", *(name for name in report.LECTURE if name != "cpu_product"))
        return FreshRow.for_cell(
            cell, "cuda", seconds={"any": {name + again: 0.1 for name in names for again in ("", "_2")}}
        )
    if cell.phase in FRESH_PHASES:
        seconds = {"context": 0.3, "copy": 0.1, "copy_2": 0.001}
        return FreshRow.for_cell(cell, "cuda", seconds={"cold": seconds, "warm": seconds})
    if cell.phase == "copy":
        return invented_copy(cell, chance)
    floor = invented_ms(cell.problem, cell.phase, None)
    ratio = chance.lognormvariate(0.4, 0.25)
    kernel_ms = floor * ratio
    ms = max(kernel_ms, 0.02) * chance.uniform(1, 1.02)
    baselines = {}
    for name in report_plots.SERIES:
        if results.is_meant(name, cell, "cuda"):
            times = {"eager": 1.8, "matmul": 0.97, "compile_max_autotune": 1.2}.get(name, 1.4)
            baselines[name] = comparison(times * chance.lognormvariate(0, 0.2), ms)
    if cell.phase in GEMM_PHASES:
        row_errors = errors((1e-7, 1e-6), (1e-7, 1e-6))
        return gemm_row(cell, kernel_ms=kernel_ms, ratio=ratio, baselines=baselines, errors=row_errors)
    memory = None
    if cell.phase == "training":
        saved_share = 0.55 if cell.problem.activation == "gelu" else 1.0
        ours = Kept(
            round(1e6 * saved_share * chance.uniform(0.95, 1)), round(2e6 * saved_share * chance.uniform(0.8, 1))
        )
        memory = Memory(ours, Kept(10**6, 2 * 10**6))
    return network_row(cell, ms=ms, kernel_ms=kernel_ms, ratio=ratio, baselines=baselines, memory=memory)


def invented_copy(cell: Cell, chance: random.Random) -> CellRow:
    nbytes = cell.problem.rows * cell.problem.widths[0] * (4 if cell.problem.dtype == "fp32" else 2)
    copied = {}
    for how, gbps in (("pageable", 8.0), ("pinned", 48.0), ("pinned_side_stream", 50.0)):
        ms = 0.01 + 1e-6 * nbytes / gbps
        copied[how] = Copied(ms, 0.005, 1e-6 * nbytes / ms)
    kernel_ms = {phase: invented_ms(cell.problem, phase, chance) for phase in COPIED_PHASES}
    copy_ms, compute = copied["pinned_side_stream"].ms, max(0.15, kernel_ms["step"])
    taken = {
        "to_device": copied["pageable"].ms + compute,
        "non_blocking": copy_ms + compute,
        "prefetched": max(copy_ms, compute) * chance.uniform(1.0, 1.06),
        "resident": compute,
    }
    return copy_row(cell, copied, taken, kernel_ms, chance.uniform(1, 1.09))


def invented_ms(problem: Problem, phase: str, chance: random.Random | None) -> float:
    """An invented time: FLOPs at 400 TFLOP/s (fp32: 50), plus 2 µs per kernel, with noise if `chance` is given."""
    parameters = sum(k * n for k, n in pairwise(problem.widths))
    rate = 50e12 if problem.dtype == "fp32" else 400e12
    ms = 1e3 * (2 if phase == "forward" else 6) * problem.rows * parameters / rate + 2e-3 * len(problem.widths)
    return ms * (1 if chance is None else chance.lognormvariate(0.3, 0.2))


MACHINE = machine() | {
    "gpu": "NVIDIA H200",
    "driver": "580.65",
    "cuda": "13.0",
    "cpu": "A CPU",
    "user_table": None,
    "distorted": None,
}


def file_in(
    folder: Path, rows: list[CellRow], name: str = "results.json", date: str = "2026-03-01", **changes: Any
) -> Path:
    """Write a file like pytest-benchmark does."""
    path = folder / name
    benchmarks = [{"name": "test", "extra_info": to_json(row)} for row in rows]
    content = {"machine_info": MACHINE | changes, "datetime": f"{date}T12:00:00+00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def rows() -> dict[str, CellRow]:
    chance = random.Random(0)
    return {str(cell): invented_row(cell, chance) for cell in GRID}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, CellRow]) -> Path:
    """The whole report, written once."""
    folder = tmp_path_factory.mktemp("report")
    path = file_in(folder, list(rows.values()))
    assert report.main([str(path), "--out", str(folder / "out")]) == 0
    return folder / "out"


def read_markdown(path: Path) -> str:
    return report.markdown(results.merge([results.read(path)]), {}, "slug")


def find_line(text: str, cell: Cell) -> list[str]:
    """The cells of the first table's line about a cell of the grid."""
    name = f"| `{str(cell).removeprefix(f'{cell.family}-')}` |"
    (line, *_) = (line for line in text.splitlines() if line.startswith(name))
    return [entry.strip() for entry in line.removeprefix(name).strip("|").split("|")]


# The tables


def test_the_report_describes_the_machine(written: Path) -> None:
    text = (written / "nvidia_h200.md").read_text()
    assert text.startswith("# Measured on NVIDIA H200\n")
    for name, value in (
        ("driver", "580.65"),
        ("CUDA", "13.0"),
        ("torch", torch.__version__),
        ("Triton", str(MACHINE["triton"] or "none")),
        ("mlp_fused", f"{MACHINE['mlp_fused']}, sources {MACHINE['source']}"),
        ("date", "2026-03-01"),
        ("files", "results.json"),
    ):
        assert f"| {name} | {value} |" in text


def test_every_cell_of_the_grid_is_in_the_report(written: Path, rows: dict[str, CellRow]) -> None:
    text = (written / "nvidia_h200.md").read_text()
    for cell in GRID:
        if cell.phase in FRESH_PHASES:
            assert f"`{cell.problem}`" in text or cell.phase == "lecture"
        else:
            assert report.NOT_MEASURED not in find_line(text, cell)
    cell = GRID[0]
    row, line = rows[str(cell)], find_line(text, cell)
    assert isinstance(row, NetworkRow)
    assert line[0] == row.ours.path
    assert line[1] == number(row.ours.timing.ms)
    assert line[3] == f"{number(row.baselines['eager'].speedup)}x"


def test_missing_rows_are_marked_and_failed_rows_give_the_reason(tmp_path: Path, rows: dict[str, CellRow]) -> None:
    missing, failed, lacking, *_ = (cell for cell in GRID if cell.family == "seed" and cell.phase == "forward")
    whole = rows[str(lacking)]
    assert isinstance(whole, NetworkRow)
    others = {name: baseline for name, baseline in whole.baselines.items() if name not in ("compile", "cuda_graph")}
    changed = {**rows, str(failed): FailedRow.for_cell(failed, "cuda", error="AssertionError: |<wrong>")}
    changed[str(lacking)] = replace(whole, baselines=others, failures={"compile": "out of memory"})
    remaining = [
        row for name, row in changed.items() if name != str(missing) and not name.startswith(("large", "warmup"))
    ]
    text = read_markdown(file_in(tmp_path, remaining))
    assert set(find_line(text, missing)) == {report.NOT_MEASURED}
    assert find_line(text, failed)[0] == "failed: AssertionError: &#124;&lt;wrong>"
    header = next(line for line in text.splitlines() if "path or tile" in line)
    names = [entry.strip() for entry in header.strip("|").split("|")][1:]
    line = dict(zip(names, find_line(text, lacking), strict=True))
    assert line[report_plots.LABELS["compile"]] == "failed"
    assert line[report_plots.LABELS["cuda_graph"]] == report.NOT_MEASURED
    assert line[report_plots.LABELS["compile_max_autotune"]] == report.NOT_MEANT
    assert "large: not measured (48 rows)." in text
    assert "`model.warmup`, `784x512x512x10-relu-fp32-m64`: not measured." in text
    assert "| seed forward | 1 of 3, 1 failed |" in text
    assert "| large forward | 0 of 12 | not measured |" in text
    assert "tiny-cuda-nn: not measured." in text


def test_the_lecture_is_explained(tmp_path: Path, rows: dict[str, CellRow]) -> None:
    name = next(name for name in rows if name.endswith("-lecture"))
    row = rows[name]
    assert isinstance(row, FreshRow)
    seconds = {
        "product_returned": 1.5,
        "product_returned_2": 20e-6,
        "product_2": 0.04,
        "cpu_product_2": 2.0,
        "copy_2": 0.1,
    }
    text = read_markdown(file_in(tmp_path, [replace(row, seconds={"any": row.seconds["any"] | seconds})]))
    assert "shows 0.00 s for the second product, because the call returns after 20 µs" in text
    assert "The product is done after 0.0400 s, 2,000 times as long." in text
    assert "The CPU takes 2.0000 s; copies and product on the GPU take 0.1400 s." in text
    assert f"| {report.LECTURE['product_returned']} | 1,500 | 0.0200 |" in text


def test_a_file_of_a_machine_without_a_gpu(tmp_path: Path, rows: dict[str, CellRow]) -> None:
    on_cpu = [replace(row, device="cpu") for name, row in rows.items() if name.startswith("seed")]
    text = read_markdown(file_in(tmp_path, on_cpu, gpu=None, driver=None))
    assert text.startswith("# Measured on A CPU\n")
    assert "| GPU | none |" in text
    assert "| seed step | 3 of 3 |" in text
    assert "Copies of the inputs, and their time / the kernels' time: not measured (98 rows)." in text


# The plots


def test_each_plot_has_a_light_and_a_dark_version_and_alt_text(written: Path) -> None:
    text = (written / "nvidia_h200.md").read_text()
    pictures = re.findall(
        r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(.*?)"><img src="(.*?)" alt="(.*?)">', text
    )
    named = {name for dark, light, _ in pictures for name in (dark, light)}
    assert named == {path.name for path in written.glob("*.png")}
    assert len(pictures) == 6
    for dark, light, alt in pictures:
        assert dark.replace("-dark", "-light") == light
        assert re.search(r"[Mm]edian.*\d", alt)
        assert len({(written / name).read_bytes()[:4] for name in (dark, light)} | {b"\x89PNG"}) == 1
    assert {path.suffix for path in written.iterdir()} == {".png", ".md"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, CellRow]) -> results.Results:
    return results.read(file_in(tmp_path_factory.mktemp("rows"), list(rows.values())))


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("name", ["copy", "throughput", "speed", "products", "floor", "memory"])
def test_plots_have_labels_and_distinct_markers_and_colours(
    name: str, theme: plots.Theme, measured: results.Results
) -> None:
    figure = report_plots.make_plots(measured)[name].figure(theme)
    (axes,) = figure.axes
    assert re.search(r"\(MB\)$| / ", axes.get_xlabel())
    assert re.search(r"\(.+\)$", axes.get_ylabel()) or all(label.get_text() for label in axes.get_yticklabels())
    assert "NVIDIA H200" in axes.get_title()
    (legend,) = figure.legends
    series = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in series]
    assert len({line.get_marker() for line in series}) == len({line.get_color() for line in series}) == len(series)
    lettering = [*legend.get_texts(), *axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes.xaxis.label]
    assert {text.get_color() for text in lettering} == {theme.ink}
    assert figure.get_facecolor() == axes.get_facecolor() == to_rgba(theme.background)
    points = sum(len(line.get_xdata()) for line in series)
    timed = [row for row in measured.rows.values() if isinstance(row, TimedRow)]
    trained = [row for row in timed if isinstance(row, NetworkRow) and row.memory is not None]
    compared = {"speed": results.NETWORKS, "products": ("gemm",)}.get(name, ())
    families = compared or (*results.NETWORKS, "gemm")
    shown = [len(row.baselines) if compared else 1 for row in timed if row.family in families]
    assert points == {"copy": 3 * 98, "throughput": 3 * 98, "memory": 2 * len(trained)}.get(name, sum(shown))


@pytest.mark.parametrize("values", [[0.98, 1.02], [0.9, 1.3], [0.5, 4.0], [0.01, 90.0]], ids=str)
def test_an_axis_has_numbers_whatever_its_range(values: list[float]) -> None:
    figure = strip(plots.LIGHT, {"seed step": {"eager": values}}, report_plots.SERIES, "label", "title", log=True)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 12


def test_every_series_has_a_style() -> None:
    names = {baseline.name for baseline in BASELINES} | set(GEMM_BASELINES)
    assert set(report_plots.SERIES) == names
    assert set(report_plots.WAY_SERIES) == {way for way in WAYS if way != "resident"}
    assert set(report_plots.PHASE_SERIES) == set(COPIED_PHASES)


# Files that do not belong together


def test_a_later_row_counts_whatever_the_order_of_the_files(tmp_path: Path, rows: dict[str, CellRow]) -> None:
    cell = GRID[0]
    old, new = (network_row(cell, path=path) for path in ("reference", "network"))
    other = rows[str(GRID[1])]
    first = results.read(file_in(tmp_path, [old, other], "first.json", "2026-03-01"))
    second = results.read(file_in(tmp_path, [new], "second.json", "2026-03-05"))
    for files in ([first, second], [second, first]):
        merged = results.merge(files)
        text = report.markdown(merged, {}, "slug")
        assert find_line(text, cell)[0] == "network"
        assert "1 row of first.json was measured again later." in text
        assert "| date | 2026-03-01 to 2026-03-05 |" in text
        assert "| files | first.json, second.json |" in text
        assert len(merged.rows) == 2


def test_a_file_of_gpu_py_gives_the_same_report(tmp_path: Path, rows: dict[str, CellRow]) -> None:
    path = tmp_path / "nvidia_h200.json"
    content: dict[str, Any] = {"schema": results.SCHEMA, "machine": MACHINE, "updated": "2026-03-01T12:00:00+00:00"}
    content["rows"] = {name: to_json(row) for name, row in rows.items()}
    path.write_text(json.dumps(content))
    other = file_in(tmp_path, list(rows.values()), "results.json")
    assert read_markdown(path) == read_markdown(other).replace("results.json", "nvidia_h200.json")
    path.write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(results.UnfitError, match="has schema 1; it needs schema 3"):
        results.read(path)


def refused(paths: list[Path], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a refused report, which writes nothing."""
    assert report.main([*map(str, paths), "--out", str(folder / "out")]) == 2
    assert not (folder / "out").exists()
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    return line.removeprefix("nothing was written: ")


@pytest.mark.parametrize("name", results.ONE_MACHINE)
def test_machines_versions_and_tables_do_not_mix(
    name: str, tmp_path: Path, rows: dict[str, CellRow], capsys: pytest.CaptureFixture[str]
) -> None:
    row = [rows[str(GRID[0])]]
    paths = [file_in(tmp_path, row, "a.json"), file_in(tmp_path, row, "b.json", "2026-03-02", **{name: "another"})]
    assert refused(paths, tmp_path, capsys) == (
        f"b.json and a.json differ ({name} another instead of {MACHINE[name]}): make a report of each"
    )


def test_files_that_are_no_results_are_refused(
    tmp_path: Path, rows: dict[str, CellRow], capsys: pytest.CaptureFixture[str]
) -> None:
    row = rows[str(GRID[0])]
    path = tmp_path / "results.json"

    def refuse_content(text: str) -> str:
        path.write_text(text)
        return refused([path], tmp_path, capsys)

    assert refuse_content("{").startswith(f"{path} is not JSON")
    assert refuse_content("[1]").startswith(f"{path} has no results")
    assert refuse_content('{"a": 1}').startswith(f"{path} has no results")
    assert "cannot be read: No such file" in refused([tmp_path / "none.json"], tmp_path, capsys)
    assert "has no measured row" in refused([file_in(tmp_path, [])], tmp_path, capsys)
    switched = "CUDA_LAUNCH_BLOCKING is set, which makes every launch wait for its kernel: unset it to measure"
    path = file_in(tmp_path, [row], distorted=switched)
    assert refused([path], tmp_path, capsys) == f"{path} has distorted times: {switched}"
    content = json.loads(file_in(tmp_path, [row]).read_text())
    del content["machine_info"]["distorted"]
    assert "does not describe its machine (distorted missing)" in refuse_content(json.dumps(content))
    content = json.loads(file_in(tmp_path, [row]).read_text())
    content["benchmarks"].append({"extra_info": {"slower_by_us": 1.0}})  # a bench that writes no row
    del content["benchmarks"][0]["extra_info"]["ours"]["timing"]["kernel_ms"]
    error = refuse_content(json.dumps(content))
    assert error.startswith(f"{path}: row {row.id}: Timing has no kernel_ms; another version")


def test_a_failed_write_changes_nothing(
    tmp_path: Path, rows: dict[str, CellRow], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_in(tmp_path, [rows[str(GRID[0])]])
    out = tmp_path / "out"
    assert report.main([str(path), "--out", str(out)]) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write_bytes, written = Path.write_bytes, list[Path]()

    def fill(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    file_in(tmp_path, [network_row(GRID[0], path="network")])
    assert report.main([str(path), "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
