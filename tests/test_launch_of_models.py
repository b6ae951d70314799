"""Launches in repeated calls of models, after changes between the calls."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from launch_inputs import BF16, GELU, IDENTITY, RELU, SILU, gradients
from torch import Tensor

from mlp_fused import ACTIVATIONS, FusedMLP, mlp, reference
from mlp_fused.engine import section
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.paths import find_layers
from mlp_fused.kernels import launch
from mlp_fused.reference import Layer


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels whose launches are prepared, in order."""
    names: list[str] = []
    inner = launch.Launch.__init__

    def init(self: launch.Launch, kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        inner(self, kernel, *arguments)

    monkeypatch.setattr(launch.Launch, "__init__", init)
    return names


def parameters(model: FusedMLP) -> tuple[list[Tensor], list[Tensor | None]]:
    linears = [child for child in model if isinstance(child, torch.nn.Linear)]
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def check(y: Tensor, x: Tensor, weights: Any, biases: Any, *activations: Any) -> None:
    """Assert that y = mlp(x) and its gradients equal those of plain torch."""
    expected = reference.mlp(x, weights, biases, activations)
    leaves = [tensor for tensor in (x, *weights, *biases) if tensor is not None and tensor.requires_grad]
    close = {"rtol": 1e-4, "atol": 1e-4} if y.dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(y, expected, **close)
    for ours, theirs in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close["rtol"], atol=20 * close["atol"])


def make_layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors of one shape in every memory layout."""
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "sliced": x.repeat(1, 2)[:, ::2],
        "expanded": x[:1].expand_as(x),
        "misaligned": torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
        "trained": x.clone().requires_grad_(),
    }


def test_one_model_is_right_after_changes_between_calls(path: str, device: str, poisoned: None) -> None:
    model = FusedMLP(12, [16, 8], activation_layer="gelu", output_activation="silu", backend="triton", device=device)
    linear = model[0]

    def calls(*layouts: str, rows: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32) -> None:
        for number, layout in itertools.product(rows, layouts):
            x = make_layouts(torch.randn(number, 12, device=device).to(dtype))[layout]
            check(model(x), x, *parameters(model), GELU, SILU)

    calls("contiguous", "misaligned", rows=(5, 16, 5))
    calls("transposed", "sliced", "expanded", "trained")
    with torch.no_grad():
        calls("contiguous", "trained")
    linear.weight.requires_grad_(False)
    calls("contiguous", "trained")
    linear.weight.requires_grad_(True)
    linear.bias.requires_grad_(False)
    calls("contiguous")
    bias, linear.bias = linear.bias, None
    calls("contiguous")
    linear.bias = bias
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())  # other strides
    calls("contiguous")
    model.to(BF16)
    calls("contiguous", "trained", dtype=BF16)
    model.float()
    calls("contiguous")


def test_models_of_the_same_shapes_share_only_equal_launches(path: str, device: str, poisoned: None) -> None:
    """The models share widths and compute dtype, but differ in the parameters' dtypes or lack some biases."""
    x = torch.randn(9, 12, device=device)
    forms = [(torch.float32, torch.float32), (BF16, BF16), (torch.float32, BF16), (BF16, torch.float32), (BF16, None)]
    for weight_dtype, bias_dtype in (*forms, *forms[:2]):
        weights = [
            (torch.randn(n, k, device=device) / 5).to(weight_dtype).requires_grad_() for k, n in ((12, 16), (16, 8))
        ]
        biases = [
            None if bias_dtype is None else torch.randn(n, device=device).to(bias_dtype).requires_grad_()
            for n in (16, 8)
        ]
        with torch.autocast(device, BF16):
            y = mlp(x.to(weight_dtype), weights, biases, "gelu", "silu", backend="triton")
        assert y.dtype == BF16

        def rounded(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(BF16)

        expected = reference.mlp(x.to(BF16), [w.to(BF16) for w in weights], [rounded(b) for b in biases], [GELU, SILU])
        leaves = [tensor for tensor in (*weights, *biases) if tensor is not None]
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=6e-2)
        for ours, theirs in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=0.3)


@pytest.mark.parametrize("first", ["aligned", "misaligned"])
def test_unaligned_tensors_before_and_after_aligned_ones(first: str, path: str, device: str, poisoned: None) -> None:
    rows = 11 if first == "aligned" else 12

    def lay_out(aligned: bool, *shape: int) -> Tensor:
        odd = 0 if aligned else 1
        storage = torch.randn(torch.Size(shape).numel() + odd, device=device) / 5
        return storage[odd:].view(shape).requires_grad_()

    for aligned in (first == "aligned", first != "aligned", first == "aligned", True, False):
        x, *layers = (lay_out(aligned, *shape) for shape in ((rows, 12), (16, 12), (8, 16), (16,), (8,)))
        y = mlp(x, layers[:2], layers[2:], "relu", "gelu", backend="triton")
        check(y, x, layers[:2], layers[2:], RELU, GELU)


def test_a_call_that_repeats_prepares_nothing(path: str, device: str, prepared: list[str]) -> None:
    model = FusedMLP(12, [16, 8], activation_layer="gelu", output_activation="silu", backend="triton", device=device)

    def call(rows: int, train: bool) -> int:
        prepared.clear()
        x = torch.randn(rows, 12, device=device)
        with torch.set_grad_enabled(train):
            check(model(x), x, *parameters(model), GELU, SILU)
        return sum(1 for name in prepared if not train or path == "layer" or name == "network_forward_kernel")

    # A network's backward is prepared each time.
    for train in (False, True):
        assert call(14 + train, train) > 0
        assert call(14 + train, train) == 0
        assert call(12 + train, train) > 0
        assert call(14 + train, train) == 0


def test_the_number_of_cached_schedules_is_bounded(
    path: str, device: str, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(section, "MOST_CACHED", 3)
    sizes = []
    inner = section.Section._run

    def note(self: section.Section, *arguments: Any) -> list[Any]:
        results = inner(self, *arguments)
        sizes.append(len(self.cache))
        return results

    monkeypatch.setattr(section.Section, "_run", note)
    model = FusedMLP(12, [16, 8], backend="triton", device=device)
    for rows in (10, 11, 12, 13, 10, 11, 11):
        x = torch.randn(rows, 12, device=device)
        check(model(x), x, *parameters(model), RELU, IDENTITY)
    assert max(sizes) == 3


def test_threads_share_a_model(path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one kernel at a time, because its grid and `tl` are global."""
    monkeypatch.setattr(section, "MOST_CACHED", 3)
    model = FusedMLP(12, [16, 7], activation_layer="gelu", backend="triton", device=device)
    data = [torch.randn(rows, 12, device=device) for rows in (14, 5, 16)]

    def train(turn: int) -> None:
        for x in data[turn:] + data[:turn]:
            x = x.clone().requires_grad_()
            check(model(x), x, *parameters(model), GELU, IDENTITY)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(train, turn) for turn in range(4)]:
            future.result()


@pytest.mark.parametrize(("needs_x", "output"), [(False, None), (True, None), (True, "relu"), (False, "gelu")])
def test_three_layers_take_one_launch_per_product(needs_x: bool, output: str | None, device: str) -> None:
    model = FusedMLP(12, [16, 24, 8], None, "gelu", output_activation=output, backend="triton", device=device)
    x = torch.randn(33, 12, device=device, requires_grad=needs_x)
    weights, biases = parameters(model)
    activations = (GELU, GELU, ACTIVATIONS[output or "identity"])
    layers = [Layer(*layer) for layer in zip(weights, biases, activations)]
    for _ in range(2):
        with launch.count_launches() as launches:
            y = run_layers(x, weights, biases, find_layers(x, layers, torch.float32, "triton"))
            check(y, x, weights, biases, *activations)
        split = launches.pop("sum_partials_kernel", 0)
        assert split <= 3
        assert launches.pop("output_gradient_kernel", 0) == (output is not None)
        assert launches == {"layer_forward_kernel": 3, "dgrad_kernel": 2 + needs_x, "wgrad_kernel": 3}
