"""fp32 operands split into fp16 planes: the planes, their flags, and the schedules and the choice of products."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from split_operands import normal, split_by_kernel
from table_rows import H200, estimated, install, table
from torch import Tensor

from mlp_fused import FusedMLP
from mlp_fused.engine import settings
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.layer_steps import choose_tile
from mlp_fused.engine.paths import find_layers
from mlp_fused.engine.settings import Float32, check_choice
from mlp_fused.engine.table_files import Gemm
from mlp_fused.engine.tables import Choice
from mlp_fused.explain import Plan
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.devices import DEVICES, INTERPRETED_DEVICE, Device
from mlp_fused.kernels.estimate import torch_seconds
from mlp_fused.kernels.language import ROWS_OF_16_ELEMENTS
from mlp_fused.kernels.layer_backward import wgrad_sums
from mlp_fused.kernels.planes import Form, redo_tile
from mlp_fused.kernels.tile_config import Kind, Problem, TileConfig
from mlp_fused.reference import Layer

pytestmark = pytest.mark.skipif(ROWS_OF_16_ELEMENTS, reason="rows here are whole 16 bytes, not whole 16 elements")

PRECISE, COARSE = 2.0**-23, 2.0**-50  # errors relative to an element, and to the largest that shares its exponent
FORMS = [Form(along, own) for along in ("rows", "columns") for own in (False, True)]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.along}-{'own' if form.own else 'block'}")


def largest(x: Tensor, form: Form) -> Tensor:
    """For each element, the size of the largest element that shares its exponent."""
    sizes = torch.zeros_like(x)
    for m in range(0, x.shape[0], 128):
        for k in range(0, x.shape[1], 128):
            block = x[m : m + 128, k : k + 128].abs()
            axes = {"rows": (1,), "columns": (0,)}[form.along] if form.own else (0, 1)
            sizes[m : m + 128, k : k + 128] = block.amax(axes, keepdim=True)
    return sizes


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] : 2],
    "one row": lambda x: x[:1].expand(x.shape),
    "one number": lambda x: x[:1, :1].expand(x.shape),
}


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(130, 257), (1, 1), (128, 256), (300, 44)], ids=str)
def test_planes_add_up_to_the_tensor(shape: tuple[int, int], layout: str, form: Form, device: str) -> None:
    x = LAYOUTS[layout](normal(*shape) * torch.exp2(normal(*shape, seed=1).mul(8).round())).to(device)
    split, sizes = split_by_kernel(x, form), largest(x, form)
    error = (split.restored() - x.double()).abs()
    most = 72 if form.own else 43
    assert (error <= torch.maximum(PRECISE * x.double().abs(), COARSE * sizes.double().clamp(2.0 ** (14 - most)))).all()
    assert (split.exponents() == (14 - torch.frexp(sizes).exponent + 1).clamp(-63, most)).all()
    assert (split.planes.isfinite() | split.is_flagged()).all()
    for sums, block in zip(split.sums.double(), x.double().split(128), strict=True):
        assert ((sums - block.sum(0)).abs() <= 2.0**-18 * block.abs().sum(0)).all()


ROWS, COLUMNS, BOTH = "rows", "columns", "rows and columns"  # the products for which a block is flagged
TOO_SMALL = 2.0**-28
FLAGS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "nothing": (lambda x: None, ""),
    "a small row": (lambda x: x[7].mul_(TOO_SMALL), ROWS),
    "a small column": (lambda x: x[:, 9].mul_(TOO_SMALL), COLUMNS),
    "both": (lambda x: (x[7].mul_(TOO_SMALL), x[:, 9].mul_(TOO_SMALL)), BOTH),
    "rows of all sizes": (lambda x: x.mul_(torch.logspace(-23, 0, 128, base=2, device=x.device)[:, None]), ""),
    "small elements": (lambda x: x[::2, ::2].mul_(2.0**-60), ""),
    "zero rows and columns": (lambda x: (x[7].zero_(), x[:, 9].zero_()), ""),
    "zeros": (lambda x: x.zero_(), ""),
    "infinity": (lambda x: x[7, 9].fill_(torch.inf), BOTH),
    "minus infinity": (lambda x: x[7, 9].fill_(-torch.inf), BOTH),
    "nan": (lambda x: x[7, 9].fill_(torch.nan), BOTH),
    "huge": (lambda x: x.mul_(2.0**78), BOTH),
    "large": (lambda x: x.mul_(2.0**77), ""),
    "small": (lambda x: x.mul_(2.0**-51), ""),
    "tiny": (lambda x: x.mul_(2.0**-54), BOTH),
    "denormal": (lambda x: x.mul_(2.0**-130), BOTH),
}


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize(("change", "flagged"), FLAGS.values(), ids=FLAGS)
def test_flags_of_a_block(change: Callable[[Tensor], object], flagged: str, along: Any, device: str) -> None:
    """Elements lie between 1 and 2 before the change. The blocks beside it have no flag."""
    x = (1 + torch.rand(128, 300, generator=torch.Generator().manual_seed(0))).to(device)
    change(x[:, 128:256])
    split = split_by_kernel(x, Form(along))
    assert split.flags.tolist() == [[0, int(along in flagged), 0]]
    if along in flagged:  # the planes of the block hold the fp32 numbers themselves
        assert split.restored()[:, 128:256].equal(x[:, 128:256].double()) or x.isnan().any()


# The flags of planes whose rows have exponents of their own.
FLAGS_OF_ROWS: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "rows of all sizes": (lambda x: x.mul_(torch.linspace(-80, 77, 128).round().exp2().to(x)[:, None]), False),
    "a column of all sizes": (lambda x: x[:, 9].mul_(torch.linspace(-140, 0, 128).round().exp2().to(x)), False),
    "zero rows and columns": (lambda x: (x[7].zero_(), x[:, 9].zero_()), False),
    "zeros": (lambda x: x.zero_(), False),
    "a tiny row": (lambda x: x[7].mul_(2.0**-83), True),
    "a denormal row": (lambda x: x[7].mul_(2.0**-130), True),
    "a huge row": (lambda x: x[7].mul_(2.0**78), True),
    "infinity": (lambda x: x[7, 9].fill_(torch.inf), True),
    "minus infinity": (lambda x: x[7, 9].fill_(-torch.inf), True),
    "nan": (lambda x: x[7, 9].fill_(torch.nan), True),
}


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize(("change", "flagged"), FLAGS_OF_ROWS.values(), ids=FLAGS_OF_ROWS)
def test_flags_of_rows_and_columns(change: Callable[[Tensor], object], flagged: bool, along: Any, device: str) -> None:
    """A row with an exponent of its own is never small beside another; likewise a column."""
    x = (1 + torch.rand(300, 300, generator=torch.Generator().manual_seed(0))).to(device)
    block = x[128:256, 128:256]
    change(block if along == "rows" else block.t())
    assert split_by_kernel(x, Form(along, own=True)).flags.tolist() == [[0, 0, 0], [0, flagged, 0], [0, 0, 0]]


def explained(
    *widths: int, backend: str = "triton", activation: type[torch.nn.Module] = torch.nn.GELU, training: bool = True
) -> Plan:
    """The plan of a training step, or of inference, over 8192 rows on an H100."""
    model = FusedMLP(widths[0], list(widths[1:]), activation_layer=activation, backend=backend, device="meta")
    return model.requires_grad_(training).explain(8192, device="h100")


def test_operands_are_split_before_a_product_and_every_product_is_followed_by_redo() -> None:
    """Each of the two layers is an autograd.Function, so no product reads another's result in the same schedule."""
    steps = explained(1024, 4096, 1024).runs[0].kernels
    kinds = [step.kind for step in steps]
    # x, W0, h and W1; dz1 by rows, W1, dz1 by columns, h, dz0 by columns and x.
    assert kinds == [
        *("split", "split", "forward", "redo") * 2,
        *("split", "split", "dgrad", "redo", "split", "split", "wgrad", "redo", "sum_partials"),
        *("split", "split", "wgrad", "redo", "sum_partials"),
    ]
    assert [step.operands["x"] for step in steps if step.operands.get("sums") and step.kind == "split"] == ["dy", "dy"]


# The operands that are split by a step of their own, with three layers in one autograd.Function. h is saved where the
# activation is relu, and rebuilt from z where it is gelu.
SPLIT_BY_STEPS = {
    (torch.nn.ReLU, False): ["h", "weight[0]", "weight[1]", "weight[2]"],
    (torch.nn.ReLU, True): [
        *("h", "weight[0]", "weight[1]", "weight[2]"),
        *("dy", "weight[2]", "dy", "h[1]", "weight[1]", "h[0]", "x"),
    ],
    (torch.nn.GELU, True): [
        *("h", "weight[0]", "weight[1]", "weight[2]"),
        *("dy", "weight[2]", "dy", "rebuilt[2]", "weight[1]", "rebuilt[1]", "x"),
    ],
}


@pytest.mark.parametrize(("activation", "training"), SPLIT_BY_STEPS, ids=str)
def test_products_split_their_results_for_the_products_that_read_them(
    activation: type[torch.nn.Module], training: bool
) -> None:
    steps = explained(512, 512, 512, 512, activation=activation, training=training).runs[0].kernels
    splits = [step.operands["x"] for step in steps if step.kind == "split"]
    assert splits == SPLIT_BY_STEPS[activation, training]
    for step in steps:
        if step.operands.get("split") is not None:
            assert (step.operands["h"] is not None) == (training and activation is torch.nn.ReLU)
        if "by_rows" in step.operands:
            assert step.operands["dx"] is None
            assert step.operands["by_columns"] is not None
            assert (step.operands["by_rows"] is None) == (step.layer.startswith("layer 1"))


def test_results_are_counted_as_planes_alone_where_nothing_reads_them_in_fp32() -> None:
    steps = explained(512, 512, 512, training=False).runs[0].kernels
    first, second = (step.work.bytes for step in steps if step.kind == "forward")
    read_and_written = 2 * 8192 * 512 * 4 + 512 * 512 * 4 + 512 * 4
    assert first == read_and_written + 2 * 4 * 64 * 4  # a flag and an exponent for each block of h
    assert second == read_and_written


def test_explain_names_the_form_and_counts_the_planes() -> None:
    plan = explained(1024, 4096, 1024)
    assert "fp16x3" in str(plan)
    by_auto = explained(1024, 4096, 1024, backend="auto").runs[0].kernels
    kinds = {step.kind for step in by_auto if step.tile is not None and step.tile.precision == "fp16x3"}
    assert kinds == {"forward", "dgrad", "wgrad"}
    # The backward of the second layer: the recomputed h and its planes, and those of dz, a quarter as wide.
    hidden = 8192 * 4096 * 4
    assert 2.25 * hidden <= plan.workspace_bytes <= 2.3 * hidden


BF16X6 = TileConfig(128, 128, 32, 8, 8, 3, precision="bf16x6", descriptors=True)
FULL = Gemm("forward", 8192, 4096, 1024, "float32", "ieee", "identity", BF16X6, 1.0, 1.2)
WGRAD = replace(FULL, kind="wgrad", rows=16384, width_out=512, width_in=512)
PLANES_TILE = layer_tiles.planes_tile(FULL.problem, H200)
# A measured row, the options of the choice, and the precision of the chosen tile; None for torch.
ROWS: dict[str, tuple[Gemm, dict[str, Any], str | None]] = {
    "planes not measured": (FULL, {}, "fp16x3"),
    "planes the fastest": (replace(FULL, tile=PLANES_TILE, ms=0.4, planes_ms=0.4), {}, "fp16x3"),
    "another tile the fastest": (replace(FULL, planes_ms=1.1), {}, "bf16x6"),
    "another tile the fastest, asked for": (replace(FULL, planes_ms=1.1), {"torch_too": False}, "bf16x6"),
    "torch the fastest": (replace(FULL, tile=None, ms=1.3, planes_ms=1.4), {}, None),
    "torch the fastest, planes asked for": (
        replace(FULL, tile=None, ms=1.3, planes_ms=1.3),
        {"torch_too": False},
        "fp16x3",
    ),
    "planes forbidden": (replace(FULL, tile=PLANES_TILE, ms=0.4, planes_ms=0.4), {"float32": "ieee"}, None),
    "split by a step": (replace(WGRAD, planes_ms=1.02), {}, "bf16x6"),
    "split by the product before it": (replace(WGRAD, planes_ms=1.02), {"written": True}, "fp16x3"),
}


@pytest.mark.parametrize(("row", "options", "chosen"), ROWS.values(), ids=ROWS)
def test_a_measured_row_decides_where_planes_were_measured(
    row: Gemm, options: dict[str, Any], chosen: str | None, table_folder: Path
) -> None:
    install(user=table(row))
    choice = choose_tile(row.problem, **{"device": H200, "torch_too": True, **options})
    assert (choice.tile and choice.tile.precision) == chosen
    measured = row.planes_ms is not None and options.get("float32") != "ieee"
    assert ("measured" in choice.source) == measured


def test_planes_measured_on_a_related_gpu_are_chosen_where_the_estimate_would_not(table_folder: Path) -> None:
    problem = replace(WGRAD, rows=8192).problem
    planes = layer_tiles.planes_tile(problem, H200)
    related = replace(table(), device="NVIDIA A", arch=H200.arch, multiprocessors=H200.multiprocessors)
    install(packaged=related)
    assert choose_tile(problem, device=H200, torch_too=True).tile != planes
    row = replace(WGRAD, rows=8192, tile=planes, ms=0.4, planes_ms=0.4)
    install(packaged=replace(related, gemms=table(row).gemms))
    choice = choose_tile(problem, device=H200, torch_too=True)
    assert choice.tile == planes
    assert "measured on NVIDIA A" in choice.source
    forbidden = choose_tile(problem, device=H200, torch_too=True, float32="ieee")
    assert forbidden == Choice(estimated(problem), "estimated")


def test_auto_counts_planes_that_a_product_writes_as_cheaper() -> None:
    """wgrad of 512 wide layers pays off by planes only if dgrad has written those of dz."""
    steps = explained(512, 512, 512, 512, backend="auto", activation=torch.nn.ReLU).runs[0].kernels
    forms = {step.layer: step.tile and step.tile.precision for step in steps if step.kind == "wgrad"}
    assert forms == {"layer 0 (relu)": "fp16x3", "layer 1 (relu)": "fp16x3", "layer 2 (identity)": "bf16x6"}


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
    tile = choose_tile(problem, device=device, torch_too=torch_too, float32=float32).tile
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
    assert check_choice(get_args(Float32), "ieee", "MLP_FUSED_FP32") == "ieee"
    with pytest.raises(ValueError, match="MLP_FUSED_FP32 is 'tf32'; it needs to be one of: auto, ieee"):
        check_choice(get_args(Float32), "tf32", "MLP_FUSED_FP32")


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
    layers = 3 * layers
    with pytest.raises(FloatingPointError, match=r"layer 0 \(relu\), redo: 256 of 65536 elements of h are NaN or inf"):
        run_layers(x, [layer.weight for layer in layers], [None] * 3, find_layers(x, layers, torch.float32, "triton"))
