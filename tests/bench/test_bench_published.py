"""The figures' data, the tables and the READMEs, compared with the raw logs, which independent code reads."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from readme import READMES, readme, readme_text

from bench import published, report
from bench.results import load
from mlp_fused import plots
from mlp_fused.plots import Theme

ROOT = Path(__file__).parents[2]
RAW = ROOT / "tests" / "data" / "h100"
RESULTS = ROOT / "bench" / "results"
FILE = RESULTS / "nvidia_h100_80gb_hbm3-2026-11-26.json"
NEWER = RESULTS / "nvidia_h200-2026-11-27.json"  # the file of the README's table
NEWER_RAW = ROOT / "tests" / "data" / "h200"
FILES = [pytest.param(path, id=path.stem) for path in (FILE, NEWER)]
COPY_RATE = 3009.4e9  # bytes/s, by transfer.log

Record = dict[str, Any]


@pytest.fixture(scope="module")
def content() -> Record:
    return load(FILE)


def raw_cells(folder: Path = RAW) -> dict[str, Record]:
    return {cell["cell"]: cell for cell in map(json.loads, (folder / "cells.jsonl").read_text().splitlines())}


def raw_tinycudann() -> dict[str, dict[str, Record]]:
    """The log's numbers: network -> "ours", "tcnn" or "tcnn jit" -> name -> milliseconds."""
    networks: dict[str, dict[str, Record]] = {}
    for line in (RAW / "tinycudann.log").read_text().splitlines():
        if line.startswith("W"):
            network = networks.setdefault(line, {})
        elif (start := line.find("{")) >= 0:
            network[line[:start].strip()] = ast.literal_eval(line[start:])
    return networks


# The data of the figures


def test_rows_per_second_equal_those_of_the_log(content: Record) -> None:
    shown = {
        (case.network["phase"], case.network["widths"][0], case.network["rows"]): case
        for case in published.throughput(content)
    }
    logged = raw_tinycudann()
    assert len(shown) == 2 * len(logged) == 8
    for title, numbers in logged.items():
        width, rows = int(title[1:].split()[0]), int(title.split()[-1])
        ours, theirs = numbers["ours"], [numbers[who] for who in ("tcnn", "tcnn jit") if who in numbers]
        fastest = {
            name: min(times[f"{name}_{how}"] for times in theirs for how in ("user", "raw"))
            for name in ("inference", "fwd_bwd")
        }
        expected = {
            "inference": {
                "ours": ours["inference"],
                "eager": ours["eager_inference"],
                "tinycudann": fastest["inference"],
            },
            "training": {
                "ours": ours["fwd_bwd"],
                "eager": ours["eager_fwd_bwd"],
                "ours dx": ours["fwd_bwd_dx"],
                "tinycudann dx": fastest["fwd_bwd"],
            },
        }
        for phase, milliseconds in expected.items():
            actual = shown[phase, width, rows]
            assert actual.rates == pytest.approx({name: 1e3 * rows / ms for name, ms in milliseconds.items()})


@pytest.mark.parametrize(
    ("phase", "width", "rows", "bytes_per_row"),
    [
        ("inference", 64, 2**20, 2 * (64 + 64)),
        ("inference", 64, 2**18, 2 * (64 + 16)),
        ("training", 128, 2**20, 2 * (2 * 128 + 128 + 128)),
        ("training", 64, 2**18, 2 * (2 * 64 + 16 + 16)),
    ],
)
def test_the_memory_floor_is_bytes_over_the_measured_copy_rate(
    phase: str, width: int, rows: int, bytes_per_row: int, content: Record
) -> None:
    (actual,) = (
        case
        for case in published.throughput(content)
        if (case.network["phase"], case.network["widths"][0], case.network["rows"]) == (phase, width, rows)
    )
    assert actual.floor == pytest.approx(COPY_RATE / bytes_per_row)
    assert all(rate < actual.floor for rate in actual.rates.values())


def test_ratios_beside_the_figure_compare_the_same_work(content: Record) -> None:
    """Eager is compared without the gradient of x, tiny-cuda-nn with it. Cases with ours slower are included."""
    actual = [(case.over_eager, case.over_tinycudann) for case in published.throughput(content)]
    expected = [
        *((0.3669 / 0.0692, 0.3574 / 0.0692), (0.6684 / 0.1141, 0.6405 / 0.1141), (1.3268 / 0.331, 1.4087 / 0.331)),
        *((0.1613 / 0.0559, 0.1116 / 0.0559), (0.9684 / 0.4724, 1.1241 / 0.3161), (1.7636 / 0.946, 1.9375 / 0.9919)),
        *((3.5628 / 2.2608, 4.1727 / 2.2745), (0.7206 / 0.4056, 0.4904 / 0.6204)),
    ]
    assert actual == [pytest.approx(pair) for pair in expected]
    assert min(theirs for _, theirs in actual) < 1


def test_the_parts_of_a_step_are_those_of_the_log(content: Record) -> None:
    actual = published.step_parts(content)
    assert {name: [ms for _, ms in points] for name, points in actual.items()} == {
        "cpu_ms": [1.16, 6, 70.8],
        "usual_ms": [0.4, 0.996, 8.92],
        "prefetched_ms": [0.506, 0.865, 1.52],
        "copy_ms": [0.00677, 0.14, 0.938],
        "launch_ms": [0.411, 0.552, 0.681],
        "kernels_ms": [0.0998, 0.21, 1.3],
    }
    assert {tuple(rows for rows, _ in points) for points in actual.values()} == {(64, 1024, 16384)}


def test_speed_over_eager_is_sorted_and_includes_slower_cells(content: Record) -> None:
    shown = published.speeds(content)
    ratios = sorted(value for _, phases in shown for value in phases.values())
    cells = raw_cells().values()
    expected = [
        cell["dev"][f"{phase} eager"] / cell["dev"][f"{phase} ours"]
        for cell in cells
        for phase in ("fwd", "train", "step")
        if f"{phase} ours" in cell["dev"]
    ]
    assert ratios == pytest.approx(sorted(expected), rel=1e-4)
    assert len(shown) == len(cells)
    slowest = [min(phases.values()) for _, phases in shown]
    assert slowest == sorted(slowest, reverse=True)
    assert slowest[-1] == pytest.approx(0.0115272 / 0.0609542)
    assert sum(value < 1 for value in slowest) == 13


# The figures


def drawn_points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The drawn points by marker, sorted."""
    points_by_marker: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_marker() != "None":
            points_by_marker.setdefault(line.get_marker(), []).extend(zip(line.get_xdata(), line.get_ydata()))
    return {marker: sorted(points) for marker, points in points_by_marker.items()}


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda theme: theme.name)
def test_the_figures_show_their_data(theme: Theme, content: Record) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shown = published.throughput(content)
    (axes,) = published.throughput_figure(theme, shown, "a GPU").axes
    drawn = drawn_points(axes)
    for marker, name in (("o", "ours"), ("s", "eager"), ("D", "tinycudann")):
        rates = [1e-9 * rate for case in shown for system, rate in case.rates.items() if system.startswith(name)]
        assert [x for x, _ in drawn[marker]] == pytest.approx(sorted(rates))
    floors = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 2 and line.get_marker() == "None"]
    assert floors == pytest.approx([1e-9 * case.floor for case in shown])

    lines = published.step_parts(content)
    (axes,) = published.step_figure(theme, lines, "title").axes
    assert drawn_points(axes) == {published.STEP_SERIES[name].marker: points for name, points in lines.items()}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "1,024", "16,384"]

    speeds = published.speeds(content)
    (axes,) = published.speed_figure(theme, speeds, "a GPU").axes
    drawn = drawn_points(axes)
    for marker, phase in (("o", "inference"), ("s", "training")):
        assert [x for x, _ in drawn[marker]] == sorted(ratios[phase] for _, ratios in speeds if phase in ratios)
    assert [label.get_text() for label in axes.get_yticklabels()] == [name for name, _ in speeds]
    assert any(list(line.get_xdata()) == [1, 1] for line in axes.lines)


@pytest.mark.parametrize("path", FILES)
def test_the_committed_page_and_figures_are_generated_from_the_file(path: Path) -> None:
    content = load(path)
    shown, slug = published.figures(content), published.slug(content)
    assert (RESULTS / f"{slug}.md").read_text() == published.page(content, shown, slug)
    for name, plot in shown.items():
        for theme in ("light", "dark"):
            drawn = (RESULTS / f"{slug}-{name}-{theme}.svg").read_text()
            described = re.search("<dc:description>(.*?)</dc:description>", drawn, re.DOTALL)
            assert described, name
            assert described[1] == plot.alt.replace(">", "&gt;"), "draw it again: python -m bench.report"
            assert len(drawn) < 150_000


def test_a_file_has_figures_and_sections_for_its_readings() -> None:
    older, newer = (load(path) for path in (FILE, NEWER))
    assert list(published.figures(older)) == ["throughput", "step", "speed"]
    assert list(published.figures(newer)) == ["speed"]
    headings = re.findall("^## (.*)$", (RESULTS / f"{NEWER.stem}.md").read_text(), re.MULTILINE)
    assert headings == ["Against eager PyTorch", "Full fp32 on tensor cores", "Errors against float64"]


# The READMEs


TEXTS = {name: readme_text(name) for name in READMES}


def test_the_readmes_block_of_results_is_generated_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(FILE), str(NEWER), "--table"]) == 0
    assert readme("measured") == capsys.readouterr().out, "python -m bench.report FILE FILE --table prints the block"


def test_the_manuals_table_of_fp32_is_generated_from_the_file() -> None:
    assert readme("float32").split("\n") == list(published.float32_table(load(NEWER)))


def test_the_readme_names_every_call_that_is_not_faster_in_a_loop() -> None:
    cells = raw_cells(NEWER_RAW)
    text = readme("measured").replace("\n", " ")
    for name in published.TABLE:
        for short, phase in (("fwd", "inference"), ("train", "training")):
            ours, eager = (cells[name]["ms"][f"{short} {system}"][0] for system in ("ours", "eager"))
            assert (f"{phase} {ours:#.3g} / {eager:#.3g}" in text) == (eager < 1.01 * ours), (name, phase)


def test_every_number_of_the_readme_s_table_is_a_reading() -> None:
    """Compare each cell with the raw log: the milliseconds of ours and of eager, and their ratio."""
    readings: set[tuple[str, ...]] = {("-", "-", "-")}
    for cell in raw_cells(NEWER_RAW).values():
        for phase in ("fwd", "train"):
            if f"{phase} ours" in cell["dev"]:
                ours, eager = (cell["dev"][f"{phase} {system}"] for system in ("ours", "eager"))
                speed = eager / ours
                readings.add((f"{ours:#.3g}", f"{eager:#.3g}", f"{speed:.2f}x" if speed < 1.995 else f"{speed:.1f}x"))
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in readme("measured").splitlines()
        if line[:1] == "|"
    ]
    header, _, *rows = rows
    assert len(header) == 7
    assert len(rows) == len(published.TABLE) <= 11
    for row in rows:
        assert {tuple(row[1:4]), tuple(row[4:7])} <= readings, row
    assert any(float(row[6].strip("x")) < 1 for row in rows if row[6] != "-"), "the slower networks are shown too"


def test_the_readme_s_output_of_transfer_has_the_numbers_of_the_log() -> None:
    """The log is older than the wording of the output, so numbers are compared, line by line."""

    def numbers(text: str) -> list[list[str]]:
        lines = (re.findall(r"\d[\d.,e+]*", line) for line in text.splitlines())
        return [line for line in lines if line]

    log, shown = numbers((RAW / "transfer.log").read_text()), numbers(readme("transfer"))
    places = [log.index(line) for line in shown]
    assert places == sorted(places)
    assert len(shown) > 12


def test_the_readme_s_output_of_tune_has_the_readings_of_the_products() -> None:
    table = json.loads((RAW / "tuned.json").read_text())
    readings = {
        (product["kind"], product["width_in"], product["width_out"], product["rows"], product["dtype"]): product
        for product in table["gemms"]
    }
    text = readme("tune")
    rows = re.findall(
        r"^(\w+) (\d+) -> (\d+), (\d+) rows, (\w+) +([\d.]+) +([\d.]+) +([\d.]+)  (.*)$", text, re.MULTILINE
    )
    assert len(rows) >= 5
    for kind, width_in, width_out, count, dtype, torchs, ours, ratio, fastest in rows:
        product = readings[kind, int(width_in), int(width_out), int(count), dtype]
        assert (torchs, ours) == (f"{product['torch_ms']:.4f}", f"{product['ms']:.4f}")
        assert ratio == f"{product['torch_ms'] / product['ms']:.2f}"
        assert (fastest == "PyTorch") == (product["tile"] is None)
    won = sum(product["tile"] is not None for product in table["gemms"])
    assert f"our kernels are faster in {won} of {len(table['gemms'])} problems;" in text
    assert table["device"] in text


def test_statements_on_tests_and_training_are_in_the_file(content: Record) -> None:
    origin = content["origin"]
    passed = f"{origin['tests']['passed']} of {origin['tests']['gpu_tests']} GPU tests passed"
    assert passed in TEXTS["bench/README.md"]
    newer = load(NEWER)["origin"]["tests"]
    assert f"{newer['passed']} of {newer['gpu_tests']} GPU tests of the new kernels passed" in TEXTS["bench/README.md"]
    accuracy = f"accuracy is {origin['train']['accuracy']} after {origin['train']['epochs']} epochs"
    assert accuracy in TEXTS["mlp_fused/README.md"].replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "figure", "folder"),
    [("README.md", "throughput", "bench/results"), ("mlp_fused/README.md", "step", "../bench/results")],
)
def test_pictures_match_the_file(name: str, figure: str, folder: str, content: Record) -> None:
    pictures = re.findall("^<picture>.*</picture>$", TEXTS[name], re.MULTILINE)
    assert pictures == [published.readme_picture(content, figure, folder)]
    for link in re.findall(r'(?:srcset|src)="([^"]+)"', pictures[0]):
        assert ((ROOT / name).parent / link).is_file()


# The command


def test_files_of_both_kinds_go_through_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert report.main([str(FILE), "--out", str(tmp_path / "out")]) == 0
    assert f"58 networks, 6 plots: {tmp_path / 'out' / FILE.stem}.md" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in RESULTS.iterdir() if path.name.startswith(FILE.stem) and path != FILE
    }
    other = tmp_path / "other.json"
    other.write_text('{"schema": 2}')
    assert report.main([str(other), str(FILE), "--out", str(tmp_path / "none")]) == 2
    assert "has published readings, which cannot be merged with other files" in capsys.readouterr().err
    assert report.main([str(other), "--table"]) == 2
    assert f"{other} has no published readings" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
