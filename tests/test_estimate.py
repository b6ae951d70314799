"""The time estimate, and the choices that it makes between torch and our kernels, compared with readings of an H100."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import fit
from mlp_fused import ACTIVATIONS
from mlp_fused.engine import table_files
from mlp_fused.kernels import estimate, layer_tiles
from mlp_fused.kernels.devices import DEVICES, known_device
from mlp_fused.kernels.tile_config import Problem, TileConfig

TABLE = table_files.read(Path(__file__).with_name("data") / "h100" / "products.json")
H100 = fit.table_device(TABLE)
FOLDS = 10


def test_rates_are_the_fit_to_the_readings() -> None:
    """`python -m bench.fit tests/data/h100/products.json` writes them."""
    rates = fit.fit(TABLE.gemms, H100)
    for side in ("kernel", "torch"):
        for bits, fitted in getattr(rates, side).items():
            assert fitted == pytest.approx(getattr(estimate.RATES, side)[bits], abs=2e-3), (side, bits)


def test_choices_between_torch_and_kernels_hold_for_held_out_shapes() -> None:
    """Cross-validate in ten folds by layer shape: the rates are fitted without the shape. No table is consulted."""
    shapes = sorted({(row.width_in, row.width_out) for row in TABLE.gemms})
    folds = {shape: index % FOLDS for index, shape in enumerate(shapes)}
    judged = []
    for fold in range(FOLDS):
        inside = [row for row in TABLE.gemms if folds[row.width_in, row.width_out] != fold]
        outside = [row for row in TABLE.gemms if folds[row.width_in, row.width_out] == fold]
        judged += fit.choices(outside, H100, fit.fit(inside, H100))
    ratios = [row.torch_ms / row.ms for row, _ in judged if row.ms]
    assert len(ratios) == 463
    assert sum(ratio < 0.95 for ratio in ratios) == 137
    assert sum(ratio > 1.1 for ratio in ratios) == 227
    always_ours = fit.judge((row, False) for row, _ in judged)
    always_torch = fit.judge((row, True) for row, _ in judged)
    assert (round(always_ours.regret, 2), round(always_torch.regret, 2)) == (1.08, 1.29)
    verdict = fit.judge(judged)
    print(verdict)
    assert verdict.regret <= 1.05
    assert verdict.torch >= 0.85
    assert verdict.ours >= 0.80


def test_estimated_times_are_near_the_readings() -> None:
    for side, deviations in fit.errors(TABLE.gemms, H100, estimate.RATES).items():
        deviations.sort()
        print(
            side,
            f"median {deviations[len(deviations) // 2]:.3f}, nine of ten {deviations[len(deviations) * 9 // 10]:.3f}",
        )
        assert deviations[len(deviations) // 2] <= 0.12
        assert deviations[len(deviations) * 9 // 10] <= 0.35


def test_a_kernel_is_taken_only_with_a_margin() -> None:
    for row in TABLE.gemms:
        problem = row.problem
        ours = estimate.kernel_seconds(problem, layer_tiles.choose(problem, H100), H100)
        torchs = estimate.torch_seconds(problem, H100)
        assert (layer_tiles.why_torch(problem, H100) is None) == (layer_tiles.MARGIN * ours <= torchs)


def test_kernels_measured_slower_are_left_to_torch() -> None:
    wide = Problem("forward", 8192, 4096, 1024, torch.float32, "tf32")
    assert layer_tiles.why_torch(wide, H100) == "tf32 kernels were slower than torch where measured"
    one_row = Problem("forward", 1, 512, 784, torch.float32)
    assert layer_tiles.why_torch(one_row, H100) == "kernels of up to 16 rows were slower than torch where measured"
    few_rows = Problem("wgrad", 512, 784, 16, torch.float32)
    assert layer_tiles.why_torch(few_rows, H100) is not None
    assert layer_tiles.why_torch(Problem("output_gradient", 1, 512, 0, torch.float32), H100) is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("AMD Instinct MI300X", "AMD MI300X"),
        ("NVIDIA A10", "Triton's interpreter"),
        ("NVIDIA GeForce RTX 4090", "Triton's interpreter"),
    ],
)
def test_a_gpus_full_name_has_the_rates_of_its_data_sheet(name: str, known: str) -> None:
    assert known_device(name).name == known


def test_an_unknown_device_gets_the_rates_of_its_architecture() -> None:
    problem = Problem("dgrad", 16384, 512, 512, torch.bfloat16, activation="gelu")
    unknown = dataclasses.replace(
        H100, name="NVIDIA GH100", bandwidth=None, tensor_16=None, tensor_tf32=None, fma_32=None
    )
    tile = layer_tiles.choose(problem, H100)
    assert estimate.kernel_seconds(problem, tile, unknown) == estimate.kernel_seconds(problem, tile, H100)
    half = dataclasses.replace(unknown, multiprocessors=H100.multiprocessors // 2)
    assert estimate.torch_seconds(problem, half) > 1.5 * estimate.torch_seconds(problem, H100)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_term_has_a_rate(device: object) -> None:
    """Every kind, dtype, alignment and cost of an activation is tried."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for kind, activation in (("forward", "gelu"), ("forward", "relu"), ("dgrad", "tanh"), ("wgrad", "identity")):
            for aligned in (True, False):
                for precision in ("ieee", "tf32"):
                    for m, n, k in ((4096, 512, 512), (3, 5, 4096)):
                        problem = Problem(kind, m, n, k, dtype, precision, aligned, activation)  # type: ignore[arg-type]
                        assert estimate.torch_seconds(problem, device) > 0  # type: ignore[arg-type]
                        for tile in layer_tiles.candidates(problem, device):  # type: ignore[arg-type]
                            assert estimate.kernel_seconds(problem, tile, device) > 0  # type: ignore[arg-type]


def test_a_costlier_activation_takes_longer() -> None:
    tile = TileConfig(128, 128, 64, 8, 8, 3, descriptors=True)
    seconds = [
        estimate.kernel_seconds(Problem("dgrad", 16384, 512, 512, torch.bfloat16, activation=name), tile, H100)
        for name in ("identity", "relu", "gelu")
    ]
    assert seconds == sorted(seconds)
    assert ACTIVATIONS["leaky_relu"].piecewise
    assert not ACTIVATIONS["gelu"].piecewise


def test_a_table_without_a_data_sheet_cannot_be_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    table_files.write(path, dataclasses.replace(TABLE, device="NVIDIA RTX 9000"))
    assert fit.main([str(path)]) == 2
    assert "the table is from NVIDIA RTX 9000; it needs to be from one of: NVIDIA A100" in capsys.readouterr().err
