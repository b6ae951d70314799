"""torch's products instead of the layer kernels, with the same table of cases and the same bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, SEED, Case, Data, check, gradients, make, oracle, through_torch
from torch import Tensor

from mlp_fused import ACTIVATIONS
from mlp_fused.engine import layer_path, layer_steps, schedule, tables
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.paths import find_layers
from mlp_fused.engine.schedule import read_pointers
from mlp_fused.engine.torch_products import wgrad_by_torch
from mlp_fused.kernels import devices, layer_tiles
from mlp_fused.kernels.activation import Activation
from mlp_fused.kernels.launch import Launch, count_launches
from mlp_fused.kernels.tile_config import Problem
from mlp_fused.reference import Layer


def product_by_torch(kind: str, activation: Activation, *tensors: Tensor | None) -> None:
    """Run a product by torch and the kernel that follows it."""

    def choose(problem: Problem, written: bool) -> tables.Choice:
        is_product = problem.kind == kind
        return tables.Choice(None if is_product else layer_tiles.choose(problem, devices.INTERPRETED_DEVICE), "")

    product = layer_steps.product_schedule(kind, tensors, activation, "ieee", choose)
    product.run(tensors, read_pointers(tensors)[0])


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the layer path use torch for its three products, as a table could."""
    layer_path.layer_path.cache_clear()
    monkeypatch.setattr(tables, "choice_for", lambda problem, device: tables.Choice(None, "a test"))
    yield
    layer_path.layer_path.cache_clear()


def run(case: Case, data: Data) -> dict[str, Tensor]:
    x = data.x.reshape(-1, data.x.shape[-1])
    network = [Layer(*layer, case.dropout) for layer in zip(data.weights, data.biases, case.activations)]
    torch.manual_seed(SEED)
    y = run_layers(x, data.weights, data.biases, find_layers(x, network, case.dtype, "auto"))
    return gradients(data, y.view(*data.x.shape[:-1], y.shape[-1]))


@pytest.mark.usefixtures("by_torch", "poisoned")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if i % 8 == 0 else pytest.mark.full) for i, case in enumerate(CASES)],
    ids=lambda case: case.id,
)
def test_forward_and_gradients(case: Case, device: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    data = make(case, device)
    twin = data.to(case.dtype)
    with count_launches() as launches:
        ours = run(case, data)
    assert not {"layer_forward_kernel", "dgrad_kernel", "wgrad_kernel"} & set(launches)
    check(case, oracle(case, data), ours, gradients(twin, through_torch(case, twin)))


GELU, RELU, IDENTITY = (ACTIVATIONS[name] for name in ("gelu", "relu", "identity"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [GELU, RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("bias", ["the same dtype", "fp32", "none"])
def test_forward_with_and_without_z(activation: Activation, bias: str, dtype: torch.dtype, device: str) -> None:
    x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((9, 20), (7, 20)))
    b = None if bias == "none" else torch.randn(7, device=device).to(torch.float32 if bias == "fp32" else dtype)
    h, z, alone = (torch.full((9, 7), torch.nan, dtype=dtype, device=device) for _ in range(3))
    product_by_torch("forward", activation, x, weight, b, h, None if activation is IDENTITY else z)
    product_by_torch("forward", activation, x, weight, b, alone, None)
    expected = torch.nn.functional.linear(x, weight, None if b is None else b.to(dtype))
    if activation is not IDENTITY:
        torch.testing.assert_close(z, expected)
    torch.testing.assert_close(h, activation(expected))
    assert torch.equal(h, alone)


class OnNvidia(Tensor):
    """A CPU tensor that poses as a GPU's. torch.mm accepts `out_dtype` for it as documented for CUDA."""

    is_cuda = True

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.mm and "out_dtype" in kwargs:
            if kwargs["out_dtype"] != torch.float32 or args[0].dtype not in (torch.float16, torch.bfloat16):
                raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
            return kwargs["out"].copy_(args[0].float() @ args[1].float())
        return super().__torch_function__(function, types, args, kwargs)


into_another_dtype = pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.bfloat16, torch.float32),  # autocast over fp32 parameters
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)


@into_another_dtype
@pytest.mark.parametrize("rows", [0, 33])
def test_wgrad_into_another_dtype(rows: int, dtype: torch.dtype, parameters: torch.dtype, device: str) -> None:
    check_wgrad(*(torch.randn(rows, width, device=device).to(dtype) for width in (5, 8)), parameters)


@into_another_dtype
def test_wgrad_into_another_dtype_with_torchs_arguments_on_a_gpu(dtype: torch.dtype, parameters: torch.dtype) -> None:
    check_wgrad(*(torch.randn(33, width).to(dtype).as_subclass(OnNvidia) for width in (5, 8)), parameters)


def check_wgrad(dz: Tensor, h: Tensor, parameters: torch.dtype) -> None:
    """Compare dW and db in the parameters' dtype with float64."""
    dtype = dz.dtype
    dw, db = (torch.full(shape, torch.nan, dtype=parameters, device=dz.device) for shape in ((5, 8), (5,)))
    wgrad_by_torch(dz, h, dw, db)
    coarser = max(dtype, parameters, key=lambda dtype: torch.finfo(dtype).eps)
    bound = partial(torch.testing.assert_close, rtol=2 * torch.finfo(coarser).eps, atol=20 * torch.finfo(coarser).eps)
    bound(dw.double(), dz.double().t() @ h.double())
    bound(db.double(), dz.double().sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_nan_survives_the_librarys_relu(dtype: torch.dtype, device: str) -> None:
    """torch.relu(NaN) is NaN; a maximum with 0 in a library's epilogue need not be."""
    x, weight = torch.randn(64, 32, device=device, dtype=dtype), torch.randn(48, 32, device=device, dtype=dtype)
    x[3, 5] = torch.nan
    h = torch.empty(64, 48, device=device, dtype=dtype)
    product_by_torch("forward", RELU, x, weight, torch.zeros(48, device=device, dtype=dtype), h, None)
    assert h[3].isnan().all()


def test_the_pointwise_kernel_is_replayed(by_torch: None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel after a product by torch is prepared once and replayed in a repeated call."""
    prepared: list[str] = []
    inner = Launch.__init__

    def init(self: Launch, kernel: object, *arguments: object) -> None:
        prepared.append(kernel.__name__)
        inner(self, kernel, *arguments)

    monkeypatch.setattr(Launch, "__init__", init)
    case = Case(activation="gelu", output_activation="gelu")
    data = make(case, device)
    run(case, data)
    assert sorted(prepared) == ["output_gradient_kernel"] * 2 + ["pointwise_kernel"] * 2
    run(case, data)
    assert len(prepared) == 4


@pytest.mark.parametrize("kinds", [("forward",), ("dgrad",), ("wgrad",), ("forward", "dgrad", "wgrad")], ids="+".join)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_torchs_products_are_replayed_between_kernels(
    activation: str, kinds: tuple[str, ...], device: str, by_pointers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays use new tensors and do not resolve the names of operands again."""

    def choose(problem: Problem, device: devices.Device) -> tables.Choice:
        by_torch = problem.kind in kinds
        return tables.Choice(None if by_torch else layer_tiles.choose(problem, devices.INTERPRETED_DEVICE), "a test")

    layer_path.layer_path.cache_clear()
    monkeypatch.setattr(tables, "choice_for", choose)
    case = Case(activation=activation, output_activation=activation)
    run(case, make(case, device))  # prepares the launches
    monkeypatch.delattr(schedule.Schedule, "_operand")
    for _ in range(2):
        data = make(case, device)
        twin = data.to(case.dtype)
        with count_launches() as launches:
            ours = run(case, data)
        names = {"forward": "layer_forward_kernel", "dgrad": "dgrad_kernel", "wgrad": "wgrad_kernel"}
        assert {kind for kind, name in names.items() if name not in launches} == set(kinds)
        check(case, oracle(case, data), ours, gradients(twin, through_torch(case, twin)))
    layer_path.layer_path.cache_clear()


def test_only_needed_gradients_are_computed(device: str) -> None:
    dz, h = torch.randn(6, 3, device=device), torch.randn(6, 4, device=device)
    dw, db = torch.empty(3, 4, device=device), torch.empty(3, device=device)
    wgrad_by_torch(dz, h, dw, None)
    wgrad_by_torch(dz, None, None, db)
    torch.testing.assert_close(dw, dz.t() @ h)
    torch.testing.assert_close(db, dz.sum(0))
    with count_launches() as launches:
        product_by_torch("dgrad", IDENTITY, dz, dw, None, torch.empty_like(h), None)
        product_by_torch("forward", IDENTITY, h, dw, db, torch.empty_like(dz), None)
    assert launches == {}
