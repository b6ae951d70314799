"""fp32 operands split into fp16 planes: the planes, their flags, and products of them in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import Case, bound, check, gradients, make, oracle
from kernel_runs import by_torch, case_id, forward
from split_operands import launches, split_by_kernel
from torch import Tensor

from mlp_fused import FusedMLP
from mlp_fused.engine import settings
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.layer_steps import choose_tile
from mlp_fused.engine.paths import find_layers
from mlp_fused.engine.settings import Float32, check_float32
from mlp_fused.explain import Plan
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.devices import DEVICES, INTERPRETED_DEVICE, Device
from mlp_fused.kernels.dropout import Dropout
from mlp_fused.kernels.estimate import torch_seconds
from mlp_fused.kernels.language import ROWS_OF_16_ELEMENTS
from mlp_fused.kernels.layer_backward import dgrad, wgrad_products, wgrad_sums
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.kernels.planes import Exponents, Operand, info_shape, redo_tile
from mlp_fused.kernels.tile_config import Kind, Problem, TileConfig
from mlp_fused.reference import Layer

pytestmark = pytest.mark.skipif(ROWS_OF_16_ELEMENTS, reason="rows here are whole 16 bytes, not whole 16 elements")

WIDE = Case(rows=260, widths=(256, 264, 256), activation="relu", output_activation="gelu")
TILE = TileConfig(64, 64, 32, 8, 4, 1, precision="fp16x3", descriptors=True, parts=2, programs=2)
PRECISE, COARSE = 2.0**-23, 2.0**-50  # errors relative to an element, and to the largest that shares its exponent
EXPONENTS: tuple[Exponents, ...] = get_args(Exponents)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(x: Tensor, exponents: Exponents) -> Tensor:
    """For each element, the size of the largest element that shares its exponent."""
    sizes = torch.zeros_like(x)
    for m in range(0, x.shape[0], 128):
        for k in range(0, x.shape[1], 128):
            block = x[m : m + 128, k : k + 128].abs()
            axes = {"blocks": (0, 1), "rows": (1,), "columns": (0,)}[exponents]
            sizes[m : m + 128, k : k + 128] = block.amax(axes, keepdim=True)
    return sizes


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] : 2],
    "one row": lambda x: x[:1].expand(x.shape),
    "one number": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("exponents", EXPONENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(130, 257), (1, 1), (128, 256), (300, 44)], ids=str)
def test_planes_add_up_to_the_tensor(shape: tuple[int, int], layout: str, exponents: Exponents, device: str) -> None:
    x = LAYOUTS[layout](normal(*shape) * torch.exp2(normal(*shape, seed=1).mul(8).round())).to(device)
    split, sizes = split_by_kernel(x, exponents), largest(x, exponents)
    error = (split.restored() - x.double()).abs()
    most = 43 if exponents == "blocks" else 72
    assert (error <= torch.maximum(PRECISE * x.double().abs(), COARSE * sizes.double().clamp(2.0 ** (14 - most)))).all()
    assert (split.exponents() == (14 - torch.frexp(sizes).exponent + 1).clamp(-63, most)).all()
    assert split.planes.isfinite().all()
    for sums, block in zip(split.sums.double(), x.double().split(128), strict=True):
        assert ((sums - block.sum(0)).abs() <= 2.0**-18 * block.abs().sum(0)).all()


ROWS, COLUMNS = 1, 2
TOO_SMALL = 2.0**-28
FLAGS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "nothing": (lambda x: None, 0),
    "a small row": (lambda x: x[7].mul_(TOO_SMALL), ROWS),
    "a small column": (lambda x: x[:, 9].mul_(TOO_SMALL), COLUMNS),
    "both": (lambda x: (x[7].mul_(TOO_SMALL), x[:, 9].mul_(TOO_SMALL)), ROWS | COLUMNS),
    "rows of all sizes": (lambda x: x.mul_(torch.logspace(-23, 0, 128, base=2, device=x.device)[:, None]), 0),
    "small elements": (lambda x: x[::2, ::2].mul_(2.0**-60), 0),
    "zero rows and columns": (lambda x: (x[7].zero_(), x[:, 9].zero_()), 0),
    "zeros": (lambda x: x.zero_(), 0),
    "infinity": (lambda x: x[7, 9].fill_(torch.inf), ROWS | COLUMNS),
    "minus infinity": (lambda x: x[7, 9].fill_(-torch.inf), ROWS | COLUMNS),
    "nan": (lambda x: x[7, 9].fill_(torch.nan), ROWS | COLUMNS),
    "huge": (lambda x: x.mul_(2.0**78), ROWS | COLUMNS),
    "large": (lambda x: x.mul_(2.0**77), 0),
    "small": (lambda x: x.mul_(2.0**-51), 0),
    "tiny": (lambda x: x.mul_(2.0**-54), ROWS | COLUMNS),
    "denormal": (lambda x: x.mul_(2.0**-130), ROWS | COLUMNS),
}


@pytest.mark.parametrize(("change", "flags"), FLAGS.values(), ids=FLAGS)
def test_flags_of_a_block(change: Callable[[Tensor], object], flags: int, device: str) -> None:
    """Elements lie between 1 and 2 before the change. The blocks beside it have no flag."""
    x = (1 + torch.rand(128, 300, generator=torch.Generator().manual_seed(0))).to(device)
    change(x[:, 128:256])
    assert split_by_kernel(x).flags.tolist() == [[0, flags, 0]]


BOTH = ROWS | COLUMNS
# The flags of planes whose rows have exponents of their own.
FLAGS_OF_ROWS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "rows of all sizes": (lambda x: x.mul_(torch.linspace(-80, 77, 128).round().exp2().to(x)[:, None]), 0),
    "a column of all sizes": (lambda x: x[:, 9].mul_(torch.linspace(-140, 0, 128).round().exp2().to(x)), 0),
    "zero rows and columns": (lambda x: (x[7].zero_(), x[:, 9].zero_()), 0),
    "zeros": (lambda x: x.zero_(), 0),
    "a tiny row": (lambda x: x[7].mul_(2.0**-83), BOTH),
    "a denormal row": (lambda x: x[7].mul_(2.0**-130), BOTH),
    "a huge row": (lambda x: x[7].mul_(2.0**78), BOTH),
    "infinity": (lambda x: x[7, 9].fill_(torch.inf), BOTH),
    "minus infinity": (lambda x: x[7, 9].fill_(-torch.inf), BOTH),
    "nan": (lambda x: x[7, 9].fill_(torch.nan), BOTH),
}


@pytest.mark.parametrize("exponents", ["rows", "columns"])
@pytest.mark.parametrize(("change", "flags"), FLAGS_OF_ROWS.values(), ids=FLAGS_OF_ROWS)
def test_flags_of_rows_and_columns(
    change: Callable[[Tensor], object], flags: int, exponents: Exponents, device: str
) -> None:
    """A row with an exponent of its own is never small beside another; likewise a column."""
    x = (1 + torch.rand(300, 300, generator=torch.Generator().manual_seed(0))).to(device)
    block = x[128:256, 128:256]
    change(block if exponents == "rows" else block.t())
    assert split_by_kernel(x, exponents).flags.tolist() == [[0, 0, 0], [0, flags, 0], [0, 0, 0]]


Launches = Callable[[Tensor, Tensor, TileConfig, Exponents], Iterator[tuple[Operand, Operand, TileConfig]]]


def by_forward(x: Tensor, w: Tensor, tile: TileConfig, launches: Launches = launches) -> Tensor:
    h = torch.full((x.shape[0], w.shape[0]), torch.nan, device=x.device)
    for x_operand, w_operand, own in launches(x, w, tile, "blocks"):
        layer_forward(x_operand, w_operand, None, h, None, ACTIVATIONS["identity"], "ieee", own)
    return h


def by_dgrad(dz: Tensor, w: Tensor, tile: TileConfig, launches: Launches = launches) -> Tensor:
    dx = torch.full((dz.shape[0], w.shape[1]), torch.nan, device=dz.device)
    for dz_operand, w_operand, own in launches(dz, w, tile, "rows"):
        dgrad(dz_operand, w_operand, None, dx, None, ACTIVATIONS["identity"], "ieee", own)
    return dx


def by_wgrad(dz: Tensor, h: Tensor, tile: TileConfig) -> Tensor:
    return partial_wgrad(dz, h, tile).sum(0)


def partial_wgrad(dz: Tensor, h: Tensor, tile: TileConfig, launches: Launches = launches) -> Tensor:
    """The partial sums of dW, (splits, N, K)."""
    sums = wgrad_sums(dz.shape[0], tile, torch.float32, dz.shape[1] * h.shape[1], 0)
    whole = torch.full((sums.splits, dz.shape[1], h.shape[1]), torch.nan, device=dz.device)
    for dz_operand, h_operand, own in launches(dz, h, tile, "columns"):
        wgrad_products(dz_operand, h_operand, whole, None, h.shape[1], own, sums)
    return whole


# The kernel's product, torch's, and the shapes of its operands for M rows, N wide out, K wide in.
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "forward": (by_forward, lambda x, w: x @ w.t(), lambda m, n, k: (normal(m, k), normal(n, k, seed=1))),
    "dgrad": (by_dgrad, lambda dz, w: dz @ w, lambda m, n, k: (normal(m, n), normal(n, k, seed=1))),
    "wgrad": (by_wgrad, lambda dz, h: dz.t() @ h, lambda m, n, k: (normal(m, n), normal(m, k, seed=1))),
}
every_product = pytest.mark.parametrize(("ours", "torchs", "draw"), PRODUCTS.values(), ids=PRODUCTS)
Draw = Callable[..., tuple[Tensor, Tensor]]
Product = Callable[..., Tensor]


@every_product
@pytest.mark.parametrize("shape", [(200, 136, 264), (130, 132, 44), (1, 4, 8), (64, 4, 300)], ids=str)
def test_products_of_small_integers_are_exact(
    shape: tuple[int, ...], ours: Product, torchs: Product, draw: Draw, device: str
) -> None:
    a, b = (operand.mul(10).round().to(device) for operand in draw(*shape))
    for split in (1, 3):
        assert ours(a, b, replace(TILE, split=split)).equal(torchs(a, b))


@every_product
@pytest.mark.parametrize("tile", [TILE, replace(TILE, block_m=128, block_n=128, block_k=64, num_warps=8)], ids=str)
def test_products_give_the_same_bits_every_time(
    tile: TileConfig, ours: Product, torchs: Product, draw: Draw, device: str
) -> None:
    a, b = (operand.to(device) for operand in draw(200, 136, 264))
    assert ours(a, b, tile).equal(ours(a, b, tile))


# Exponents of two for spread(): of the rows and columns of the first operand, and of those of the second.
SPREADS = {
    "rows of x from 1e-35 to 1e35": ("forward", (117, 0, 0, 0)),  # sums of larger ones overflow
    "rows of W": ("forward", (0, 0, 24, 0)),
    "columns of both": ("forward", (0, 12, 0, 12)),
    "rows of dz by 2^20": ("dgrad", (20, 0, 0, 0)),
    "rows of dz by 2^40": ("dgrad", (40, 0, 0, 0)),
    "rows of dz from 1e-35 to 1e35": ("dgrad", (117, 0, 0, 0)),
    "rows of W against columns of dz": ("dgrad", (0, 10, 24, 0)),
    "columns of W": ("dgrad", (0, 0, 0, 24)),
    "rows of dz and h": ("wgrad", (20, 0, 10, 0)),
    "rows of dz by 2^40, against wgrad": ("wgrad", (40, 0, 0, 0)),
    "columns of dz by 2^20": ("wgrad", (0, 20, 0, 0)),
    "columns of dz and h": ("wgrad", (0, 40, 0, 40)),
}


def spread(x: Tensor, rows: int, columns: int) -> Tensor:
    """Multiply each row and column of x by a power of two, with a random exponent of at most this size."""
    generator = torch.Generator().manual_seed(3)
    for axis, most in ((0, rows), (1, columns)):
        shape = [1, 1]
        shape[axis] = x.shape[axis]
        x = x * torch.exp2(torch.randint(-most, most + 1, shape, generator=generator).float())
    return x


@pytest.mark.parametrize(("kind", "exponents"), SPREADS.values(), ids=SPREADS)
def test_entries_err_no_more_than_those_of_torch(kind: str, exponents: tuple[int, ...], device: str) -> None:
    """Relative to |a||b|, an entry errs at most twice as much as torch's worst, plus four roundings."""
    ours, torchs, draw = PRODUCTS[kind]
    a, b = draw(260, 260, 260)
    a, b = spread(a, *exponents[:2]).to(device), spread(b, *exponents[2:]).to(device)
    exact, size = torchs(a.double(), b.double()), torchs(a.double().abs(), b.double().abs())
    normals = size > 2.0**-100
    errors, limit = (
        ((product(a, b).double() - exact).abs() / size)[normals] for product in (lambda *x: ours(*x, TILE), torchs)
    )
    assert errors.max() <= 2 * limit.max() + 4 * 2.0**-24


# The kernel's product, and for each of its two factors, whether the sum runs along its rows.
REDONE = {"forward": (by_forward, True, True), "dgrad": (by_dgrad, True, False), "wgrad": (partial_wgrad, False, False)}
# Blocks (row, column) of the first and of the second factor that are flagged.
FLAGGED = {
    "nothing": ([], []),
    "a block of the first": ([(1, 2)], []),
    "a block of the second": ([], [(2, 0)]),
    "blocks of both": ([(0, 0), (2, 2)], [(2, 1)]),
    "everything": ([(i, j) for i in range(3) for j in range(3)], []),
}


@pytest.mark.parametrize("flagged", FLAGGED.values(), ids=FLAGGED)
@pytest.mark.parametrize(("kind", "split"), [("forward", 1), ("dgrad", 1), ("wgrad", 1), ("wgrad", 3)])
def test_redo_computes_the_flagged_tiles_alone(
    kind: str, split: int, flagged: tuple[list[tuple[int, int]], list[tuple[int, int]]], device: str
) -> None:
    """Two programs have 15 tiles or more. The bits are those of a product that has a program for each tile."""
    product, *by_k = REDONE[kind]
    a, b = (normal(260, 260, seed=seed).to(device) for seed in (0, 1))
    tile = replace(TILE, split=split)
    flags = [torch.zeros((3, 3), dtype=torch.int32) for _ in by_k]
    for own, blocks, along_rows in zip(flags, flagged, by_k):
        for block in blocks:
            own[block] = ROWS if along_rows else COLUMNS
        own[0, 1] |= COLUMNS if along_rows else ROWS  # a flag that this product ignores

    def redone(
        a: Tensor, b: Tensor, tile: TileConfig, exponents: Exponents
    ) -> Iterator[tuple[Operand, Operand, TileConfig]]:
        infos = [torch.zeros(info_shape(260, 260, grid), dtype=torch.int32) for grid in (exponents, "blocks")]
        for info, own in zip(infos, flags):
            info[0] = own
        yield (a, infos[0].to(device)), (b, infos[1].to(device)), redo_tile(tile)

    actual = product(a, b, tile, redone)
    whole = product(a, b, replace(redo_tile(tile), precision="ieee", programs=0)).view_as(actual)
    expected = torch.full_like(whole, torch.nan)
    # For each row and each column of tiles, the flagged blocks of the reduction.
    rows, columns = (own & ROWS > 0 if along_rows else (own & COLUMNS > 0).t() for own, along_rows in zip(flags, by_k))
    sums = wgrad_sums(260, tile, torch.float32, 0, 0).splits if kind == "wgrad" else 1
    chunk = -(-260 // sums // 32) * 32 if sums > 1 else 260
    for part, (whole_part, expected_part) in enumerate(zip(whole.view(-1, 260, 260), expected.view(-1, 260, 260))):
        blocks = slice(part * chunk // 128, -(-min(260, (part + 1) * chunk) // 128))
        for i in range(3):
            for j in range(3):
                if rows[i, blocks].any() or columns[j, blocks].any():
                    entries = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                    expected_part[entries] = whole_part[entries]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_extreme_gradients_equal_torchs(kind: str, device: str) -> None:
    """Rows and columns of dz: infinite, NaN, denormal, zero and below the limit of exponents."""
    ours, torchs, _ = PRODUCTS[kind]
    shape = (260, 132) if kind == "dgrad" else (131, 132)
    dz, other = normal(131, 260).to(device), normal(*shape, seed=1).to(device)
    dz[2], dz[:, 3], dz[11], dz[:, 12], dz[13] = 0, 0, dz[11] * 2.0**-130, dz[:, 12] * 2.0**-130, dz[13] * 2.0**-90
    dz[7, 1], dz[40, 200], dz[130, 100] = torch.inf, torch.nan, -torch.inf
    exact, size = torchs(dz.double(), other.double()), torchs(dz.double().abs(), other.double().abs())
    actual, theirs = ours(dz, other, TILE), torchs(dz, other)
    assert actual.isnan().equal(theirs.isnan())
    finite = theirs.isfinite()
    assert actual.isfinite().equal(finite)
    assert actual[~finite].sign().nan_to_num().equal(theirs[~finite].sign().nan_to_num())
    error, limit = ((result.double() - exact).abs()[finite] for result in (actual, theirs))
    tiniest = 131 * 2.0**-149  # roundings of denormal numbers
    assert (error <= 2.0**-19 * size[finite] + tiniest).all()
    assert error.max() <= 2 * limit.max()


def test_without_redo_small_rows_would_err_more(device: str) -> None:
    """Leave out the second launch, which computes flagged tiles again."""
    x, w = normal(128, 128).to(device), normal(128, 128, seed=1).to(device)
    x[5] *= 2.0**-40
    (x_operand, w_operand, tile), _ = launches(x, w, TILE)
    h = torch.full((128, 128), torch.nan, device=device)
    layer_forward(x_operand, w_operand, None, h, None, ACTIVATIONS["identity"], "ieee", tile)
    exact = x.double() @ w.double().t()
    errors = (h.double() - exact).norm(dim=1) / exact.norm(dim=1)
    others = torch.arange(128, device=device) != 5
    assert errors[5] > 1e-4
    assert errors[others].max() < 1e-6


ONE_PLANE = replace(TILE, precision="fp16x1")
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "positive": Tensor.abs,
    "relu": Tensor.relu,
    "rows over 2^20": lambda x: spread(x, 20, 0),
    "columns over 2^20": lambda x: spread(x, 0, 20),
}


def to_tf32(x: Tensor) -> Tensor:
    """Round x to 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
@every_product
def test_one_plane_errs_no_more_than_tf32(
    ours: Product, torchs: Product, draw: Draw, change: Callable[[Tensor], Tensor], device: str
) -> None:
    a, b = draw(260, 260, 260)
    a, b = change(a).to(device), b.to(device)
    exact, size = torchs(a.double(), b.double()), torchs(a.double().abs(), b.double().abs())
    by_plane, by_tf32 = ours(a, b, ONE_PLANE), torchs(to_tf32(a).double(), to_tf32(b).double())
    error, limit = (result.double() - exact for result in (by_plane, by_tf32))
    assert error.norm() <= 1.05 * limit.norm()
    for norm in (2, torch.inf):
        assert torch.linalg.vector_norm(error, norm) <= bound(exact, by_tf32, size, 2.0**-24, norm)


@every_product
def test_one_plane_leaves_non_finite_numbers_to_redo(ours: Product, torchs: Product, draw: Draw, device: str) -> None:
    a, b = (operand.to(device) for operand in draw(140, 132, 136))
    a[3, 5], a[7], b[2] = torch.inf, 2.0**90, 2.0**-90
    for split in (1, 3):
        actual, exact = ours(a, b, replace(ONE_PLANE, split=split)), torchs(a, b)
        assert actual.isfinite().equal(exact.isfinite())


def test_a_network_where_tf32_is_allowed(device: str, poisoned: None) -> None:
    """Each product rounds its operands to 10 bits, which gives a relative error of 2^-12 to 2^-11."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    case = replace(WIDE, activation="gelu")
    data = make(case, device)
    ours, true = gradients(data, forward(case, data, "run")), oracle(case, data).values
    errors = {name: (ours[name].double() - value).norm() / value.norm() for name, value in true.items()}
    assert max(errors.values()) <= 2.0**-10
    assert errors["y"] >= 2.0**-14


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_epilogues_by_planes_equal_those_of_other_tiles(keep: float, device: str) -> None:
    """If the products are exact, h, z, dx and the recomputed h have equal bits."""
    x, w, dz = (
        normal(*shape, seed=i).mul(4).round().to(device) for i, shape in enumerate([(66, 40), (36, 40), (66, 36)])
    )
    bias, z_below = normal(36, seed=3).to(device), normal(66, 40, seed=4).to(device)
    gelu = ACTIVATIONS["gelu"]
    options = {} if keep == 1 else {"seed": torch.tensor([5], device=device), "dropout": Dropout(keep, 1)}
    results = []
    for tile in (TILE, TileConfig(64, 32, 32, 8, 4, 1)):
        h, z, dx, below = (torch.full(shape, torch.nan, device=device) for shape in [(66, 36)] * 2 + [(66, 40)] * 2)
        for x_operand, w_operand, own in launches(x, w, tile):
            layer_forward(x_operand, w_operand, bias, h, z, gelu, "ieee", own, **options)
        for dz_operand, w_operand, own in launches(dz, w, tile, "rows"):
            dgrad(dz_operand, w_operand, z_below, dx, below, gelu, "ieee", own, **options)
        results.append((h, z, dx, below))
    assert all(ours.equal(others) for ours, others in zip(*results))


WIDE_CASES = [
    WIDE,
    replace(WIDE, activation="gelu", output_activation="identity", dropout=0.3),
    replace(WIDE, layout="transposed gradient", needs="parameters", output_activation="identity"),
    replace(WIDE, bias=False, needs="weights"),
    replace(WIDE, needs="biases"),
]


@pytest.mark.parametrize("case", WIDE_CASES, ids=case_id)
def test_networks_by_planes(case: Case, device: str, poisoned: None) -> None:
    data = make(case, device)
    check(case, oracle(case, data), gradients(data, forward(case, data, "run")), by_torch(case, make(case, device)))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_classifier_that_is_sure_of_most_rows(activation: str, device: str, poisoned: None) -> None:
    """The gradients of most rows are 2^-40 times as large as others. With an exponent per row, no block is flagged."""
    case = Case(rows=260, widths=(256, 260, 256, 256), activation=activation)
    data = make(case, device)
    labels = torch.arange(case.rows, device=device) % case.widths[-1]
    margin = torch.full((case.rows, 1), 28.0, device=device)
    margin[::20] = -2  # misclassified rows
    logits = normal(case.rows, case.widths[-1]).to(device).requires_grad_()
    sure = logits + margin * torch.nn.functional.one_hot(labels, case.widths[-1])
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(sure, labels), logits)
    data.dy.copy_(gradient)

    twin = data.to(torch.float32)
    layers = zip(twin.weights, twin.biases, case.activations)
    h, zs = twin.x, []
    for weight, bias, own in layers:
        zs.append(torch.nn.functional.linear(h, weight, bias))
        h = own(zs[-1])
    for dz in torch.autograd.grad(h, zs, twin.dy):
        assert split_by_kernel(dz).flags.all(dim=1)[:2].all()  # with one exponent per block
        assert not split_by_kernel(dz, "rows").flags.any()
        assert not split_by_kernel(dz, "columns").flags.any()

    check(case, oracle(case, data), gradients(data, forward(case, data, "run")), by_torch(case, data.to(torch.float32)))


def explained(*widths: int, backend: str = "triton") -> Plan:
    """The plan of a training step over 8192 rows on an H100."""
    model = FusedMLP(widths[0], list(widths[1:]), activation_layer=torch.nn.GELU, backend=backend, device="meta")
    return model.explain(8192, device="h100")


def test_operands_are_split_before_a_product_and_every_product_is_followed_by_redo() -> None:
    steps = explained(1024, 4096, 1024).runs[0].kernels
    kinds = [step.kind for step in steps]
    # x, W0, h and W1; dz1 by rows, W1, dz1 by columns, h, dz0 by columns and x.
    assert kinds == [
        *("split", "split", "forward", "redo") * 2,
        *("split", "split", "dgrad", "redo", "split", "split", "wgrad", "redo", "sum_partials"),
        *("split", "split", "wgrad", "redo", "sum_partials"),
    ]
    assert [step.operands["x"] for step in steps if step.operands.get("sums") and step.kind == "split"] == [
        "dy",
        "dz[0]",
    ]


def test_explain_names_the_form_and_counts_the_planes() -> None:
    plan = explained(1024, 4096, 1024)
    assert "fp16x3" in str(plan)
    by_auto = explained(1024, 4096, 1024, backend="auto").runs[0].kernels
    kinds = {step.kind for step in by_auto if step.tile is not None and step.tile.precision == "fp16x3"}
    assert kinds == {"forward", "dgrad", "wgrad"}
    # The backward: dz of the hidden layer and the recomputed h, and two buffers of planes of the larger tensors.
    hidden = 8192 * 4096 * 4
    assert 4 * hidden <= plan.workspace_bytes <= 4.1 * hidden


H100 = DEVICES["NVIDIA H100"]
PROBLEM = Problem("forward", 8192, 4096, 1024, torch.float32)


def test_planes_are_chosen_for_wide_products_on_hopper() -> None:
    assert precision(PROBLEM) == "fp16x3"
    assert precision(replace(PROBLEM, kind="wgrad", m=512, n=512, k=8192)) == "fp16x3"
    for other in (
        replace(PROBLEM, dtype=torch.bfloat16),
        replace(PROBLEM, aligned=False),
        replace(PROBLEM, n=layer_tiles.SHORTEST_PLANES - 4),
    ):
        assert precision(other) != "fp16x3"
    assert precision(PROBLEM, device=DEVICES["NVIDIA A100"]) != "fp16x3"
    assert precision(PROBLEM, torch_too=True) == "fp16x3"
    assert precision(replace(PROBLEM, kind="dgrad"), torch_too=True) == "fp16x3"


def test_one_plane_needs_backend_triton_and_tf32() -> None:
    allowed = replace(PROBLEM, precision="tf32")
    assert precision(allowed) == "fp16x1"
    assert precision(allowed, float32="ieee") == "tf32"
    assert precision(allowed, torch_too=True) is None
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    steps = explained(1024, 4096, 1024).runs[0].kernels
    assert {step.tile.precision for step in steps if step.problem} == {"fp16x1"}
    splits = [step.work.bytes for step in steps if step.kind == "split"]
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    two_planes = [step.work.bytes for step in explained(1024, 4096, 1024).runs[0].kernels if step.kind == "split"]
    # 4 bytes of an element are read, and 2 or 4 are written.
    assert all(one == pytest.approx(two * 6 / 8, rel=0.02) for one, two in zip(splits, two_planes, strict=True))


def precision(
    problem: Problem, device: Device = H100, torch_too: bool = False, float32: Float32 = "auto"
) -> str | None:
    """The precision of the chosen tile; None if torch is chosen."""
    tile = choose_tile(problem, device, torch_too, float32).tile
    return tile and tile.precision


# Products, and whether the estimate says that planes are 1.3 times as fast as torch on an H100.
ESTIMATES = {
    "wide": (PROBLEM, True),
    "its wgrad": (Problem("wgrad", 4096, 1024, 8192, torch.float32), True),
    "512 wide": (Problem("forward", 16384, 512, 512, torch.float32), True),
    "a small batch": (Problem("forward", 256, 512, 784, torch.float32), False),
    "a small product": (Problem("wgrad", 256, 256, 256, torch.float32), False),
}


@pytest.mark.parametrize(("problem", "faster"), ESTIMATES.values(), ids=ESTIMATES)
def test_the_estimate_leaves_small_products_to_torch(problem: Problem, faster: bool) -> None:
    tile = layer_tiles.planes_tile(problem, H100)
    assert tile is not None
    ratio = torch_seconds(problem, H100) / layer_tiles.planes_seconds(problem, tile, H100)
    assert (ratio >= layer_tiles.PLANES_MARGIN) == faster
    assert layer_tiles.planes_seconds(problem, tile, INTERPRETED_DEVICE) == torch.inf


MEASURED = Path(__file__).with_name("data") / "h200" / "planes.jsonl"
NETS = [line for line in map(json.loads, MEASURED.read_text().splitlines()) if line["part"] == "nets"]


@pytest.mark.parametrize("net", NETS, ids=[net["case"] for net in NETS])
def test_auto_takes_planes_where_they_made_the_network_faster(net: dict[str, Any]) -> None:
    """On an H200 each of these networks ran by planes alone."""
    sizes, activation, rows = net["case"].split()
    first, *others = map(int, sizes.split("x"))
    layer = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU}[activation]
    steps = (
        FusedMLP(first, others, activation_layer=layer, device="meta").explain(int(rows), device="h200").runs[0].kernels
    )
    for phase, kinds in (("forward", ("forward",)), ("training", ("forward", "dgrad", "wgrad"))):
        _, _, speed = net["times"][phase]
        tiles = [step.tile for step in steps if step.kind in kinds]
        by_planes = {tile is not None and tile.precision == "fp16x3" for tile in tiles}
        assert by_planes == {speed >= layer_tiles.PLANES_MARGIN}


def test_the_switch_ieee_prevents_planes() -> None:
    assert precision(PROBLEM, float32="ieee") in ("ieee", "bf16x6")
    assert check_float32("ieee") == "ieee"
    with pytest.raises(ValueError, match="MLP_FUSED_FP32 is 'tf32'; it needs to be one of: auto, ieee"):
        check_float32("tf32")


@pytest.mark.parametrize("kind", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("device", [H100, DEVICES["NVIDIA H200"], INTERPRETED_DEVICE], ids=lambda device: device.name)
def test_redo_splits_the_reduction_as_the_product_does(kind: Kind, device: Device) -> None:
    for m, n, k in ((256, 256, 256), (512, 512, 16384), (1024, 4096, 8193)):
        tile = layer_tiles.planes_tile(Problem(kind, m, n, k, torch.float32), device)
        assert tile is not None
        sums, redo_sums = (wgrad_sums(k, summed, torch.float32, m * n, 0) for summed in (tile, redo_tile(tile)))
        assert sums == redo_sums
        assert redo_tile(tile).started(10**6) == device.multiprocessors
        assert 128 % tile.block_m == 128 % tile.block_n == 128 % tile.block_k == 0


def test_debugging_checks_results_after_redo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers too large for planes give NaN in a product. Its redo, the next step, computes it again."""
    monkeypatch.setattr(settings, "DEBUG", True)
    x, layers = torch.full((256, 256), 2.0**80), [Layer(torch.full((256, 256), 2.0**-80), None, ACTIVATIONS["relu"])]
    y = run_layers(x, [layers[0].weight], [None], find_layers(x, layers, torch.float32, "triton"))
    assert y.equal(torch.full((256, 256), 256.0))
    x[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"layer 0 \(relu\), redo: 256 of 65536 elements of h are NaN or inf"):
        run_layers(x, [layers[0].weight], [None], find_layers(x, layers, torch.float32, "triton"))
