"""The published file has every reading of the raw logs, which independent code reads here."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu import SIZES, Speeds, simulate

from bench import readings
from bench.readings import CELLS, TF32
from mlp_fused.kernels.devices import device_slug

ROOT = Path(__file__).parents[2]
RAW = ROOT / "tests" / "data" / "h100"
NEWER = ROOT / "tests" / "data" / "h200"
RESULTS = {
    RAW: ROOT / "bench" / "results" / "nvidia_h100_80gb_hbm3-2026-11-26.json",
    NEWER: ROOT / "bench" / "results" / "nvidia_h200-2026-11-27.json",
}
FOLDERS = [pytest.param(folder, id=folder.name) for folder in RESULTS]

Record = dict[str, Any]


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def raw_cells(folder: Path = RAW) -> dict[str, Record]:
    return {cell["cell"]: cell for cell in read_lines(folder / "cells.jsonl")}


@pytest.fixture(scope="module")
def content() -> Record:
    return readings.published(RAW)


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


# The file


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_committed_file_is_generated_from_the_raw_readings(folder: Path, tmp_path: Path) -> None:
    generated, committed = tmp_path / "generated.json", RESULTS[folder]
    assert readings.main([str(folder), "--out", str(generated)]) == 0
    assert generated.read_text() == committed.read_text()
    origin = readings.published(folder)["origin"]
    assert committed.stem == f"{device_slug(origin['gpu'])}-{origin['date']}"


def test_ids_are_unique_and_every_network_names_every_system(content: Record) -> None:
    networks = content["networks"]
    assert len({network["id"] for network in networks}) == len(networks)
    assert {tuple(network["systems"]) for network in networks} == {readings.SYSTEMS}
    with pytest.raises(ValueError, match=r"^narrow64 has the systems jax; they need to be in SYSTEMS$"):
        readings.network("narrow64", CELLS["narrow64"], "inference", {"jax": readings.reading(1.0)})


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_reading_of_a_cell_is_lost_or_changed(folder: Path) -> None:
    by_id = {network["id"]: network for network in readings.published(folder)["networks"]}
    names = {"captured ours": "captured", "captured eager": "captured_eager"}
    count = 0
    for name, cell in raw_cells(folder).items():
        for label, (median, low, high) in cell["ms"].items():
            short, system = label.split(" ", 1)
            actual = by_id[f"{name}-{readings.PHASES[short]}"]["systems"][names.get(system, system)]
            assert (actual["loop_ms"], actual["loop_low_ms"], actual["loop_high_ms"]) == (median, low, high)
            assert actual["device_ms"] == cell["dev"].get(label)
            kernels = cell["kernels"].get(label)
            assert numbers(actual["kernels"]) == numbers(None if kernels is None else [k[1] for k in kernels])
            count += 1
    assert count == sum(
        reading is not None
        for name in CELLS
        for phase in readings.PHASES.values()
        for reading in by_id.get(f"{name}-{phase}", {"systems": {}})["systems"].values()
    )


def test_logs_that_were_not_measured_are_left_out() -> None:
    content = readings.published(NEWER)
    assert content["transfer"] is None
    assert content["ceilings"] == {"memory_gbps": 4249.28}
    assert {network["id"].rsplit("-", 1)[0] for network in content["networks"]} == set(raw_cells(NEWER)) < set(CELLS)
    assert "float32" not in readings.published(RAW)


def test_full_fp32_has_the_times_and_errors_of_its_logs() -> None:
    actual = {
        (tuple(network["widths"]), network["activation"], network["phase"]): (
            *(network[system]["ms"] for system in ("ours", "eager")),
            *(network[system]["error_float64"] for system in ("ours", "eager")),
        )
        for network in readings.published(NEWER)["float32"]
    }
    nets = [line for line in read_lines(NEWER / "planes.jsonl") if line["part"] == "nets"]
    assert len(actual) == 2 * len(nets) + 2
    assert actual[(1024, 4096, 1024), "gelu", "inference"] == pytest.approx((0.8881, 2.8027, 3.312e-7, 1.3235e-6), 1e-3)
    assert actual[(4096, 16384, 4096), "gelu", "training"][:2] == pytest.approx((9.140, 26.928), 1e-3)
    assert actual[(512,) * 5, "relu", "training"][:2] == pytest.approx((1.3992, 2.2478), 1e-3)
    assert actual[(64,) * 5, "relu", "inference"] == pytest.approx((0.3604, 1.5122, 2.893e-7, 2.2986e-7), 1e-3)
    kernels = 0.52018 + 0.68445 + 0.65193  # the forward that stores, dgrad and wgrad
    assert actual[(64,) * 5, "relu", "training"] == pytest.approx((kernels, 4.5463, 1.3247e-7, 4.3674e-7), 1e-3)


@pytest.mark.parametrize("log", ["tinycudann.log", "quack.log"])
def test_every_time_of_a_log_is_published(log: str, content: Record) -> None:
    """The exception is tiny-cuda-nn's forward of training, which has no counterpart of ours."""
    text = re.sub(r"'(forward_raw|rel_err)': [\d.]+", "", (RAW / log).read_text())
    logged = sorted(float(number) for number in re.findall(r"\d+\.\d{3,4}\b", text))
    prefix = log.removesuffix(".log")
    networks = [network for network in content["networks"] if network["id"].startswith(prefix)]
    shown = [reading["loop_ms"] for network in networks for reading in network["systems"].values() if reading]
    assert logged == sorted(shown)
    assert not any(network["bias"] for network in networks)


def test_every_duration_of_the_transfer_log_is_published(content: Record) -> None:
    text = (RAW / "transfer.log").read_text()
    measured, _ = text.split("\nof a step of 16,384 rows")  # the rest repeats the tables
    measured = re.sub(r"of the forward's.*", "", measured)
    milliseconds = {"s": 1e3, "ms": 1.0, "µs": 1e-3}
    logged = [float(value) * milliseconds[unit] for value, unit in re.findall(r"(\d[\d.e+]*) (s|ms|µs)", measured)]
    transfer = content["transfer"]
    shown = [
        *numbers(transfer["first_touch_ms"]),
        *(part[clock] for part in transfer["each_time"] for clock in ("device_ms", "host_ms", "returned_ms")),
        *numbers(transfer["on_cpu_ms"]),
        *(step[column] for step in transfer["steps"] for column in readings.STEP_COLUMNS),
    ]
    assert sorted(value for value in shown if value is not None) == pytest.approx(sorted(logged))
    assert [step["bound"] for step in transfer["steps"]] == ["launch_ms", "launch_ms", "kernels_ms"]
    assert [step["rows"] for step in transfer["steps"]] == [64, 1024, 16384]
    assert content["ceilings"] == {"memory_gbps": 3009.4, "to_device_gbps": 55.1, "to_host_gbps": 54.9}


def test_the_output_of_transfer_is_parsed_with_its_numbers() -> None:
    result = simulate(Speeds())
    record = readings.transfer(str(result))
    gpu = result.at_rows.gpu
    assert gpu is not None
    named = {part["name"]: part for part in record["each_time"]}
    assert named["forward kernels"]["device_ms"] == pytest.approx(gpu.forward.device.ms, rel=0.01)
    assert named["host copy into pinned memory"]["host_ms"] == pytest.approx(gpu.staging.ms, rel=0.01)
    assert record["first_touch_ms"]["first forward, kernels compiled"] == 4000
    assert [step["rows"] for step in record["steps"]] == list(SIZES)
    assert [step["bound"] for step in record["steps"]] == ["launch_ms"] * 2 + ["copy_ms"] * 3


# The networks behind the cells' names


def test_every_cell_has_a_network() -> None:
    assert set(CELLS) == set(raw_cells())


@pytest.mark.parametrize("name", CELLS)
def test_a_cells_kernels_are_those_of_its_network(name: str) -> None:
    """Launches give the number of layers. The names of torch's kernels give the dtype and the activation."""
    cell, problem = raw_cells()[name], CELLS[name]
    layers = len(problem.widths) - 1
    kernels = cell["kernels"].get("fwd ours") or cell["kernels"]["step ours"]
    launches = {kernel: count for kernel, (_, count) in kernels}
    assert (
        launches["network_forward_kernel"] == 1
        if cell["path"] == "network"
        else launches["layer_forward_kernel"] == layers
    )
    torchs = cell["kernels"].get("fwd eager") or cell["kernels"]["step eager"]
    names = " ".join(kernel for kernel, _ in torchs)
    products = sum(count for kernel, (_, count) in torchs if re.search("gemm|gemv|nvjet|cutlass", kernel))
    assert products == (layers if "fwd eager" in cell["kernels"] else 3 * layers - 1)  # a step: no gradient of x
    assert ("Gelu" in names) == (problem.activation == "gelu")
    sign = {"fp16": "_hsh_", "bf16": "_tst_", "fp32": "tf32f32" if name in TF32 else "f32f32_f32f32|gemvx"}
    assert re.search(sign[problem.dtype], names)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in ("seed", "latency1", "latency-n64")])
def test_a_cells_time_fits_its_number_of_rows(name: str) -> None:
    """Eager's kernels reach 70 % of the limit of products and copies, so a wrong number of rows would show."""
    cell, problem = raw_cells()[name], CELLS[name]
    nbytes = 4 if problem.dtype == "fp32" else 2
    flops_per_s = 400e12 if name in TF32 else 50e12 if problem.dtype == "fp32" else 731e12
    bytes_per_s = 3.0094e12
    seconds = 0.0
    for k, n in pairwise(problem.widths):
        moved = nbytes * (problem.rows * (k + n) + k * n)
        seconds += max(2 * problem.rows * k * n / flops_per_s, moved / bytes_per_s)
    hidden = sum(problem.widths[1:-1])
    seconds += 2 * nbytes * problem.rows * hidden / bytes_per_s  # the activations, read and written
    assert 0.7 <= 1e3 * seconds / cell["dev"]["fwd eager"] <= 1.05
