"""The steps of a layer. A product is one of our kernels, or torch's product.

Our kernel computes the activation or the derivative in its epilogue. After torch's product, a pointwise kernel does so,
unless torch's library has the activation in its epilogue (relu).

z = h_below Wᵀ + b, h = a(z)                         forward
dz = dh ⊙ a'(saved)                                  output_gradient, for the network's last layer
dz_below = (dz W) ⊙ a_below'(saved_below)            dgrad
dW = dzᵀ h_below, db = Σ_rows dz                     wgrad

A product of fp32 may take operands that are split into fp16 planes ("fp16x3", "fp16x1"). Then it has further steps:

planes of each operand, and partial sums for db      split
output tiles that read a flagged block, in fp32      redo

The split flags the blocks that its planes cannot hold accurately (see kernels/planes.py). An operand that a product
"fp16x3" of the same schedule has computed needs no step to split it: that product's epilogue writes its planes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels import layer_tiles
from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.devices import Device
from ..kernels.dropout import Dropout, saves_preactivation
from ..kernels.layer_backward import dgrad, output_gradient, wgrad_products, wgrad_sums
from ..kernels.layer_forward import layer_forward, pointwise
from ..kernels.partial_sums import Partial, sum_partials, sum_tile
from ..kernels.plane_products import dgrad_by_planes, forward_by_planes, wgrad_by_planes
from ..kernels.planes import PLANES, SPLIT, Form, info_shape, planes_shape, redo_tile, split
from ..kernels.tile_config import Kind, Problem, TileConfig
from . import settings, tables
from .schedule import Layers, Schedule, Writer, names_in
from .table_files import Gemm
from .torch_products import cast_by_torch, dgrad_by_torch, linear_by_torch, linear_relu_by_torch, wgrad_by_torch

if TYPE_CHECKING:
    from ..reference import Layer

__all__ = [
    "Choose",
    "LayerSpec",
    "Parameters",
    "add_activation",
    "add_cast",
    "add_dgrad",
    "add_forward",
    "add_output_gradient",
    "add_sums",
    "add_wgrad",
    "choose_tile",
    "describe_parameters",
    "drop_unread",
    "product_schedule",
]  # fmt: skip


class Parameters(NamedTuple):
    """The dtypes and strides of a layer's parameters. A schedule is valid only for parameters with these."""

    weight: torch.dtype
    weight_stride: tuple[int, ...]
    bias: torch.dtype | None
    bias_stride: int


def describe_parameters(layers: Sequence[Layer]) -> tuple[Parameters, ...]:
    """The dtypes and strides of the layers' parameters."""
    return tuple(
        Parameters(
            weight.dtype,
            tuple(map(int, weight.stride())),
            None if bias is None else bias.dtype,
            0 if bias is None else int(bias.stride(0)),
        )
        for weight, bias, *_ in layers
    )


# A function that chooses a tile, or torch, for a problem. Its second argument is True if the product that computes the
# first operand can also write that operand's planes.
Choose = Callable[[Problem, bool], tables.Choice]


def choose_tile(
    problem: Problem,
    written: bool = False,
    *,
    device: Device,
    torch_too: bool,
    float32: settings.Float32 = settings.FLOAT32,
) -> tables.Choice:
    """The tile for a problem on a device; or torch, with `torch_too`, if torch is expected to be faster.

    `written` is True if the product that computes the first operand can also write that operand's planes. `float32` is
    the user's choice of how kernels multiply fp32: see `settings.FLOAT32`.
    """
    if problem.kind == "output_gradient":
        return tables.Choice(layer_tiles.choose(problem, device), "")
    choice = tables.choice_for(problem, device)
    planes = layer_tiles.planes_tile(problem, device) if float32 == "auto" else None
    by_planes = choice.tile is not None and choice.tile.precision in PLANES
    if by_planes and choice.row is None and planes is not None:  # measured on a related GPU
        return tables.Choice(planes, choice.source)
    source = None if planes is None else _why_planes(problem, planes, choice.row, written, device, torch_too)
    if source is not None:
        return tables.Choice(planes, source)
    tile, source = choice.tile, choice.source
    if by_planes:  # measured, but the user's setting or the batch rules it out
        reason = layer_tiles.why_torch(problem, device)
        tile, source = (layer_tiles.choose(problem, device), "estimated") if reason is None else (None, reason)
    if tile is None and not torch_too:
        return tables.Choice(layer_tiles.choose(problem, device), "asked for")
    return tables.Choice(tile, source)


def _why_planes(
    problem: Problem, tile: TileConfig, row: Gemm | None, written: bool, device: Device, torch_too: bool
) -> str | None:
    """The reason to multiply by planes; None if another choice is expected to be faster.

    `row` is a measurement of the product. It counts the split of both operands. If the planes of the first one are
    `written` by another product, the estimated saving is subtracted.
    """
    if row is None or row.planes_ms is None:
        if not torch_too:
            return "asked for"
        return "estimated" if layer_tiles.prefers_planes(problem, tile, device, written=written) else None
    other_ms = row.torch_ms if row.tile is None and torch_too else row.ms
    planes_ms = row.planes_ms
    if written:
        with_splits, without = (layer_tiles.planes_seconds(problem, tile, device, by) for by in (False, True))
        planes_ms -= 1e3 * (with_splits - without)
    is_fastest = other_ms is None or planes_ms <= other_ms
    return f"measured on {device.name}" if is_fastest else None


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a path.

    Attributes:
        index: the layer's number, from 0.
        below: the activation of the layer below; the identity for the first layer.
        activation: the layer's own activation.
        dtype: the dtype that it computes in.
        precision: torch's setting for fp32.
        width_in, width_out: its widths.
        parameters: the dtypes and strides of its parameters. Gradients have the same dtypes.
        dropout: the Dropout of its output; None where nothing is dropped.
        dropout_below: the Dropout of the layer below.
    """

    index: int
    below: Activation
    activation: Activation
    dtype: torch.dtype
    precision: str
    width_in: int
    width_out: int
    parameters: Parameters
    dropout: Dropout | None
    dropout_below: Dropout | None

    @functools.cached_property
    def saves_z(self) -> bool:
        """True if the pre-activation is saved for backward, False if the output is."""
        return saves_preactivation(self.activation, self.dropout)

    @functools.cached_property
    def below_saves_z(self) -> bool:
        return saves_preactivation(self.below, self.dropout_below)

    @property
    def name(self) -> str:
        return f"layer {self.index} ({self.activation})"

    @property
    def label(self) -> str:
        return f"{self.index}: {self.width_in} -> {self.width_out}"

    def problem(
        self, kind: Kind, m: int, n: int, k: int = 0, aligned: bool = True, activation: Activation = IDENTITY
    ) -> Problem:
        """A problem of this layer: an (m, n) output and a reduction of length k."""
        precision = self.precision if k else "ieee"
        return Problem(kind, m, n, k, self.dtype, precision, aligned, activation.name)


def add_cast(spec: LayerSpec, writer: Writer, cast: str) -> None:
    """Add the cast of a weight to the dtype that the kernels compute in."""
    writer.allocate(cast, spec.width_out, spec.width_in)
    writer.add("cast", spec, {"weight": f"weight[{spec.index}]", "cast": cast}, ("cast",), cast_by_torch)


def add_forward(spec: LayerSpec, writer: Writer, x: str, weight: str, h: str, z: str | None, choose: Choose) -> None:
    """Add h = a(x Wᵀ + b), and z where it is saved: one kernel, or torch's product and then a kernel for a(·)."""
    rows, n, k = writer.rows, spec.width_out, spec.width_in
    problem = spec.problem("forward", rows, n, k, writer.are_describable(x, weight, h, z), spec.activation)
    factors = {"x": Factor(rows, k, Form("rows")), "weight": Factor(n, k, Form("rows"))}
    choice = choose(problem, _products_that_split(writer, x, factors["x"].form) is not None)
    add = partial(writer.add, "forward", spec, flops=2 * rows * n * k, problem=problem, choice=choice)
    operands: dict[str, Any] = {"x": x, "weight": weight, "bias": writer.find(f"bias[{spec.index}]")}
    if choice.tile is not None:
        options: dict[str, Any] = {"activation": spec.activation, "dropout": spec.dropout}
        operands |= {"h": h, "z": z}
        if choice.tile.precision in PLANES:
            run = partial(forward_by_planes, **options)
            operands |= {"split": None, **_seed(spec.dropout)}
            _add_by_planes(spec, writer, add, operands, ("h", "z", "split"), run, choice, factors)
            return None
        run = partial(layer_forward, **options, precision=spec.precision, tile=choice.tile)
        return add(operands | _seed(spec.dropout), ("h", "z"), run)
    is_plain_relu = spec.activation.name == "relu" and spec.dropout is None
    if is_plain_relu and z is None and operands["bias"] and writer.on_gpu:
        return add(operands | {"h": h}, ("h",), linear_relu_by_torch)
    product = z or h
    add(operands | {"z": product}, ("z",), linear_by_torch)
    if spec.activation is not IDENTITY or spec.dropout is not None:
        add_activation(spec, writer, product, h, choose)
    return None


class Factor(NamedTuple):
    """A factor of a product by planes, (rows, width), and the form in which it is split.

    With `with_sums`, its partial sums over rows are computed too.
    """

    rows: int
    width: int
    form: Form
    with_sums: bool = False


class Planes(NamedTuple):
    """The names of the buffers with a factor's planes, with their flags and exponents, and with partial sums over rows.

    `sums` is None if the factor was split without sums.
    """

    planes: str
    info: str
    sums: str | None


def _add_by_planes(
    spec: LayerSpec,
    writer: Writer,
    add: Callable[..., None],
    operands: Mapping[str, Any],
    writes: tuple[str, ...],
    run: Callable[..., Any],
    choice: tables.Choice,
    factors: Mapping[str, Factor],
    moved: Mapping[str, Any] | None = None,
) -> list[Planes]:
    """Add a product by planes: `add` adds its step. `factors` are its two factors, by name. Returns their planes.

    A step before it splits each factor that has no planes yet, and a step after it computes the flagged tiles in fp32.
    """
    assert choice.tile is not None
    count, all_planes, products, redone = PLANES[choice.tile.precision], [], {}, {}
    for side, (name, factor) in enumerate(factors.items()):
        planes = _written_by_product(spec, writer, operands[name], factor) if count == 2 else None
        if planes is None:
            planes = _add_split(spec, writer, side, operands[name], factor, count)
            redone[name] = (operands[name], planes.info)
        else:  # "redo" reads the planes, because the operand may have no fp32 copy: see `drop_unread`
            redone[name] = (planes.planes, planes.info)
        all_planes.append(planes)
        products[name] = (planes.planes, planes.info)
    read = {name: planes for name, (planes, _) in products.items()}
    add({**operands, **products}, writes, partial(run, tile=choice.tile), moved={**(moved or operands), **read})
    redo = tables.Choice(redo_tile(choice.tile), choice.source)
    again = {**operands, **redone}
    writer.add("redo", spec, again, writes, partial(run, tile=redo.tile), choice=redo, moved={})
    return all_planes


# A product's step can also write its result as planes. A key is the argument that receives the result, and the form of
# the planes; its value is the argument that receives the planes.
SPLIT_RESULTS = {
    ("h", Form("rows")): "split",
    ("dx", Form("rows", own=True)): "by_rows",
    ("dx", Form("columns", own=True)): "by_columns",
}


def _products_that_split(writer: Writer, x: str, form: Form) -> tuple[str, list[int]] | None:
    """The argument for the planes of x, and the indices of the two steps that compute x: a product and its "redo".

    None if no product "fp16x3" computes x, or if it cannot write planes of this form.
    """
    steps = [(index, step) for index, step in enumerate(writer.steps) if x in map(step.operands.get, step.writes)]
    if not steps or steps[0][1].tile is None or steps[0][1].tile.precision != "fp16x3":
        return None
    result = next(name for name in steps[0][1].writes if steps[0][1].operands[name] == x)
    argument = SPLIT_RESULTS.get((result, form))
    if argument is None or any(argument not in step.operands for _, step in steps):
        return None
    return argument, [index for index, _ in steps]


def _written_by_product(spec: LayerSpec, writer: Writer, x: str, factor: Factor) -> Planes | None:
    """The planes of x, if the product that computes it can write them. Its steps then do so.

    Neighbouring layers use different buffers, because a product reads the planes of a layer while it writes the next
    layer's.
    """
    products = _products_that_split(writer, x, factor.form)
    if products is None:
        return None
    argument, indices = products
    planes, info, sums = (f"{part} of {x}, {argument}" for part in ("planes", "info", "sums"))
    has_sums = argument == "by_columns"
    base = f"{argument} {spec.index % 2}"
    _share_planes(writer, planes, info, base, factor)
    names: tuple[str, ...] = (planes, info)
    if has_sums:
        names = (*names, writer.share(sums, f"sums of {base}", _count_row_sums(factor), factor.width))
    for index in indices:
        writer.rewrite(index, argument, names)
    return Planes(planes, info, sums if has_sums else None)


def _add_split(spec: LayerSpec, writer: Writer, side: int, x: str, factor: Factor, count: int) -> Planes:
    """Add the step that splits x into `count` planes.

    `side` is 0 for the first factor of a product, 1 for the second. All factors of a side share one buffer for planes.
    """
    planes, info = (f"{part} {side} along {factor.form.along} of {x}" for part in ("planes", "info"))
    _share_planes(writer, planes, info, f"planes {side}", factor, count)
    sums = None
    if factor.with_sums:
        sums = writer.share(f"sums of {x}", "sums of rows", _count_row_sums(factor), factor.width)
    operands: dict[str, Any] = {"x": x, "planes": planes, "info": info, "sums": sums}
    run = partial(split, form=factor.form)
    writer.add("split", spec, operands, ("planes", "info", "sums"), run, choice=tables.Choice(SPLIT, ""))
    return Planes(planes, info, sums)


def _share_planes(writer: Writer, planes: str, info: str, base: str, factor: Factor, count: int = 2) -> None:
    """Name a factor's planes, in the shared buffer `base`, and their info, in the shared buffer "info of" `base`."""
    shape, strides = planes_shape(factor.rows, factor.width, count)
    writer.share(planes, base, count * strides[0], dtype=torch.float16)
    writer.part(planes, base, 0, *shape, strides=strides)
    writer.share(info, f"info of {base}", *info_shape(factor.rows, factor.width, factor.form), dtype=torch.int32)


def _count_row_sums(factor: Factor) -> int:
    """The number of a factor's partial sums over rows: one for each block of rows."""
    return info_shape(factor.rows, factor.width, factor.form)[1]


def drop_unread(writer: Writer, *returned: str | None) -> None:
    """Write results as planes alone if no step reads them in fp32 and they are not returned.

    With MLP_FUSED_DEBUG they stay in fp32 too, because its checks cannot read planes.
    """
    if settings.DEBUG:
        return
    read = {name for step in writer.steps for name in names_in(step.operands[key] for key in step.reads)}
    for index, step in enumerate(writer.steps):
        for (result, _), argument in SPLIT_RESULTS.items():
            name = step.operands.get(result)
            if step.operands.get(argument) is None or result not in step.writes or name is None or name in read:
                continue
            if writer.base(name) not in returned:
                writer.rewrite(index, result, None)


def _add_pointwise(
    spec: LayerSpec, writer: Writer, kind: str, operands: Mapping[str, Any], width: int, choose: Choose
) -> None:
    """Add an elementwise kernel, which `kind` selects.

    "activation" is the layer's own activation, and "output_gradient" its derivative. "derivative" is the derivative of
    the activation below. It follows torch's product in a dgrad.
    """
    problem = spec.problem("output_gradient", writer.rows, width)
    choice = choose(problem, False)
    own = kind != "derivative"
    activation, dropout = (spec.activation, spec.dropout) if own else (spec.below, spec.dropout_below)
    kernel = pointwise if kind == "activation" else output_gradient
    run = partial(kernel, activation=activation, tile=choice.tile, dropout=dropout)
    writer.add(kind, spec, {**operands, **_seed(dropout)}, ("dz", "h"), run, problem=problem, choice=choice)


def add_activation(spec: LayerSpec, writer: Writer, z: str, h: str, choose: Choose) -> None:
    """Add h = a(z), with the layer's Dropout: after torch's product, or for a wgrad whose h no dgrad computes again."""
    _add_pointwise(spec, writer, "activation", {"z": z, "h": h}, spec.width_out, choose)


def add_output_gradient(spec: LayerSpec, writer: Writer, dh: str, saved: str | None, dz: str, choose: Choose) -> None:
    """Add dz = dh ⊙ a'(saved), with the mask of the layer's Dropout."""
    operands = {"dh": dh, "saved": saved, "dz": dz, "h": None}
    _add_pointwise(spec, writer, "output_gradient", operands, spec.width_out, choose)


def add_dgrad(
    spec: LayerSpec,
    writer: Writer,
    dz: str,
    weight: str,
    saved: str | None,
    dx: str,
    rebuilt: str | None,
    choose: Choose,
) -> None:
    """Add dx = (dz W) ⊙ a_below'(saved), and h of the layer below again if `rebuilt` is given.

    It is one kernel, or torch's product and then a kernel for the derivative.
    """
    rows, n, k = writer.rows, spec.width_out, spec.width_in
    are_describable = writer.are_describable(dz, weight, saved, dx, rebuilt)
    problem = spec.problem("dgrad", rows, k, n, are_describable, spec.below)
    factors = {"dz": Factor(rows, n, Form("rows", own=True)), "weight": Factor(n, k, Form("columns"))}
    choice = choose(problem, _products_that_split(writer, dz, factors["dz"].form) is not None)
    add = partial(writer.add, "dgrad", spec, flops=2 * rows * n * k, problem=problem, choice=choice)
    operands: dict[str, Any] = {"dz": dz, "weight": weight}
    if choice.tile is not None:
        options: dict[str, Any] = {"below": spec.below, "dropout": spec.dropout_below}
        operands |= {"saved": saved, "dx": dx, "h": rebuilt}
        if choice.tile.precision in PLANES:
            planes = ("by_rows", "by_columns")
            operands |= {**dict.fromkeys(planes), **_seed(spec.dropout_below)}
            run = partial(dgrad_by_planes, **options)
            _add_by_planes(spec, writer, add, operands, ("dx", "h", *planes), run, choice, factors)
            return None
        run = partial(dgrad, **options, precision=spec.precision, tile=choice.tile)
        return add(operands | _seed(spec.dropout_below), ("dx", "h"), run)
    add(operands | {"dx": dx}, ("dx",), dgrad_by_torch)
    if saved is not None or spec.dropout_below is not None:
        _add_pointwise(spec, writer, "derivative", {"dh": dx, "saved": saved, "dz": dx, "h": rebuilt}, k, choose)
    return None


def _seed(dropout: Dropout | None) -> dict[str, str]:
    """The additional operand of a step with Dropout: its seed."""
    return {"seed": "seed"} if dropout else {}


def add_wgrad(spec: LayerSpec, writer: Writer, dz: str, h: str, dw: str | None, db: str | None, choose: Choose) -> None:
    """Add dW = dzᵀ h and db = Σ_rows dz: one kernel, or torch.

    If the kernel writes partial sums, a second kernel adds them. In a product by planes, the step that splits dz writes
    partial sums of db, and one more kernel adds those.
    """
    rows, n, k = writer.rows, spec.width_out, spec.width_in if dw else 1
    problem = spec.problem("wgrad", n, k, rows, writer.are_describable(dz, h if dw else None))
    dz_factor = Factor(rows, n, Form("columns", own=True), with_sums=db is not None)
    factors = {"dz": dz_factor, "h": Factor(rows, k, Form("columns"))}
    choice = choose(problem, _products_that_split(writer, dz, dz_factor.form) is not None)
    size_w, size_b = n * k * (dw is not None), n * (db is not None)
    add = partial(writer.add, "wgrad", spec, flops=2 * rows * size_w, problem=problem, choice=choice)
    operands: dict[str, Any] = {"dz": dz, "h": h if dw else None, "dw": dw, "db": db}
    if choice.tile is None:
        return add(operands, ("dw", "db"), wgrad_by_torch)
    by_planes = choice.tile.precision in PLANES
    moved = dict(operands)
    if by_planes:  # db is summed where dz is split
        del operands["db"]
        size_b = 0
    layout = wgrad_sums(rows, choice.tile, spec.dtype, size_w, size_b)
    totals = tuple(total for total in (operands["dw"], operands.get("db")) if total)
    if dw is None:  # the kernel needs a tensor here, but does not read it
        operands["h"] = dz
    whole = f"partial[{spec.index}]"
    if layout.splits > 1:
        writer.share(whole, "partial", layout.splits, layout.columns, dtype=layout.dtype)
        for name, start, columns in (("dw", 0, size_w), ("db", layout.start_b, size_b)):
            if operands.get(name):
                shape, strides = (layout.splits, columns), (layout.columns, 1)
                part = f"partial {name}[{spec.index}]"
                operands[name] = writer.part(part, "partial", start, *shape, strides=strides)
    if by_planes:
        run = partial(wgrad_by_planes, partial=layout)
        dz_planes, _ = _add_by_planes(spec, writer, add, operands, ("dw",), run, choice, factors, moved)
    else:
        run = partial(wgrad_products, width_in=k, partial=layout, tile=choice.tile)
        add(operands, ("dw", "db"), run, moved=moved)
    if layout.splits > 1:
        add_sums(spec, writer, whole, totals, layout, layout.starts)
    if by_planes and db and dz_planes.sums:
        add_sums(spec, writer, dz_planes.sums, (db,), Partial(_count_row_sums(dz_factor), n, 0, spec.dtype))
    return None


def add_sums(
    layers: Layers,
    writer: Writer,
    whole: str,
    totals: tuple[str, ...],
    layout: Partial,
    starts: Sequence[int] | None = None,
) -> None:
    """Add the step that adds partial sums of gradients: `whole` is their buffer, and `totals` are the gradients.

    The bytes of the gradients count in the step before it.
    """
    operands, moved = {"partial": whole, "sums": totals}, {"partial": whole}
    run, choice = partial(sum_partials, starts=starts), tables.Choice(sum_tile(layout.splits, layout.columns), "")
    writer.add("sum_partials", layers, operands, ("sums",), run, choice=choice, moved=moved)


def product_schedule(
    kind: str, tensors: Sequence[Any], activation: Activation, precision: str, choose: Choose
) -> Schedule:
    """The schedule of a single product, to measure it. All its tensors are given.

    Args:
        tensors: forward: x, W, b, h, z; dgrad: dz, W, saved, dx, h; wgrad: dz, h, dW, db. In a forward, b and z may be
            None; in a dgrad, saved and h; in a wgrad, db.
        activation: in a forward the layer's own; in a dgrad that of the layer below.
    """
    a, b, c, d, e = (*tensors, None)[:5]
    rows, dtype = a.shape[0], a.dtype
    k, n = (b.shape[1], a.shape[1]) if kind != "forward" else (a.shape[1], b.shape[0])
    own, below = (activation, IDENTITY) if kind == "forward" else (IDENTITY, activation)
    spec = LayerSpec(0, below, own, dtype, precision, k, n, Parameters(dtype, (k, 1), dtype, 1), None, None)
    names = {
        "forward": ("x", "weight[0]", "bias[0]", "h", "z"),
        "dgrad": ("dz", "weight[0]", "saved", "dx", "rebuilt"),
        "wgrad": ("dz", "h", "dw", "db"),
    }[kind]
    writer = Writer(dict(zip(names, (a, b, c, d, e))), dtype, rows)
    if kind == "forward":
        add_forward(spec, writer, "x", "weight[0]", "h", writer.find("z"), choose)
    elif kind == "dgrad":
        add_dgrad(spec, writer, "dz", "weight[0]", writer.find("saved"), "dx", writer.find("rebuilt"), choose)
    else:
        add_wgrad(spec, writer, "dz", "h", writer.find("dw"), writer.find("db"), choose)
    return writer.finish()
