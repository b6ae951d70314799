"""The precision of computations: autocast, GradScaler, converted models, and torch's switches for fp32."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlp_fused import FusedMLP, module
from mlp_fused.engine import settings
from mlp_fused.engine.calls import run_path
from mlp_fused.engine.layer_path import LayerPath
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.kernels.network_tiles import SPLIT_ACCURACY

HALVES = (torch.float16, torch.bfloat16)
Make = Callable[..., FusedMLP]


@pytest.fixture
def make(backend_of_path: str, device: str) -> Make:
    """A function that makes networks for one of the paths."""

    def make(*widths: int, activation: str = "gelu", **keywords: Any) -> FusedMLP:
        first, *rest = widths or (20, 16, 8, 4)
        return FusedMLP(first, rest, activation_layer=activation, backend=backend_of_path, device=device, **keywords)

    return make


@pytest.fixture(autouse=True)
def _switches_as_they_were() -> Iterator[None]:
    """Restore the settings that torch's older switches change. conftest.py restores those of matmul."""
    of_cpu = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = of_cpu
    torch.use_deterministic_algorithms(False)


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), list(model.parameters())))


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, steps: float = 16) -> None:
    """Assert that errors are at most `steps` roundings of the largest entry."""
    assert actual.dtype == expected.dtype
    bound = steps * torch.finfo(dtype).eps * expected.abs().max().double()
    assert (actual.double() - expected.double()).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_equals_that_of_sequential(dtype: torch.dtype, make: Make, device: str) -> None:
    """The output has 16 bits, gradients have their tensors' dtypes. Also with nested and disabled autocast."""
    model = make()
    twin = copy.deepcopy(nn.Sequential(*model))
    x = torch.randn(9, 20, device=device)
    results = []
    for each in (model, twin):
        mine = x.clone().requires_grad_()
        with torch.autocast(device, dtype):
            y = each(mine)
            with torch.autocast(device, enabled=False):
                inner = each(mine)
            again = each(y.new_zeros(3, 20).float())
        assert (y.dtype, inner.dtype, again.dtype) == (dtype, torch.float32, dtype)
        assert each(mine).dtype == torch.float32
        y.float().square().sum().backward()
        results.append([y.detach(), mine.grad, *(parameter.grad for parameter in each.parameters())])
    for actual, expected in zip(*results):
        near(actual, expected, dtype)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("stored", HALVES, ids=str)
def test_autocast_of_a_model_already_in_16_bits(stored: torch.dtype, make: Make, device: str) -> None:
    """Gradients have the parameters' dtype, whatever dtype autocast computes in."""
    model = make().to(stored)
    twin = copy.deepcopy(nn.Sequential(*model))
    x = torch.randn(9, 20, device=device)
    for dtype in HALVES:
        with torch.autocast(device, dtype):
            y, expected = model(x), twin(x)
        near(y, expected, torch.bfloat16)
        for mine, other in zip(gradients(model, y), gradients(twin, expected)):
            assert mine.dtype == stored
            near(mine, other, torch.bfloat16)


class Casts(TorchDispatchMode):
    """A count of casts from float32 to 16 bits, by the shape of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            function is torch.ops.aten._to_copy.default
            and args[0].dtype == torch.float32
            and kwargs.get("dtype") in HALVES
        ):
            self.counted[tuple(args[0].shape)] += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("batches", [1, 3], ids="{} batches".format)
def test_a_weight_is_cast_at_most_once_per_forward(batches: int, make: Make, device: str) -> None:
    """Forward and backward share a cast. Network kernels cast in registers, which is not counted.

    torch caches a cast until autocast's context ends, so that all forwards in the context share it.
    """
    model = make()
    x = torch.randn(9, 20, device=device, requires_grad=True)
    weights = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2]
    for _ in range(2):
        with Casts() as casts:
            with torch.autocast(device, torch.bfloat16):
                losses = [model(x).float().square().sum() for _ in range(batches)]
            forward = {shape: casts.counted[shape] for shape in weights}
            sum(losses).backward()
        assert {shape: casts.counted[shape] for shape in weights} == forward  # none in the backward
        most = 1 if model.backend == "reference" else batches
        assert set(forward.values()) <= {0, most}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_grad_scaler(dtype: torch.dtype, make: Make, device: str) -> None:
    """Scaled gradients are unscaled; an overflow skips the step, changes nothing and halves the scale."""
    model = make()
    twin = copy.deepcopy(nn.Sequential(*model))
    x, t = torch.randn(9, 20, device=device), torch.randn(9, 4, device=device)
    actual = []
    for each in (model, twin):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for step in range(4):
            before = [parameter.detach().clone() for parameter in each.parameters()]
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = nn.functional.mse_loss(each(x).float(), t)
            if step == 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(each.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            moved = not all(map(torch.equal, before, each.parameters()))
            assert moved == (step != 2) == bool(norm.isfinite())
        assert scaler.get_scale() == 2.0**10  # twice as much after two steps, then half of that
        actual.append([parameter.detach() for parameter in each.parameters()])
    for mine, other in zip(*actual):
        near(mine, other, dtype)


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "float": (lambda model: model.half().float(), torch.float32),
    "to(dtype)": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to(memory_format)": (lambda model: model.to(memory_format=torch.channels_last), torch.float32),
    "to(both)": (lambda model: model.to(dtype=HALVES[0], memory_format=torch.channels_last), HALVES[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_converted_models(name: str, make: Make, device: str) -> None:
    model = make()
    if name == "double":
        model.backend = "auto"  # float64 runs plain torch, as the kernels take float64 only to check gradients
    twin = copy.deepcopy(nn.Sequential(*model))
    model(torch.randn(9, 20, device=device))  # the path is cached
    convert, dtype = CONVERSIONS[name]
    assert convert(model) is model
    convert(twin)
    x = torch.randn(9, 20, device=device).to(dtype)
    y, expected = model(x), twin(x)
    assert y.dtype == dtype
    near(y, expected, dtype)
    for mine, other in zip(gradients(model, y), gradients(twin, expected)):
        near(mine, other, dtype, 64)


def test_inputs_in_every_memory_format(make: Make, device: str) -> None:
    model = make(5, 8, 3)
    images = torch.randn(2, 5, 3, 4, device=device)
    volumes = torch.randn(2, 5, 2, 3, 2, device=device)
    for x in (
        images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        images.permute(0, 2, 3, 1),
        volumes.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1),
        volumes.permute(0, 2, 3, 4, 1),
    ):
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        expected = nn.Sequential(*model)(leaf)
        near(y, expected, torch.float32)
        near(*(torch.autograd.grad(each.square().sum(), leaf)[0] for each in (y, expected)), torch.float32)


SWITCHES: list[tuple[Callable[[], None], str]] = [
    (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
    (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False), "ieee"),
    (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
    (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), "ieee"),
    (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
]


@pytest.mark.parametrize("training", [True, False], ids="training={}".format)
def test_the_next_call_follows_every_switch_of_fp32(
    training: bool, device: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    def spy(x: Tensor, weights: Any, biases: Any, actual: Any) -> Tensor:
        taken.append(actual)
        return run_path(x, weights, biases, actual)

    monkeypatch.setattr(module, "run_path", spy)
    model = FusedMLP(20, [16, 4], backend="triton", device=device)
    x = torch.randn(9, 20, device=device)

    def call() -> str:
        """Call the model and return the precision of its products."""
        with nullcontext() if training else torch.no_grad():
            y = model(x)
        if training:
            y.sum().backward()
        last = taken.pop()
        precision = last.layers[0].precision if isinstance(last, LayerPath) else last.network.precision
        return SPLIT_ACCURACY.get(precision, precision)  # a network on Hopper uses "fp16x1" for "tf32"

    assert call() == "ieee"
    for _ in range(2):  # the second round uses cached paths
        for switch, expected in SWITCHES:
            switch()
            assert call() == settings.float32_precision() == expected
            with torch.autocast(device, torch.bfloat16):
                model(x)  # not affected by any of the switches


@pytest.mark.gpu
def test_results_follow_the_switches(device: str, path: str) -> None:
    """tf32 keeps 10 bits of each operand."""
    model = FusedMLP(256, [128, 64], activation_layer="tanh", backend="triton", device=device)
    x = torch.randn(64, 256, device=device)
    truth = copy.deepcopy(nn.Sequential(*model)).double()(x.double())
    for switch, expected in SWITCHES:
        switch()
        error = ((model(x) - truth).norm() / truth.norm()).item()
        assert (error > 2e-5) == (expected == "tf32")
        assert error < 5e-3


def test_deterministic_algorithms_are_accepted(make: Make, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then fills new memory with NaN too. The bits are the same as without it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = make()
    x = torch.randn(9, 20, device=device)
    results = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        y = model(x)
        results.append([y.detach(), *gradients(model, y)])
        with torch.autocast(device, torch.bfloat16):
            gradients(model, model(x))
    for first, *others in zip(*results):
        assert first.isfinite().all()
        assert all(torch.equal(first, other) for other in others)


def test_a_changed_weight_under_autocast(make: Make, device: str) -> None:
    """torch and layers multiply 16-bit copies and do not notice the change. A network reads the weight itself."""
    model = make()
    with torch.autocast(device, torch.bfloat16):
        y = model(torch.randn(9, 20, device=device)).float().sum()
    expected = torch.autograd.grad(y, model[0].weight, retain_graph=True)[0]
    with torch.no_grad():
        model[3].weight.mul_(2)
    section = getattr(y.grad_fn.next_functions[0][0].next_functions[0][0], "section", None)
    reads_it = isinstance(section, NetworkPath)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") if reads_it else nullcontext():
        assert torch.equal(torch.autograd.grad(y, model[0].weight)[0], expected)
