"""The rows against tiny-cuda-nn, tested without it and without a GPU, by a plain-torch stand-in of the same layout."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import environment
from torch import Tensor, nn

from bench import bench_tinycudann as bench
from bench.machine import ROOT
from bench.problem import GRID, Cell, Problem
from bench.rows import from_json, to_json
from mlp_fused.module import FusedMLP

SMALL = Problem((5, 32, 32, 32, 3), 256, "fp16")
PHASES = ("forward", "training")


class Network(nn.Module):
    """A stand-in for tiny-cuda-nn: flat float32 `params`, float32 x (M, in) padded with ones, computations in fp16."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: dict[str, Any], seed: int = 1337) -> None:
        super().__init__()
        assert network_config["otype"] == "FullyFusedMLP"
        assert (network_config["activation"], network_config["output_activation"]) == ("ReLU", "None")
        width, hidden = network_config["n_neurons"], network_config["n_hidden_layers"]
        self.n_output_dims = n_output_dims
        self.padding = -n_input_dims % 16
        self.shapes = [(width, n_input_dims + self.padding), *[(width, width)] * (hidden - 1)]
        self.shapes.append((n_output_dims + -n_output_dims % 16, width))
        self.params = nn.Parameter(torch.randn(sum(n * k for n, k in self.shapes)))
        self.loss_scale = 128.0

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert x.shape[0] % 256 == 0
        params, start = self.params.half(), 0
        h = F.pad(x, (0, self.padding), value=1.0).half()
        for n, k in self.shapes:
            h = (h.relu() if start else h) @ params.as_strided((n, k), (k, 1), start).t()
            start += n * k
        return h[:, : self.n_output_dims]


STAND_IN: Any = ModuleType("tinycudann")
STAND_IN.Network = Network


def pair(problem: Problem = SMALL) -> tuple[bench.Ours, bench.Theirs]:
    ours = bench.Ours(problem, "cpu")
    return ours, bench.Theirs(ours, STAND_IN)


# The problems


def test_the_problems_are_the_narrow_ones_that_fit() -> None:
    cells = [cell for cell, _ in bench.CASES]
    narrow = {cell.problem for cell in GRID if cell.family == "narrow" and cell.problem.dtype == "fp16"}
    assert {cell.problem for cell in cells} == narrow  # all current problems fit
    assert Problem((16, 64, 64, 16), 2**21, "fp16") in narrow
    assert len(cells) == len(set(map(str, cells))) == 2 * len(narrow)
    assert {cell.phase for cell in cells} == set(PHASES)
    assert {device for _, device in bench.CASES} == {"cuda"}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"activation": "gelu"},
        {"layout": "sliced"},
        {"rows": 1000},
        {"widths": (48, 48, 48)},
        {"widths": (16, 32, 64, 16)},
        {"widths": (64, 64)},
        {"widths": (64, 256, 64)},
    ],
    ids=str,
)
def test_problems_that_do_not_fit(changes: dict[str, Any]) -> None:
    assert bench.runs(SMALL)
    assert not bench.runs(replace(SMALL, **changes))


# The weights


def test_the_flat_vector_is_as_long_as_tinycudanns() -> None:
    model = FusedMLP(128, [64, 64, 3], bias=False)
    packed = bench.pack(list(model.parameters()))
    assert packed.dtype == torch.float32
    assert packed.numel() == 64 * 128 + 64 * 64 + 16 * 64


@pytest.mark.parametrize("widths", [SMALL.widths, (16, 64, 64, 16), (33, 16, 1)], ids=str)
def test_packed_weights_give_our_output(widths: tuple[int, ...]) -> None:
    """Use entries of -1, 0 and 1, so that every sum is exact in fp16."""
    ours = bench.Ours(replace(SMALL, widths=widths), "cpu")
    with torch.no_grad():
        for parameter in ours.parameters:
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    x = torch.randint(-1, 2, (256, widths[0]))
    with torch.no_grad():
        y = ours.model(x.half())
    assert y.count_nonzero() > 100
    assert torch.equal(bench.Theirs(ours, STAND_IN).network(x.float()), y)
    for parameter, matrix in zip(ours.parameters, bench.unpack(bench.pack(ours.parameters), widths), strict=True):
        assert torch.equal(matrix, parameter.float())


def test_another_number_of_parameters_is_an_error() -> None:
    class Longer(Network):
        def __init__(self, *arguments: Any, **config: Any) -> None:
            super().__init__(*arguments, **config)
            self.params = nn.Parameter(torch.randn(len(self.params) + 512))

    module: Any = ModuleType("tinycudann")
    module.Network = Longer
    with pytest.raises(ValueError, match=r"tinycudann has 3584 parameters for \(5, 32, 32, 32, 3\), not 3072"):
        bench.Theirs(bench.Ours(SMALL, "cpu"), module)


# Verification


@pytest.mark.parametrize("phase", PHASES)
def test_a_row_is_complete(phase: str) -> None:
    timed, row = bench.measure_both(Cell("narrow", SMALL, phase), "cpu", STAND_IN)
    assert len(timed(0)) == (1 if phase == "forward" else 5)
    assert row.id == f"tinycudann-5x32x32x32x3-relu-fp16-m256-{phase}"
    assert (row.widths, row.rows, row.phase) == ((5, 32, 32, 32, 3), 256, phase)
    products = 2 * 256 * (5 * 32 + 2 * 32 * 32 + 32 * 3)
    assert row.flops == (products if phase == "forward" else 3 * products - 2 * 256 * 5 * 32)
    if phase == "forward":
        assert row.bytes == sum(2 * (256 * k + 256 * n + n * k) for k, n in pairwise(SMALL.widths))
    assert row.ours.path == "reference"
    assert row.tinycudann.jit_fusion is False
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    for side in (row.ours, row.tinycudann):
        assert (side.verified.gradients is None) == (phase == "forward")
    assert row.speedup == row.tinycudann.timing.ms / row.ours.timing.ms
    assert row.kernel_speedup == row.tinycudann.timing.kernel_ms / row.ours.timing.kernel_ms


@pytest.mark.parametrize("disabled", [True, False])
def test_the_bench_itself(disabled: bool) -> None:
    class Benchmark:
        def __init__(self) -> None:
            self.disabled = disabled
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, call: Callable[..., Any], args: tuple[Any, ...] = (), rounds: int = 1) -> None:
            for _ in range(rounds):
                call(*args)

    benchmark = Benchmark()
    bench.test_tinycudann(benchmark, STAND_IN, Cell("narrow", SMALL, "training"), "cpu")
    assert ("speedup" in benchmark.extra_info) != disabled


def test_both_sides_get_the_same_gradient() -> None:
    ours, theirs = pair()
    assert theirs.network.loss_scale == 1.0
    assert theirs.gradients is ours.gradients
    assert all(torch.equal(a, b) for a, b in zip(theirs.inputs, ours.inputs, strict=True))


def swapped(matrices: list[Tensor]) -> list[Tensor]:
    return [matrices[0], matrices[2], matrices[1], matrices[3]]


def transposed(matrices: list[Tensor]) -> list[Tensor]:
    return [matrices[0], matrices[1].t(), *matrices[2:]]


def shuffled(matrices: list[Tensor]) -> list[Tensor]:
    return [*matrices[:3], matrices[3].roll(1, 0)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("permute", [swapped, transposed, shuffled])
def test_permuted_weights_fail(permute: Callable[[list[Tensor]], list[Tensor]], phase: str) -> None:
    _, theirs = pair()
    params = theirs.parameters[0]
    timed = theirs.timed(theirs.network, phase)
    theirs.compare(timed, phase)
    with torch.no_grad():
        params.copy_(bench.pack(permute(bench.unpack(params.detach(), SMALL.widths))))
    with pytest.raises(AssertionError, match=r"FusedMLP and tinycudann differ .*\[\(0, "):
        theirs.compare(timed, phase)


@pytest.mark.parametrize("layer", range(4))
def test_a_wrong_gradient_fails(layer: int) -> None:
    _, theirs = pair()

    def damage(gradient: Tensor) -> Tensor:
        matrices = bench.unpack(gradient, SMALL.widths)
        return bench.pack([matrix.roll(1, 0) if i == layer else matrix for i, matrix in enumerate(matrices)])

    theirs.parameters[0].register_hook(damage)
    with pytest.raises(AssertionError, match=rf"differ .*: \[\({layer + 1}, [\d.]+\)\], "):
        theirs.compare(theirs.timed(theirs.network, "training"), "training")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_with_nan_or_infinity_fails(value: float) -> None:
    _, theirs = pair()
    with torch.no_grad():
        theirs.parameters[0][-1 - 15 * 32] = value  # a weight of the first output
    with pytest.raises(AssertionError, match="differ"):
        theirs.compare(theirs.timed(theirs.network, "forward"), "forward")


def test_a_build_without_fp16_fails() -> None:
    _, theirs = pair()
    with pytest.raises(AssertionError, match=r"computes in torch\.float32"):
        theirs.compare(theirs.timed(lambda x: theirs.network(x).float(), "forward"), "forward")


# Skipping


def test_a_missing_module_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    with pytest.raises(pytest.skip.Exception, match=r"^tinycudann is not installed \(.*tinycudann"):
        bench.load()


def test_a_module_that_does_not_load_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError("Could not find compatible tinycudann extension for compute capability 75.")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(pytest.skip.Exception, match=r"^tinycudann does not load \(OSError: Could not find"):
        bench.load()


def test_an_installed_module_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", STAND_IN)
    assert bench.load() is STAND_IN


@pytest.mark.parametrize(
    ("hidden_gpu", "reason"),
    [(True, "no CUDA device (torch "), (False, "tinycudann is not installed (")],
    ids=["no GPU", "no module"],
)
def test_rows_are_skipped_with_a_reason(hidden_gpu: bool, reason: str) -> None:
    """Run in a new process without tinycudann, in which no GPU is visible or one is simulated."""
    program = (
        "import sys, pytest, torch; sys.modules['tinycudann'] = None;"
        f"torch.cuda.is_available = lambda: {not hidden_gpu};"
        "sys.exit(pytest.main(['-rs', '-p', 'no:cacheprovider', 'bench/bench_tinycudann.py', '-k', 'm262144']))"
    )
    variables = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "4 skipped" in child.stdout
    assert any(line.startswith("SKIPPED [") and reason in line for line in child.stdout.splitlines())
