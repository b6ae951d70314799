"""The kernels against float64, over the one table of cases; and what a table cannot say: exactness, repetition."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, Case, Data, check, gradients, make, oracle
from torch import Tensor

from mlp_fused import ACTIVATIONS, mlp, reference
from mlp_fused.functional import IDENTITY, Layer, run_layers
from mlp_fused.kernels.configs import TileConfig
from mlp_fused.kernels.launch import count_launches, offset_type
from mlp_fused.kernels.layer_backward import dgrad, wgrad
from mlp_fused.kernels.layer_forward import layer_forward


def forward(case: Case, data: Data) -> Tensor:
    """y through the kernels."""
    layers = [Layer(*layer) for layer in zip(data.weights, data.biases, case.activations)]
    return run_layers(data.x, layers, case.dtype)


def by_torch(case: Case, data: Data) -> dict[str, Tensor]:
    """y and the gradients by torch in the case's own dtype."""
    twin = data.to(case.dtype)
    return gradients(twin, reference.mlp(twin.x, twin.weights, twin.biases, case.activations))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients(case: Case, device: str, poisoned: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    data = make(case, device)
    with count_launches() as launches:
        ours = gradients(data, forward(case, data))
    assert launches or case.rows == 0
    check(case, oracle(case, data), ours, by_torch(case, data))


# Rows of 2^p and fewer bits keep every product and sum exact: 8 bits in bf16, 11 in fp16, 24 in fp32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "step"])
def test_exact_on_integers(activation: str, dtype: torch.dtype, device: str, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(1)
    case = Case(37, (19, 5, 3), dtype, activation)

    def integers(*shape: int, sparsity: float = 0.8) -> Tensor:
        values = torch.randint(-1, 2, shape, generator=generator) * (torch.rand(shape, generator=generator) > sparsity)
        return values.to(dtype).to(device)

    data = Data(integers(37, 19), [integers(5, 19), integers(3, 5)], [integers(5), integers(3)], integers(37, 3))
    for leaf in data.leaves.values():
        leaf.requires_grad_()
    truth = oracle(case, data)
    assert max(value.abs().max() for value in truth.values.values()) < 2**8
    for name, found in gradients(data, forward(case, data)).items():
        assert torch.equal(found.double(), truth.values[name]), name


def test_the_same_bits_every_run(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(130, (40, 50, 20), dtype, "gelu")
        first, second = (gradients(data, forward(case, data)) for data in (make(case, device), make(case, device)))
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_rebuilds_the_very_bits_of_the_forward(dtype: torch.dtype, device: str, poisoned: None) -> None:
    """h = a(round(z)) in training, in inference and where dgrad rebuilds it."""
    gelu = ACTIVATIONS["gelu"]
    x, weight, dz = (torch.randn(*shape, device=device).to(dtype) for shape in ((70, 40), (33, 40), (70, 33)))
    h, z, again = (torch.empty((70, 33), dtype=dtype, device=device) for _ in range(3))
    layer_forward(x, weight, None, h, z, gelu, "ieee")
    layer_forward(x, weight, None, again, None, gelu, "ieee")
    assert torch.equal(h, again)
    dx, rebuilt = torch.empty_like(h), torch.empty_like(h)
    dgrad(dz, torch.eye(33, dtype=dtype, device=device), z, dx, rebuilt, gelu, "ieee")
    assert torch.equal(h, rebuilt)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_second_backward_over_a_kept_graph_gives_the_same(activation: str, device: str) -> None:
    case = Case(activation=activation, output_activation=activation)
    data = make(case, device)
    y = forward(case, data)
    leaves = list(data.leaves.values())
    first = torch.autograd.grad(y, leaves, data.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, data.dy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name: str) -> None:
    data = make(Case(3, (2, 3, 2), torch.float64, name, name if name != "exp" else "identity"), seed=3)
    activations = Case(activation=name, output_activation=name if name != "exp" else "identity").activations
    leaves = tuple(data.leaves.values())

    def through_kernels(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        return mlp(x, [w0, w1], [b0, b1], *activations, backend="triton")

    def through_torch(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        return mlp(x, [w0, w1], [b0, b1], *activations, backend="reference")

    for function in (through_kernels, through_torch):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        if name == "hardsigmoid" and function is through_torch:
            with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):  # torch's own limit
                torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        else:
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_a_differentiated_gradient_is_torchs(device: str) -> None:
    for activation, needs in itertools.product(
        ("tanh", "gelu", "identity"), ("everything", "parameters", "last layer")
    ):
        case = Case(activation=activation, output_activation="softplus", needs=needs)
        data = make(case, device)
        twin = data.to(torch.float32)
        found = []
        for each, y in (
            (data, forward(case, data)),
            (twin, reference.mlp(twin.x, twin.weights, twin.biases, case.activations)),
        ):
            leaves = [leaf for leaf in each.leaves.values() if leaf.requires_grad]
            first = torch.autograd.grad(y, leaves, each.dy, create_graph=True)
            penalty = sum(gradient.square().sum() for gradient in first)
            found.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
        for ours, torchs in zip(*found):
            torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


TILES = [
    TileConfig(*tile, group_m=group)
    for tile, group in zip(itertools.product((16, 64), (16, 32), (16, 64)), (1, 2, 8) * 3)
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 33, 40)], ids=str)
def test_every_kind_of_tile(tile: TileConfig, sizes: tuple[int, int, int], device: str, poisoned: None) -> None:
    M, N, K = sizes
    gelu = ACTIVATIONS["gelu"]
    x, weight, bias, dz = (torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,), (M, N)))
    z, h = torch.empty((M, N), device=device), torch.empty((M, N), device=device)
    layer_forward(x, weight, bias, h, z, gelu, "ieee", tile)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(z, x @ weight.t() + bias, **close)
    torch.testing.assert_close(h, gelu(z), **close)

    dx, rebuilt = torch.empty((M, K), device=device), torch.empty((M, K), device=device)
    dgrad(dz, weight, x, dx, rebuilt, gelu, "ieee", tile)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(rebuilt, gelu(x), **close)
    torch.testing.assert_close(dx, torch.autograd.grad(gelu(leaf), leaf, dz @ weight)[0], **close)

    for split in (1, 2, 5):
        split_tile = TileConfig(tile.block_m, tile.block_n, tile.block_k, tile.group_m, split=split)
        dw, db = torch.empty((N, K), device=device), torch.empty((N,), device=device)
        with count_launches() as launches:
            wgrad(dz, x, dw, db, "ieee", split_tile)
        assert ("sum_partials_kernel" in launches) == (min(split, -(-M // tile.block_k)) > 1)
        torch.testing.assert_close(dw, dz.t() @ x, **close)
        torch.testing.assert_close(db, dz.sum(0), **close)
        for only_w, only_b in ((dw, None), (None, db)):
            expected = only_w.clone() if only_w is not None else only_b.clone()
            wgrad(dz, x if only_w is not None else None, only_w, only_b, "ieee", split_tile)
            found = only_w if only_w is not None else only_b
            torch.testing.assert_close(found, expected, **close)


def test_offsets_beyond_32_bits(device: str) -> None:
    """Two rows 2^31 elements apart, in memory that is never touched between them."""
    gap = 2**31 + 8
    storage = torch.empty(gap + 32, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((2, 32), (gap, 1))
    x.copy_(torch.randn(2, 32))
    weight = torch.randn(16, 32, dtype=torch.bfloat16, device=device)
    assert offset_type(x, weight) is not offset_type(weight)
    y = mlp(x, [weight], None, backend="triton")
    assert torch.equal(y, mlp(x.clone(), [weight], None, backend="triton"))
    grown = storage.as_strided((32, 2), (1, gap))  # as the gradient of a transposed layout: its reduction is far apart
    dw = torch.empty((2, 16), device=device)
    wgrad(grown, torch.ones((32, 16), dtype=torch.bfloat16, device=device), dw, None, "ieee")
    torch.testing.assert_close(dw, x.float().sum(1, keepdim=True).expand(2, 16))


@pytest.mark.parametrize("needs", ["input", "weights", "biases", "first layer", "last layer", "nothing"])
def test_nothing_is_computed_that_is_not_wanted(needs: str, device: str) -> None:
    case = Case(widths=(20, 33, 24, 17), activation="gelu", needs=needs)
    data = make(case, device)
    with count_launches() as launches:
        gradients(data, forward(case, data))
    dgrads = {"input": 3, "weights": 2, "biases": 2, "first layer": 2, "last layer": 0, "nothing": 0}[needs]
    wgrads = {"input": 0, "weights": 3, "biases": 3, "first layer": 1, "last layer": 1, "nothing": 0}[needs]
    assert launches["layer_forward_kernel"] == 3
    assert launches.get("dgrad_kernel", 0) == dgrads
    assert launches.get("wgrad_kernel", 0) == wgrads


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("needs", ["everything", "parameters", "input", "first layer", "last layer"])
def test_one_tensor_is_kept_a_layer(activation: str, needs: str, device: str) -> None:
    case = Case(64, (32, 48, 16, 8), activation=activation, needs=needs)
    data = make(case, device)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*data.weights, *filter(None.__ne__, data.biases))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(case, data)
    del y
    x, hidden = 32, [48, 16]
    widths = {
        "everything": x + sum(hidden), "parameters": x + sum(hidden), "input": sum(hidden),
        "first layer": x + sum(hidden), "last layer": hidden[-1],
    }[needs]  # fmt: skip
    assert sum(kept.values()) == 64 * widths * 4


def test_a_changed_weight_is_detected_as_torch_does(device: str) -> None:
    data = make(Case(), device)
    y = forward(Case(), data)
    with torch.no_grad():
        data.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(data.dy)


def test_a_lazily_negated_input(device: str) -> None:
    data = make(Case(needs="parameters"), device)
    negative = torch.complex(data.x, data.x).conj().imag
    assert negative.is_neg()
    layers = [Layer(data.weights[0], data.biases[0], IDENTITY)]
    y = run_layers(negative, layers, torch.float32)
    torch.testing.assert_close(y, run_layers(-data.x, layers, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_gradient_over_a_million_rows(dtype: torch.dtype, device: str) -> None:
    rows, width = 2**20, 64
    dz, h = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    dw, db = torch.empty((width, width), dtype=dtype, device=device), torch.empty((width,), dtype=dtype, device=device)
    wgrad(dz, h, dw, db, "ieee")
    for found, torchs, true in (
        (dw, dz.t() @ h, dz.double().t() @ h.double()),
        (db, dz.sum(0), dz.double().sum(0)),
    ):
        slack = torch.finfo(dtype).eps / 2 * true.abs().max()
        assert (found - true).abs().max() <= (torchs - true).abs().max() + slack


@pytest.mark.gpu
def test_more_than_2_to_31_elements(device: str) -> None:
    rows, width = 2**21 + 3, 1025
    x = torch.randn(rows, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = mlp(x, [weight], None, backend="triton")
    assert y.numel() > 2**31
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    torch.testing.assert_close(y[some], x[some] @ weight.t())
    y.backward(torch.ones((), device=device, dtype=torch.bfloat16).expand_as(y))
    expected = x.sum(0, dtype=torch.float64).expand(width, -1)
    assert (weight.grad.double() - expected).norm() <= 2**-8 * expected.norm()
