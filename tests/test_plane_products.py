"""Products of operands that were split into planes, in every layout, and the splits by their epilogues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, bound, check, gradients, make, oracle
from kernel_runs import by_torch, case_id, forward
from split_operands import (
    OPERANDS,
    Split,
    empty_split,
    empty_sums,
    launches,
    normal,
    product_by_planes,
    split_by_kernel,
)
from torch import Tensor

from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.dropout import Dropout
from mlp_fused.kernels.language import ROWS_OF_16_ELEMENTS
from mlp_fused.kernels.layer_backward import dgrad, wgrad_products, wgrad_sums
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.kernels.plane_products import dgrad_by_planes, forward_by_planes
from mlp_fused.kernels.planes import Form, Operand, info_shape, redo_tile
from mlp_fused.kernels.tile_config import TileConfig

pytestmark = pytest.mark.skipif(ROWS_OF_16_ELEMENTS, reason="rows here are whole 16 bytes, not whole 16 elements")

WIDE = Case(rows=260, widths=(256, 264, 256), activation="relu", output_activation="gelu")
TILE = TileConfig(64, 64, 32, 8, 4, 1, precision="fp16x3", descriptors=True, parts=2, programs=2)


def by_wgrad(dz: Tensor, h: Tensor, tile: TileConfig) -> Tensor:
    return product_by_planes("wgrad", dz, h, tile).sum(0)


by_forward, by_dgrad = partial(product_by_planes, "forward"), partial(product_by_planes, "dgrad")
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


def in_fp32(kind: str, a: Tensor, b: Tensor, tile: TileConfig) -> Tensor:
    """A product, or its partial sums, by the kernels for whole fp32 operands."""
    m, n = a.shape[0] if kind != "wgrad" else a.shape[1], b.shape[0] if kind == "forward" else b.shape[1]
    sums = wgrad_sums(a.shape[0], tile, torch.float32, m * n, 0)
    whole = empty_sums(sums, m, n, a.device)
    if kind == "forward":
        layer_forward(a, b, None, whole[0], None, ACTIVATIONS["identity"], "ieee", tile)
    elif kind == "dgrad":
        dgrad(a, b, None, whole[0], None, ACTIVATIONS["identity"], "ieee", tile)
    else:
        wgrad_products(a, b, whole, None, n, tile, sums)
    return whole


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
    a, b = (normal(260, 260, seed=seed).to(device) for seed in (0, 1))
    tile = replace(TILE, split=split)
    flags = [torch.zeros((3, 3), dtype=torch.int32) for _ in flagged]
    for own, blocks in zip(flags, flagged):
        for block in blocks:
            own[block] = 1

    def redone(
        a: Tensor, b: Tensor, tile: TileConfig, forms: tuple[Form, Form]
    ) -> Iterator[tuple[Operand, Operand, TileConfig]]:
        infos = [torch.zeros(info_shape(260, 260, form), dtype=torch.int32) for form in forms]
        for info, own in zip(infos, flags):
            info[0] = own
        yield (a, infos[0].to(device)), (b, infos[1].to(device)), redo_tile(tile)

    actual = product_by_planes(kind, a, b, tile, redone)
    whole = in_fp32(kind, a, b, replace(redo_tile(tile), precision="ieee", programs=0)).view_as(actual)
    expected = torch.full_like(whole, torch.nan)
    # For each row and each column of tiles, the flagged blocks of the reduction.
    rows, columns = (own > 0 if form.along == "rows" else own.t() > 0 for own, form in zip(flags, OPERANDS[kind]))
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


def test_without_redo_a_flagged_block_would_be_wrong(device: str) -> None:
    """Leave out the second launch, which computes flagged tiles again."""
    x, w = normal(256, 128).to(device), normal(128, 128, seed=1).to(device)
    x[5] *= 2.0**-40
    (x_operand, w_operand, tile), _ = launches(x, w, TILE, OPERANDS["forward"])
    h = torch.full((256, 128), torch.nan, device=device)
    forward_by_planes(x_operand, w_operand, None, h, None, ACTIVATIONS["identity"], tile)
    exact = x.double() @ w.double().t()
    errors = (h.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert not (errors[:128] < 1e-4).any()
    assert errors[128:].max() < 1e-6


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
    ours = [torch.full(shape, torch.nan, device=device) for shape in [(66, 36)] * 2 + [(66, 40)] * 2]
    others = [tensor.clone() for tensor in ours]
    for x_operand, w_operand, own in launches(x, w, TILE, OPERANDS["forward"]):
        forward_by_planes(x_operand, w_operand, bias, *ours[:2], gelu, own, **options)
    for dz_operand, w_operand, own in launches(dz, w, TILE, OPERANDS["dgrad"]):
        dgrad_by_planes(dz_operand, w_operand, z_below, *ours[2:], gelu, own, **options)
    tile = TileConfig(64, 32, 32, 8, 4, 1)
    layer_forward(x, w, bias, *others[:2], gelu, "ieee", tile, **options)
    dgrad(dz, w, z_below, *others[2:], gelu, "ieee", tile, **options)
    assert all(map(torch.equal, ours, others))


BLOCKS = replace(TILE, block_m=128, block_n=128, block_k=64, num_warps=8)  # an output tile is a block of planes
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "small and huge rows": lambda x: torch.cat([x[:5] * 2.0**-60, x[5:200], x[200:] * 2.0**60]),
    "infinity": lambda x: torch.cat([x[:7], x[7:8] * torch.inf, x[8:]]),
}


@pytest.mark.parametrize("keep", [1.0, 0.7])
@pytest.mark.parametrize("change", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("in_fp32", [True, False], ids=["in fp32 too", "planes alone"])
def test_epilogues_split_h_as_the_kernel_split_does(
    in_fp32: bool, change: Callable[[Tensor], Tensor], keep: float, device: str
) -> None:
    x, w, bias = change(normal(260, 40)).to(device), normal(132, 40, seed=1).to(device), normal(132, seed=2).to(device)
    options = {} if keep == 1 else {"seed": torch.tensor([5], device=device), "dropout": Dropout(keep, 1)}
    h, whole = (torch.full((260, 132), torch.nan, device=device) for _ in range(2))
    split = empty_split(260, 132, Form("rows"), device)
    for *operands, own in launches(x, w, BLOCKS, OPERANDS["forward"]):
        forward_by_planes(*operands, bias, whole, None, ACTIVATIONS["gelu"], own, **options)
        results = h if in_fp32 else None, None
        forward_by_planes(*operands, bias, *results, ACTIVATIONS["gelu"], own, (split.planes, split.info), **options)
    torch.testing.assert_close(h, whole if in_fp32 else torch.full_like(h, torch.nan), rtol=0, atol=0, equal_nan=True)
    assert_equal_splits(split, split_by_kernel(whole))


def assert_equal_splits(actual: Split, expected: Split) -> None:
    """Compare bits, because flagged blocks hold halves of numbers."""
    assert actual.info.equal(expected.info)
    assert actual.planes.view(torch.int16).equal(expected.planes.view(torch.int16))


@pytest.mark.parametrize("change", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("in_fp32", [True, False], ids=["in fp32 too", "planes alone"])
def test_epilogues_split_dz_as_the_kernel_split_does(
    in_fp32: bool, change: Callable[[Tensor], Tensor], device: str
) -> None:
    dz, w, saved = change(normal(260, 136)).to(device), normal(136, 132, seed=1).to(device), normal(260, 132, seed=2)
    dx, whole = (torch.full((260, 132), torch.nan, device=device) for _ in range(2))
    by_rows, by_columns = (empty_split(260, 132, Form(along, own=True), device) for along in ("rows", "columns"))
    written = (by_rows.planes, by_rows.info), (by_columns.planes, by_columns.info, by_columns.sums)
    saved = saved.relu().to(device)
    for *operands, own in launches(dz, w, BLOCKS, OPERANDS["dgrad"]):
        dgrad_by_planes(*operands, saved, whole, None, ACTIVATIONS["relu"], own)
        dgrad_by_planes(*operands, saved, dx if in_fp32 else None, None, ACTIVATIONS["relu"], own, *written)
    torch.testing.assert_close(dx, whole if in_fp32 else torch.full_like(dx, torch.nan), rtol=0, atol=0, equal_nan=True)
    for split in (by_rows, by_columns):
        assert_equal_splits(split, split_by_kernel(whole, split.form))
    for sums, block in zip(by_columns.sums.double(), whole.double().split(128), strict=True):
        finite = block.sum(0).isfinite()
        assert (sums.isfinite() == finite).all()
        assert ((sums - block.sum(0)).abs() <= 2.0**-18 * block.abs().sum(0))[finite].all()


@pytest.mark.parametrize("kind", PRODUCTS)
def test_redo_reads_the_same_numbers_from_planes(kind: str, device: str) -> None:
    """Flagged blocks hold fp32 numbers. The integers in other blocks are exact in planes."""
    a, b = (operand.mul(10).round().to(device) for operand in PRODUCTS[kind][2](260, 132, 136))
    a[5] *= 2.0**80

    def redone(
        from_planes: bool, a: Tensor, b: Tensor, tile: TileConfig, forms: Any
    ) -> Iterator[tuple[Operand, Operand, TileConfig]]:
        splits = [split_by_kernel(operand, form) for operand, form in zip((a, b), forms)]
        assert [split.flags.any() for split in splits] == [True, False]
        yield *((split.planes if from_planes else x, split.info) for split, x in zip(splits, (a, b))), redo_tile(tile)

    planes, fp32 = (product_by_planes(kind, a, b, TILE, partial(redone, choice)) for choice in (True, False))
    assert fp32.isfinite().any()
    torch.testing.assert_close(planes, fp32, rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_a_network_whose_hidden_blocks_are_flagged(activation: str, device: str, poisoned: None) -> None:
    """Rows of x from 1e-30 to 1e30. Without biases, the rows of all layers have these sizes."""
    case = Case(rows=260, widths=(256, 264, 256, 260), activation=activation, bias=False, needs="nothing")
    data = make(case, device)
    data.x.copy_(spread(data.x.cpu(), 100, 0))
    ours, true = forward(case, data, "run").double(), oracle(case, data).values["y"]
    theirs = by_torch(case, data.to(torch.float32))["y"].double()
    sizes = true.norm(dim=1)
    error, limit = (((y - true).norm(dim=1) / sizes).max() for y in (ours, theirs))
    assert error <= 2 * limit


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
        assert not split_by_kernel(dz, Form("rows", own=True)).flags.any()
        assert not split_by_kernel(dz, Form("columns", own=True)).flags.any()

    check(case, oracle(case, data), gradients(data, forward(case, data, "run")), by_torch(case, data.to(torch.float32)))
