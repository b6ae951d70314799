"""Networks that compute fp32 products by three products of scaled fp16 parts: single products, cases, and extremes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, Data, check, gradients, make, oracle
from kernel_runs import by_torch, case_id, find
from torch import Tensor

from mlp_fused.engine import paths
from mlp_fused.engine.autograd import run_network
from mlp_fused.engine.network_path import Formulation, NetworkPath
from mlp_fused.kernels import devices, network_tiles
from mlp_fused.kernels.language import tl, triton
from mlp_fused.kernels.launch import count_launches
from mlp_fused.kernels.network import make_network
from mlp_fused.kernels.network_tiles import NetworkKind, NetworkProblem, network_tile
from mlp_fused.kernels.tile import dot
from mlp_fused.kernels.tile_config import TileConfig

# Single products


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    rows = tl.arange(0, M)[:, None]
    cols = tl.arange(0, N)[None, :]
    ks = tl.arange(0, K)
    a = tl.load(a_ptr + rows * K + ks[None, :])
    b = tl.load(b_ptr + ks[:, None] * N + cols)
    tl.store(c_ptr + rows * N + cols, dot(a, b, tl.zeros((M, N), tl.float32), PRECISION))


def multiply(a: Tensor, b: Tensor, precision: str = "fp16x3") -> Tensor:
    """The product a b of one tile, whose dimensions are powers of two."""
    c = torch.full((a.shape[0], b.shape[1]), torch.nan, device=a.device)
    product_kernel[(1,)](a, b, c, a.shape[0], b.shape[1], a.shape[1], precision)
    return c


def row_errors(actual: Tensor, true: Tensor) -> Tensor:
    """The relative error of each row, by the norm."""
    return (actual.double() - true).norm(dim=1) / true.norm(dim=1)


@pytest.mark.parametrize("k", [16, 32, 64])
def test_rows_of_any_scale_are_as_accurate_as_others(k: int, device: str) -> None:
    a, b = torch.randn(64, k), torch.randn(k, 64)
    scales = torch.tensor([1.0, 1e-20, 1e-33, 1e-37, 1e20, 1e37 / k]).repeat(11)[:64, None]
    scaled = (a * scales).to(device)
    actual = multiply(scaled, b.to(device))
    true = scaled.double() @ b.to(device).double()
    assert row_errors(actual, true).max() <= 4e-7
    assert (actual - scaled @ b.to(device)).double().norm() <= 4e-7 * true.norm()


def test_denormal_rows_lose_no_more_than_in_fp32(device: str) -> None:
    """The error is at most 2^-149, to whose multiples fp32 rounds such products, plus 2^-20 of the largest result."""
    a, b = (torch.randn(64, 64) * 1e-40).to(device), torch.randn(64, 64, device=device)
    true = a.double() @ b.double()
    assert (multiply(a, b).double() - true).abs().max() <= 2.0**-149 + 2.0**-20 * true.abs().max()


def test_tiny_weights_and_rows_together_do_not_underflow(device: str) -> None:
    """The product of the two scales is above 2^126, so its inverse is a denormal number."""
    for small, tiny in ((1e-19, 1e-18), (1e-36, 1e-2), (1e-2, 1e-36)):
        a, b = torch.randn(64, 64, device=device) * small, torch.randn(64, 64, device=device) * tiny
        true = a.double() @ b.double()
        error = (multiply(a, b).double() - true).abs().max()
        assert error <= 2.0**-149 + 4e-7 * true.abs().max(), (small, tiny)


def test_weights_whose_rows_spread_over_2_to_48_are_accurate_by_norm(device: str) -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64) * torch.exp2(torch.linspace(-24, 24, 64))
    a, b = a.to(device), b.to(device)
    true = a.double() @ b.double()
    assert (multiply(a, b).double() - true).norm() <= 4e-7 * true.norm()
    limit = 4e-7 * (a.abs() @ b.abs()).double() + 2.0**-48 * a.abs().sum(1, keepdim=True) * b.abs().max()
    assert ((multiply(a, b).double() - true).abs() <= limit).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("operand", ["a", "b"])
def test_inf_and_nan_spread_to_no_other_row(operand: str, value: float, device: str) -> None:
    a, b = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    (a if operand == "a" else b)[5, 7] = value
    actual, torchs = multiply(a, b), a @ b
    assert actual.isnan().equal(torchs.isnan())
    assert actual[torchs.isinf()].equal(torchs[torchs.isinf()])
    finite = torchs.isfinite()
    assert finite.sum() == 63 * 64
    torch.testing.assert_close(actual[finite], torchs[finite], rtol=1e-5, atol=1e-5)


def test_products_beyond_the_largest_number_are_infinite(device: str) -> None:
    a = torch.full((16, 16), 1e30, device=device)
    assert multiply(a, a).isposinf().all()
    assert multiply(a, -a).isneginf().all()
    assert multiply(a, torch.zeros_like(a)).eq(0).all()


@pytest.mark.parametrize("precision", ["fp16x3", "fp16x1"])
def test_numbers_too_large_for_their_scales_are_never_wrong(precision: str, device: str) -> None:
    """2^100 and 2^60 meet zeros only, so that fp32 sums 2^75 2^35. Their two scales have no inverse in fp32."""
    a, b = torch.zeros(16, 32, device=device), torch.zeros(32, 16, device=device)
    a[0, :2], a[1, 1] = torch.tensor([2.0**100, 2.0**75], device=device), 2.0**75
    b[1, 0], b[2, 1] = 2.0**35, 2.0**60
    c = multiply(a, b, precision)
    assert not c[0].isfinite().any()
    assert c[1:].equal((a @ b)[1:])


# Networks


# Forms of the backward: dgrad and wgrad with the rule's tiles, or one pass with small tiles and three programs.
FORMS = {
    "two kernels": None,
    "by layers": TileConfig(16, programs=3, precision="fp16x3"),
    "in one pass": TileConfig(32, programs=3, precision="fp16x3"),
    "recomputed": TileConfig(32, programs=3, precision="fp16x3"),
}


def scaled_path(case: Case, data: Data, precision: str = "fp16x3", form: str = "two kernels") -> NetworkPath:
    """The network path of a case with products of scaled parts, even for narrow layers."""
    if devices.device_record(data.x).arch not in network_tiles.FP32_MEASURED:
        pytest.skip("the kernels do not multiply by parts on this GPU")
    path = find(case, data)[2]
    assert isinstance(path, NetworkPath)
    net, device = path.network, devices.device_record(data.x)
    if data.x.is_cuda and min(net.widths) < network_tiles.NARROWEST_SPLIT[precision]:
        pytest.skip("on a tensor core, sums of so few terms err more than the bound allows, and the rule forbids them")
    net = make_network(net.widths, net.strides, net.activations, net.dtype, precision)

    def tile(kind: NetworkKind, stores: bool = False) -> TileConfig:
        problem = NetworkProblem(kind, net.pads, net.saves_z, net.dtype, net.precision, stores=stores)
        chosen = network_tile(problem, device)
        assert isinstance(chosen, TileConfig)
        return chosen

    wgrad = network_tiles.network_wgrad_tile(net.dtype, net.precision, device)
    layers = range(net.layers)
    groups = {"by layers": tuple((i, i + 1) for i in reversed(layers)), "in one pass": ((0, net.layers),)}.get(form, ())
    formulation: Formulation = "recompute" if form == "recomputed" else "stored"
    backward = FORMS[form] or tile("dgrad")
    return NetworkPath(net, tile("forward", stores=True), formulation, "a test", backward, wgrad, groups)


def forward(case: Case, data: Data, precision: str = "fp16x3", form: str = "two kernels") -> Tensor:
    """y of a network with products of scaled parts."""
    x = data.x.reshape(-1, data.x.shape[-1])
    y = run_network(x, tuple(data.weights), tuple(data.biases), scaled_path(case, data, precision, form))
    return y.view(*data.x.shape[:-1], y.shape[-1])


def is_scaled(case: Case) -> bool:
    """True if a case can be multiplied by scaled parts: full fp32, and narrow enough."""
    return case.dtype == torch.float32 and not case.tf32 and max(case.widths) <= 64 and case.dropout == 0


def parameters() -> list[object]:
    """Every case in one of the forms, in rotation. The other forms run with `-m full`."""
    listed = []
    for turn, case in enumerate(filter(is_scaled, CASES)):
        for place, form in enumerate(FORMS):
            only_full = place != turn % len(FORMS)
            listed.append(pytest.param(form, case, marks=pytest.mark.full if only_full else ()))
    return listed


@pytest.mark.parametrize(("form", "case"), parameters(), ids=case_id)
def test_gradients_by_scaled_parts(form: str, case: Case, device: str, poisoned: None) -> None:
    data = make(case, device)
    with count_launches() as launches:
        ours = gradients(data, forward(case, data, form=form))
    assert case.rows == 0 or "network_forward_kernel" in launches
    assert form == "two kernels" or not {"network_dgrad_kernel", "network_wgrad_kernel"} & launches.keys()
    check(case, oracle(case, data), ours, by_torch(case, data))


WIDE = Case(300, (64, 64, 48, 64), activation="gelu")


@pytest.mark.parametrize(("activation", "form"), list(zip(["relu", "gelu", "tanh", "silu"], FORMS)))
def test_a_network_64_wide_errs_little_more_than_torch(activation: str, form: str, device: str, poisoned: None) -> None:
    """The limit is twice torch's error by norm, because a library that does not sum in sequence may err less."""
    case = replace(WIDE, activation=activation, rows=2000)
    data = make(case, device)
    ours, torchs = gradients(data, forward(case, data, form=form)), by_torch(case, data)
    true = oracle(case, data).values
    for name, value in true.items():
        error, limit = ((tensors[name].double() - value).norm() for tensors in (ours, torchs))
        assert error <= 2 * limit, (name, error / limit)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_high_parts_alone_are_as_accurate_as_tf32(activation: str, device: str, poisoned: None) -> None:
    """Both round operands to 10 bits, which gives a relative error of 2^-12 to 2^-11 in every product."""
    case = replace(WIDE, activation=activation)
    data = make(case, device)
    ours, true = gradients(data, forward(case, data, "fp16x1")), oracle(case, data).values
    errors = {name: (ours[name].double() - value).norm() / value.norm() for name, value in true.items()}
    assert max(errors.values()) <= 2.0**-10
    assert errors["y"] >= 2.0**-14


@pytest.mark.parametrize("form", FORMS)
def test_scaled_parts_give_the_same_bits_every_time(form: str, device: str) -> None:
    runs = [gradients(data, forward(WIDE, data, form=form)) for data in (make(WIDE, device), make(WIDE, device))]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


def test_non_finite_rows_affect_no_other_row(device: str) -> None:
    data = make(replace(WIDE, activation="relu", needs="nothing"), device)
    expected = forward(WIDE, data)
    data.x[3, 5], data.x[70, 0] = torch.inf, torch.nan
    y = forward(WIDE, data)
    others = [row for row in range(300) if row not in (3, 70)]
    assert torch.equal(y[others], expected[others])
    assert y[70].isnan().all()
    assert not y[3].isfinite().any()


def test_gradients_of_rows_spread_over_2_to_40_are_accurate_by_norm(device: str) -> None:
    """Scale rows of x from 1e-38 to 1e18, or rows of dy over 2^40. The largest rows determine the weight gradients."""
    case = replace(WIDE, activation="relu", bias=False, rows=256)
    even = torch.ones(256)
    for x_scales, dy_scales in ((torch.logspace(-38, 18, 256), even), (even, torch.logspace(-20, 20, 256, base=2))):
        data = make(case, device)
        with torch.no_grad():
            data.x.mul_(x_scales[:, None].to(device))
        data.dy = data.dy * dy_scales[:, None].to(device)
        ours, torchs, true = gradients(data, forward(case, data)), by_torch(case, data), oracle(case, data).values
        for name, value in true.items():
            error, limit = ((tensors[name].double() - value).norm() for tensors in (ours, torchs))
            assert error <= 2 * limit + 2.0**-23 * value.norm(), (name, error / limit)


# The rule


def test_the_rule_takes_the_fastest_parts_that_are_accurate() -> None:
    device = devices.DEVICES["NVIDIA H100"]
    every = ("fp16x3", "bf16x6", "fp16x1")

    def precision(widths: tuple[int, ...], setting: str, splits: tuple[str, ...] | None = every) -> str:
        return network_tiles.network_precision(widths, torch.float32, setting, device, splits)

    assert precision((64,) * 5, "ieee") == "fp16x3"
    assert precision((64, 31, 64), "ieee") == "bf16x6"  # too few terms for fp16x3
    assert precision((64, 7, 64), "ieee") == "ieee"
    assert precision((64,) * 5, "tf32") == "fp16x1"
    assert precision((128,) * 5, "tf32") == "tf32"
    assert precision((64,) * 5, "ieee", None) == network_tiles.SPLITS[0]
    b200 = devices.DEVICES["NVIDIA B200"]  # the sums do not fit in tensor memory, which the compiler does not report
    assert network_tiles.network_precision((64,) * 5, torch.float32, "ieee", b200, every) == "ieee"
    assert network_tiles.network_precision((64,) * 5, torch.bfloat16, "ieee", device, every) == "ieee"


@pytest.mark.parametrize("layers", [1, 4, 5, 8, 12])
@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize("kind", ["forward", "dgrad"])
def test_all_programs_of_an_unmeasured_tile_fit_in_shared_memory(kind: NetworkKind, stores: bool, layers: int) -> None:
    device = devices.DEVICES["NVIDIA H100"]
    problem = NetworkProblem(kind, (64,) * (layers + 1), (False,) * layers, torch.float32, "fp16x3", stores=stores)
    tile = network_tile(problem, device)
    if isinstance(tile, str):
        assert layers > 10
    else:
        programs = tile.programs // device.multiprocessors
        is_measured = (tile.block_m, tile.num_warps, tile.num_stages, programs) in network_tiles.SCALED_64.values()
        bytes_per_program = network_tiles.network_shared_memory(problem, tile, device) - network_tiles.MARGIN + 1024
        assert (1 if is_measured else programs) * bytes_per_program <= 228 * 1024


@pytest.mark.parametrize("training", [True, False])
def test_explain_names_the_parts(training: bool) -> None:
    activations = Case(widths=(64,) * 5).activations
    path = paths.network_path(
        (64,) * 5,
        ((64, 1, 1),) * 4,
        tuple(activations),
        torch.float32,
        "ieee",
        devices.DEVICES["NVIDIA H100"],
        training,
        splits=("fp16x3",),
    )
    assert isinstance(path, NetworkPath)
    assert "two scaled fp16 parts" in path.explanation
    assert path.forward_tile.precision == path.wgrad_tile.precision == "fp16x3"
    assert path.formulation == ("stored" if training else None)


@pytest.mark.parametrize(("choice", "parts"), [("auto", "two scaled fp16 parts"), ("ieee", "three bf16 parts")])
def test_the_switch_ieee_prevents_scaled_parts(choice: str, parts: str) -> None:
    """Run a new process, because MLP_FUSED_FP32 is read at import. With "ieee", networks use bf16 parts."""
    code = "from mlp_fused import FusedMLP; print(FusedMLP(64, [64, 64]).explain(4096, device='h100').reason)"
    environment = {**os.environ, "MLP_FUSED_FP32": choice}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert parts in run.stdout
